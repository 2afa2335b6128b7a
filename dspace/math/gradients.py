"""Symbolic vector-Jacobian product of one token, by reverse mode over the expression graph.

A node's cotangent lives on the node's axes. A child that lacks some of them receives the contraction of what
flows to it over those axes; below a contraction the cotangent simply broadcasts. Equal sub-expressions are one
node, visited once, so that gradients stay as small as the recurrence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from dspace.errors import CompilerBug
from dspace.math.ir import CONTRACTED, Adjoint, Axes, Recurrence, State, SumK, SumV, Variable, axes_of, contract

Table = Mapping[sympy.Symbol, Axes]


def new_symbol(state: State) -> sympy.Symbol:
    """Symbol of the value of ``state`` after the token: ``NAME_new``."""
    return sympy.Symbol(f"{state.name}_new", **state.symbol.assumptions0)


def cotangents_of(recurrence: Recurrence) -> tuple[Variable, ...]:
    """Cotangent symbols: ``d_output``, ``d_variance`` if there is one, and ``d_NAME`` for each state."""
    given = [Variable("d_output", "v", "cotangent", doc="cotangent of the output")]
    if recurrence.variance is not None:
        given.append(Variable("d_variance", "v", "cotangent", doc="cotangent of the variance"))
    for s in recurrence.states:
        given.append(Variable(f"d_{s.name}", s.axes, "cotangent", doc=f"cotangent of {s.name} after the token"))
    return tuple(given)


def adjoint(recurrence: Recurrence) -> Adjoint:
    """Gradients of one token: readout and update pulled back together.

    In ``wrt``, the cotangent of a state after the token is ``d_NAME`` (from the tokens that follow) plus, where the
    readout reads after the update, what this token's readout adds.
    """
    table = dict(recurrence.axes_table())
    table |= {c.symbol: c.axes for c in cotangents_of(recurrence)}
    updated = {s.symbol: new_symbol(s) for s in recurrence.states}
    table |= {updated[s.symbol]: s.axes for s in recurrence.states}
    readout = pull_readout(recurrence)
    seeds = []
    for s in recurrence.states:
        total = sympy.Symbol(f"d_{s.name}", real=True)
        if recurrence.read == "after":
            total = total + readout.get(updated[s.symbol], sympy.S.Zero)
        seeds.append((s.update, total, s.axes))
    wrt = pull_back(seeds, table)
    for symbol, gradient in readout.items():
        if symbol not in updated.values():
            wrt[symbol] = wrt.get(symbol, sympy.S.Zero) + gradient
    names = [*(v.symbol for v in recurrence.variables), *(s.symbol for s in recurrence.states)]
    unknown = set(wrt) - set(names)
    if unknown:
        raise CompilerBug(f"adjoint: gradients for {unknown}, which are no variables of {recurrence.name}")
    return Adjoint(
        wrt={n.name: wrt.get(n, sympy.S.Zero) for n in names},
        cotangents=cotangents_of(recurrence),
        new_states={s.name: s.update for s in recurrence.states},
    )


def pull_readout(recurrence: Recurrence) -> dict[sympy.Symbol, sympy.Expr]:
    """Cotangents that ``d_output`` and ``d_variance`` send to variables and to the states they read.

    States after the token are ``NAME_new``; with ``read == "before"`` they keep their own symbols.
    """
    updated = {s.symbol: new_symbol(s) for s in recurrence.states}
    table = dict(recurrence.axes_table()) | {updated[s.symbol]: s.axes for s in recurrence.states}
    table |= {c.symbol: c.axes for c in cotangents_of(recurrence)}
    seen = updated if recurrence.read == "after" else {}
    seeds = [(recurrence.output.xreplace(seen), sympy.Symbol("d_output", real=True), "v")]
    if recurrence.variance is not None:
        seeds.append((recurrence.variance.xreplace(seen), sympy.Symbol("d_variance", real=True), "v"))
    return pull_back(seeds, table)


def pull_update(recurrence: Recurrence) -> dict[sympy.Symbol, sympy.Expr]:
    """Cotangents that ``d_NAME`` of the states after the token send through the updates alone."""
    table = dict(recurrence.axes_table()) | {c.symbol: c.axes for c in cotangents_of(recurrence)}
    return pull_back([(s.update, sympy.Symbol(f"d_{s.name}", real=True), s.axes) for s in recurrence.states], table)


def pull_back(seeds: Sequence[tuple[sympy.Expr, sympy.Expr, Axes]], table: Table) -> dict[sympy.Symbol, sympy.Expr]:
    """Reverse mode: cotangents of all symbols, given ``(expression, its cotangent, axes of that cotangent)``.

    A root that lacks some axes of its cotangent was broadcast over them: the cotangent is contracted.
    """
    axes: dict[sympy.Expr, Axes] = {}
    order: list[sympy.Expr] = []

    def visit(node: sympy.Expr) -> None:
        if node in axes:
            return
        for a in node.args:
            visit(a)
        axes[node] = axes_of(node, table)
        order.append(node)

    flows: dict[sympy.Expr, list[sympy.Expr]] = {}
    for root, cotangent, on in seeds:
        visit(root)
        flows.setdefault(root, []).append(sum_over(cotangent, _less(on, axes[root]), table))
    gradients: dict[sympy.Symbol, sympy.Expr] = {}
    for node in reversed(order):
        arriving = flows.pop(node, None)
        if arriving is None:
            continue
        cotangent = sympy.Add(*arriving)
        if cotangent == 0 or not node.free_symbols:
            continue
        if node.is_Symbol:
            gradients[node] = cotangent
            continue
        for child, flow in _children(node, cotangent):
            if not child.free_symbols or flow == 0:
                continue
            if isinstance(node, (SumK, SumV)):
                lost = "" if CONTRACTED[type(node)] in axes[child] else CONTRACTED[type(node)]
            else:
                lost = _less(axes[node], axes[child])
            flows.setdefault(child, []).append(sum_over(flow, lost, table))
    return gradients


def sum_over(expr: sympy.Expr, over: Axes, table: Table) -> sympy.Expr:
    """Contract ``expr`` over ``over``, with factors that lack the axis pulled out of the sum."""
    for axis in over:
        if expr == 0:
            return expr
        inside: list[sympy.Expr] = []
        outside: list[sympy.Expr] = []
        for factor in sympy.Mul.make_args(expr):
            (inside if axis in axes_of(factor, table) else outside).append(factor)
        if inside:
            expr = sympy.Mul(*outside) * contract(sympy.Mul(*inside), axis)
        else:
            expr = contract(expr, axis)
    return expr


def _less(axes: Axes, other: Axes) -> Axes:
    return "".join(a for a in axes if a not in other)


def _children(node: sympy.Expr, cotangent: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """What flows to each argument of ``node``."""
    args = node.args
    if node.is_Add or isinstance(node, (SumK, SumV)):
        return [(a, cotangent) for a in args]
    if node.is_Mul:
        return [(a, cotangent * sympy.Mul(*args[:i], *args[i + 1 :])) for i, a in enumerate(args)]
    if node.is_Pow:
        base, exponent = args
        flows = [(base, cotangent * exponent * base ** (exponent - 1))]
        if exponent.free_symbols:
            flows.append((exponent, cotangent * node * sympy.log(base)))
        return flows
    if isinstance(node, sympy.exp):
        return [(args[0], cotangent * node)]
    if isinstance(node, sympy.Abs):
        return [(args[0], cotangent * sympy.sign(args[0]))]
    if isinstance(node, sympy.sign):
        return []
    if isinstance(node, (sympy.Max, sympy.Min)):
        side = 1 if isinstance(node, sympy.Max) else -1
        return [(a, cotangent * sympy.Mul(*_wins(args, i, side))) for i, a in enumerate(args)]
    if isinstance(node, sympy.Function):
        return [(a, cotangent * node.fdiff(i + 1)) for i, a in enumerate(args)]
    raise CompilerBug(f"adjoint: no derivative is known for {type(node).__name__}; report the expression {node}")


def _wins(args: Sequence[sympy.Expr], i: int, side: int) -> list[sympy.Expr]:
    """Weights of argument ``i`` of a maximum (``side`` 1) or minimum (-1): a tie of two is shared."""
    return [(1 + sympy.sign(side * (args[i] - b))) / 2 for j, b in enumerate(args) if j != i]

"""One hash for one mathematics: variants that differ in names and spelling only have the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import sympy

from dspace.math.ir import Recurrence, State, Variable
from dspace.math.proofs import canonical
from dspace.math.simplify import MAX_RATIONAL_OPS, atomise

MAX_ORDERS = 720
"""Most ways of naming that are compared; beyond, names are taken as they are given."""


def canonical_hash(recurrence: Recurrence) -> str:
    """SHA-256 of ``recurrence`` in normal coordinates, independent of the names of inputs, parameters and states.

    Equal hashes mean equal mathematics; the converse holds as far as rational simplification sees it.
    """
    axes = {x.symbol: x.axes for x in recurrence.variables} | {s.symbol: s.axes for s in recurrence.states}
    names = [e for s in recurrence.states for e in (s.init, s.update)] + [recurrence.output]
    if recurrence.variance is not None:
        names.append(recurrence.variance)
    forms = [_normal(e, axes) for e in names]
    best = min(_spelled(recurrence, forms, order) for order in _orders(recurrence))
    return hashlib.sha256(best.encode()).hexdigest()


def _normal(expr: sympy.Expr, axes: dict[sympy.Symbol, str]) -> sympy.Expr:
    expr = canonical(expr, axes)
    rational, stands = atomise(expr)
    if sympy.count_ops(rational) > MAX_RATIONAL_OPS:
        return expr
    numerator, denominator = sympy.fraction(sympy.cancel(rational))
    return (sympy.expand(numerator) / sympy.expand(denominator)).xreplace(stands)


_Order = tuple[tuple[Variable, ...], tuple[State, ...]]


def _orders(recurrence: Recurrence) -> Iterator[_Order]:
    """Orders of variables and states to try: only what looks alike (role, axes, domain) changes places."""
    used = {x for s in recurrence.states for x in (s.update.free_symbols | s.init.free_symbols)}
    used |= recurrence.output.free_symbols | (recurrence.variance.free_symbols if recurrence.variance else set())
    variables = [v for v in (*recurrence.inputs, *recurrence.parameters) if v.symbol in used]
    groups = _groups(variables, lambda v: (v.role, v.axes, v.domain))
    state_groups = _groups(list(recurrence.states), lambda s: (s.axes, s.domain))
    every = itertools.product(*(itertools.permutations(g) for g in (*groups, *state_groups)))
    count = len(groups)
    for arrangement in itertools.islice(every, MAX_ORDERS):
        yield (
            tuple(v for group in arrangement[:count] for v in group),
            tuple(s for group in arrangement[count:] for s in group),
        )


def _groups(items: Sequence, key) -> list[list]:
    ordered = sorted(items, key=lambda x: (key(x), x.name))
    return [list(group) for _, group in itertools.groupby(ordered, key)]


def _spelled(recurrence: Recurrence, forms: list[sympy.Expr], order: _Order) -> str:
    variables, states = order
    new: dict[sympy.Symbol, sympy.Symbol] = {}
    lines: list[str] = [recurrence.read]
    for i, v in enumerate(variables):
        new[v.symbol] = sympy.Symbol(f"x{i}", **v.symbol.assumptions0)
        lines.append(f"{v.role} {v.axes} {v.domain}")
    for i, s in enumerate(states):
        new[s.symbol] = sympy.Symbol(f"s{i}", **s.symbol.assumptions0)
        lines.append(f"state {s.axes}")
    for s in states:
        at = 2 * recurrence.states.index(s)
        lines += [str(forms[at].xreplace(new)), str(forms[at + 1].xreplace(new))]
    lines += [str(e.xreplace(new)) for e in forms[2 * len(states) :]]
    return "\n".join(lines)

"""Proof and refutation that a substitution turns one recurrence into another.

A claim gives each variable of A an expression in the variables of B (and in parameters of A that stay free), each
state of A a multiple of a state of B or a constant at which it stays. It is proven when every equation, the
difference of what A and B do, is identically zero as a rational expression of its atoms (exponentials, contractions,
states), after contractions are written as sums of coefficients times irreducible contractions. In a limit, a
parameter is ``1/eps`` or ``eps``; the equation must hold at ``eps = 0`` and its derivative there is the error term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import sympy

from dspace.math.ir import CONTRACTED, Axes, Recurrence, State, SumK, SumV, Variable, axes_of
from dspace.math.numeric import draw, evaluate, full
from dspace.math.simplify import atomise, is_zero

EPS = sympy.Symbol("ε", positive=True)
"""The small quantity of a limit: no spec can name a variable so."""
MAX_ORDER = 3
"""Orders of the error of a limit that are tried."""


@dataclass(frozen=True)
class Claim:
    """A substitution that is said to turn ``source`` into ``target``; see the module's words.

    ``limit`` is the parameter of the source that goes to ``"infinity"`` or ``"zero"`` (``direction``), or None.
    """

    source: Recurrence
    target: Recurrence
    variables: Mapping[sympy.Symbol, sympy.Expr]
    states: Mapping[sympy.Symbol, sympy.Expr]
    limit: sympy.Symbol | None = None
    direction: str = "infinity"


@dataclass(frozen=True)
class Equation:
    """``left == right`` is to hold: A after the substitution, and B."""

    what: str
    left: sympy.Expr
    right: sympy.Expr


@dataclass(frozen=True)
class Verdict:
    """Whether a claim is proven; if not, the equation that resists, and a point at which it fails if one is found."""

    proven: bool
    equations: tuple[Equation, ...]
    errors: Mapping[str, sympy.Expr | None] = field(default_factory=dict)
    """In a limit: for each equation that is not exact, the leading coefficient of source minus target in ``eps``
    (None where no derivative of the first :data:`MAX_ORDER` at 0 is finite and not zero)."""
    orders: Mapping[str, int | None] = field(default_factory=dict)
    """The power of ``eps`` that each of ``errors`` multiplies."""
    failing: Equation | None = None
    counterexample: Mapping[str, list] = field(default_factory=dict)


def equations(claim: Claim, *, deviating: bool = False) -> tuple[Equation, ...]:
    """What must hold for ``claim`` to be true, before any simplification.

    With ``deviating`` the source's states before the token are off by ``eps`` times anything: see :func:`prove`.
    """
    swap, states = _swaps(claim)
    exactly = dict(states)
    if deviating:
        states |= {s.symbol: _deviated(s, states[s.symbol], claim) for s in claim.source.states}
    by_symbol = {s.symbol: s for s in claim.target.states}
    found = []
    for s in claim.source.states:
        value = exactly[s.symbol]
        if value == unread(s):
            continue
        new = value.xreplace({b: t.update for b, t in by_symbol.items()})
        start = value.xreplace({b: t.init for b, t in by_symbol.items()})
        # A state that is a multiple of the target's is compared in the target's units.
        unit = _unit(value, claim)
        found.append(Equation(f"the start of {s.name}", _put(s.init, swap, states) / unit, start / unit))
        found.append(Equation(f"the update of {s.name}", _put(s.update, swap, states) / unit, new / unit))
    left, right = compared_outputs(claim.source, claim.target)
    found.append(Equation("the output", _put(left, swap, states), right))
    if (
        claim.source.variance is not None
        and claim.target.variance is not None
        and claim.source.read == claim.target.read
    ):
        found.append(Equation("the variance", _put(claim.source.variance, swap, states), claim.target.variance))
    return tuple(found)


def compared_outputs(source: Recurrence, target: Recurrence) -> tuple[sympy.Expr, sympy.Expr]:
    """Outputs of both, in the same states: where one reads before the update and the other after it, the latter's
    output is written in the states before the token."""

    def before(r: Recurrence) -> sympy.Expr:
        return r.output if r.read == "before" else r.output.xreplace({s.symbol: s.update for s in r.states})

    return (source.output, target.output) if source.read == target.read else (before(source), before(target))


def _swaps(claim: Claim) -> tuple[dict[sympy.Symbol, sympy.Expr], dict[sympy.Symbol, sympy.Expr]]:
    """What variables and states of the source become, with the limit written in ``eps``."""
    at = {} if claim.limit is None else {claim.limit: 1 / EPS if claim.direction == "infinity" else EPS}
    variables = {x: e.xreplace(at) for x, e in claim.variables.items()} | at
    return variables, {x: e.xreplace(at) for x, e in claim.states.items()}


def unread(state: State) -> sympy.Symbol:
    """Stands for a state of the source that nothing reads: it may be anything."""
    return sympy.Symbol(f"{state.name}_unread", **state.symbol.assumptions0)


def deviation(state: State) -> sympy.Symbol:
    """Stands for what a state of the source is off by, over ``eps``: in a limit states agree only nearly."""
    return sympy.Symbol(f"{state.name}_deviation", real=True)


def _unit(value: sympy.Expr, claim: Claim) -> sympy.Expr:
    """The multiple of the target's state that a state of the source is; 1 where it is a constant."""
    found = [t.symbol for t in claim.target.states if t.symbol in value.free_symbols]
    return sympy.diff(value, found[0]) if found else sympy.S.One


def _deviated(state: State, value: sympy.Expr, claim: Claim) -> sympy.Expr:
    return value if value == unread(state) else value + _unit(value, claim) * EPS * deviation(state)


def _put(expr: sympy.Expr, swap: Mapping, states: Mapping) -> sympy.Expr:
    return expr.xreplace({**swap, **states})


def prove(claim: Claim) -> Verdict:
    """Prove ``claim``, or find the equation that resists and, if possible, a point at which it is false.

    In a limit the source's states follow the target's only up to ``eps``: every equation must hold at ``eps = 0``
    however far, in units of ``eps``, they are off before the token. What is analytic in ``eps`` and vanishes with it
    is at most a multiple of ``eps``, so the states are off by as little after the token: induction over tokens.
    """
    every = equations(claim)
    table = _table(claim)
    wild = _unbounded(claim, table)
    if wild is not None:
        return Verdict(False, every, failing=wild)
    errors: dict[str, sympy.Expr | None] = {}
    orders: dict[str, int | None] = {}
    limit = claim.limit is not None
    for e, off in zip(every, equations(claim, deviating=limit), strict=True):
        difference = canonical(e.left - e.right, table)
        if limit:
            apart = canonical(off.left - off.right, table)
            at_zero = value_at_zero(apart, table)
            if at_zero is None or not is_zero(canonical(at_zero, table)):
                return Verdict(False, every, failing=off, counterexample=counterexample(claim, off))
            if not is_zero(difference):
                orders[e.what], errors[e.what] = leading(difference, table)
        elif not is_zero(difference):
            return Verdict(False, every, failing=e, counterexample=counterexample(claim, e))
    return Verdict(True, every, errors, orders)


def _unbounded(claim: Claim, table: Mapping[sympy.Symbol, Axes]) -> Equation | None:
    """In a limit, the update of an unread state that grows without bound: then it may not be left unread."""
    if claim.limit is None:
        return None
    swap, states = _swaps(claim)
    states |= {s.symbol: _deviated(s, states[s.symbol], claim) for s in claim.source.states}
    for s in claim.source.states:
        if states[s.symbol] == unread(s):
            for expr in (s.init, s.update):
                put = canonical(_put(expr, swap, states), table)
                if value_at_zero(put, table) is None:
                    return Equation(f"the size of {s.name}, which is to be ignored", put, unread(s))
    return None


def _table(claim: Claim) -> dict[sympy.Symbol, Axes]:
    # The small quantity counts as varying along every axis, so that it is never pulled out of a contraction.
    ignored = {x: s.axes for s in claim.source.states for x in (unread(s), deviation(s))}
    return {**claim.source.axes_table(), **ignored, **claim.target.axes_table(), EPS: "kv"}


def canonical(expr: sympy.Expr, table: Mapping[sympy.Symbol, Axes]) -> sympy.Expr:
    """Contractions written as sums of coefficients times contractions of products that carry the axis."""
    if not expr.args:
        return expr
    if not isinstance(expr, (SumK, SumV)):
        return expr.func(*(canonical(a, table) for a in expr.args)) if expr.has(SumK, SumV) else expr
    axis = CONTRACTED[type(expr)]
    rational, stands = atomise(canonical(expr.args[0], table))
    numerator, denominator = sympy.fraction(sympy.cancel(rational))
    outer, inner = sympy.S.One, sympy.S.One
    for factor in sympy.Mul.make_args(sympy.factor(denominator)):
        if axis in axes_of(factor.xreplace(stands), table):
            inner *= factor
        else:
            outer *= factor
    total = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(numerator)):
        outside, inside = sympy.S.One, sympy.S.One
        for factor in sympy.Mul.make_args(term):
            if axis in axes_of(factor.xreplace(stands), table):
                inside *= factor
            else:
                outside *= factor
        total += outside / outer * expr.func((inside / sympy.expand(inner)).xreplace(stands))
    return total.xreplace(stands)


def value_at_zero(expr: sympy.Expr, table: Mapping[sympy.Symbol, Axes]) -> sympy.Expr | None:
    """``expr`` at ``eps = 0`` after cancellation inside and outside contractions; None if it is not finite there."""
    if EPS not in expr.free_symbols:
        return expr
    if isinstance(expr, (SumK, SumV)):
        inside = value_at_zero(expr.args[0], table)
        return None if inside is None else expr.func(inside)
    # Contractions are atoms of a rational function, which is finite where its denominator does not vanish at the
    # values that they take: a factor that is singular may be cured by another outside contractions, never within.
    rational, stands = atomise(expr)
    if any(EPS in e.free_symbols and not isinstance(e, (SumK, SumV)) for e in stands.values()):
        return None
    numerator, denominator = sympy.fraction(sympy.cancel(rational))
    numerator, denominator = numerator.subs(EPS, 0), denominator.subs(EPS, 0)
    if denominator == 0:
        return None
    inner = {d: value_at_zero(e, table) for d, e in stands.items()}
    if any(e is None for e in inner.values()):
        return None
    if is_zero(canonical(denominator.xreplace(inner), table)):
        return None
    return (numerator / denominator).xreplace(inner)


def leading(expr: sympy.Expr, table: Mapping[sympy.Symbol, Axes]) -> tuple[int | None, sympy.Expr | None]:
    """Lowest power of ``eps`` in ``expr``, which vanishes at 0, and its coefficient; None where cancellation does not
    give it."""
    slope: sympy.Expr | None = expr
    for order in range(1, MAX_ORDER + 1):
        slope = _differentiate(slope)
        at_zero = None if slope is None else value_at_zero(canonical(slope, table), table)
        if slope is None or at_zero is None:
            return None, None
        at_zero = canonical(at_zero, table)
        if not is_zero(at_zero):
            return order, at_zero / math.factorial(order)
    return None, None


def _differentiate(expr: sympy.Expr) -> sympy.Expr | None:
    if EPS not in expr.free_symbols:
        return sympy.S.Zero
    sums = {c: sympy.Dummy(real=True) for c in expr.atoms(SumK, SumV) if EPS in c.free_symbols}
    outermost = {c: d for c, d in sums.items() if not any(c != o and o.has(c) for o in sums)}
    body = expr.xreplace(outermost)
    back = {d: c for c, d in outermost.items()}
    total = sympy.diff(body, EPS)
    for c, d in outermost.items():
        inner = _differentiate(c.args[0])
        if inner is None:
            return None
        total += sympy.diff(body, d) * c.func(inner)
    return total.xreplace(back)


def counterexample(claim: Claim, equation: Equation, tries: int = 4) -> dict[str, list]:
    """Values at which ``equation`` fails numerically, and both sides of it; empty if none was found."""
    rng = np.random.default_rng(0)
    known: dict[sympy.Symbol, Variable | State] = {v.symbol: v for v in claim.source.variables}
    known |= {x: s for s in claim.source.states for x in (unread(s), deviation(s))}
    known |= {v.symbol: v for v in claim.target.variables} | {s.symbol: s for s in claim.target.states}
    symbols = sorted(equation.left.free_symbols | equation.right.free_symbols, key=str)
    for _ in range(tries):
        values = {x: np.full((1, 1), 1e-6) if x == EPS else draw(known[x], rng) for x in symbols}
        values = {x: v if x == EPS else full(v, known[x].axes) for x, v in values.items()}
        left, right = evaluate(equation.left, values), evaluate(equation.right, values)
        gap = np.abs(left - right)
        if np.isfinite(gap).all() and gap.max() > 1e-3 * (1 + np.abs(right).max()):
            point = {str(x): v.squeeze().tolist() for x, v in values.items()}
            return point | {"source": left.squeeze().tolist(), "target": right.squeeze().tolist()}
    return {}

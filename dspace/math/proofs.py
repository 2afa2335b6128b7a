"""Proof and refutation that a substitution turns one recurrence into another.

A claim gives each variable of A an expression in the variables of B (and in parameters of A that stay free), each
state of A a multiple of a state of B or a constant at which it stays. It is proven when every equation, the
difference of what A and B do, is identically zero as a rational expression of its atoms (exponentials, contractions,
states), after contractions are written as sums of coefficients times irreducible contractions. In a limit, a
parameter is ``1/eps`` or ``eps``; the equation must hold at ``eps = 0`` and its derivative there is the error term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import sympy

from dspace.math.ir import CONTRACTED, Axes, Recurrence, State, SumK, SumV, Variable, axes_of
from dspace.math.numeric import draw, evaluate, full
from dspace.math.simplify import atomise, is_zero

EPS = sympy.Symbol("eps", positive=True)
"""The small quantity of a limit."""


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
    """In a limit: for each equation that is not exact, the coefficient of ``eps`` in source minus target (None where
    the derivative at 0 is not finite)."""
    failing: Equation | None = None
    counterexample: Mapping[str, list] = field(default_factory=dict)


def equations(claim: Claim) -> tuple[Equation, ...]:
    """What must hold for ``claim`` to be true, before any simplification."""
    swap, states = _swaps(claim)
    by_symbol = {s.symbol: s for s in claim.target.states}
    found = []
    for s in claim.source.states:
        value = states[s.symbol]
        if value == unread(s):
            continue
        new = value.xreplace({b: t.update for b, t in by_symbol.items()})
        start = value.xreplace({b: t.init for b, t in by_symbol.items()})
        # A state that is a multiple of the target's is compared in the target's units.
        unit = next((value / b for b in by_symbol if b in value.free_symbols), sympy.S.One)
        found.append(Equation(f"the start of {s.name}", _put(s.init, swap, states) / unit, start / unit))
        found.append(Equation(f"the update of {s.name}", _put(s.update, swap, states) / unit, new / unit))
    found.append(Equation("the output", _put(claim.source.output, swap, states), claim.target.output))
    if claim.source.variance is not None and claim.target.variance is not None:
        found.append(Equation("the variance", _put(claim.source.variance, swap, states), claim.target.variance))
    return tuple(found)


def _swaps(claim: Claim) -> tuple[dict[sympy.Symbol, sympy.Expr], dict[sympy.Symbol, sympy.Expr]]:
    """What variables and states of the source become, with the limit written in ``eps``."""
    at = {} if claim.limit is None else {claim.limit: 1 / EPS if claim.direction == "infinity" else EPS}
    variables = {x: e.xreplace(at) for x, e in claim.variables.items()} | at
    return variables, {x: e.xreplace(at) for x, e in claim.states.items()}


def unread(state: State) -> sympy.Symbol:
    """Stands for a state of the source that nothing reads: it may be anything."""
    return sympy.Symbol(f"{state.name}_unread", **state.symbol.assumptions0)


def _put(expr: sympy.Expr, swap: Mapping, states: Mapping) -> sympy.Expr:
    return expr.xreplace({**swap, **states})


def prove(claim: Claim) -> Verdict:
    """Prove ``claim``, or find the equation that resists and, if possible, a point at which it is false."""
    every = equations(claim)
    if claim.source.read != claim.target.read:
        reading = Equation("the time of reading", sympy.Symbol(claim.source.read), sympy.Symbol(claim.target.read))
        return Verdict(False, every, failing=reading)
    table = _table(claim)
    wild = _unbounded(claim, table)
    if wild is not None:
        return Verdict(False, every, failing=wild)
    errors: dict[str, sympy.Expr | None] = {}
    for e in every:
        difference = canonical(e.left - e.right, table)
        if claim.limit is not None:
            at_zero = value_at_zero(difference, table)
            if at_zero is None or not is_zero(canonical(at_zero, table)):
                return Verdict(False, every, failing=e, counterexample=counterexample(claim, e))
            if not is_zero(difference):
                errors[e.what] = first_order(difference, table)
        elif not is_zero(difference):
            return Verdict(False, every, failing=e, counterexample=counterexample(claim, e))
    return Verdict(True, every, errors)


def _unbounded(claim: Claim, table: Mapping[sympy.Symbol, Axes]) -> Equation | None:
    """In a limit, the update of an unread state that grows without bound: then it may not be left unread."""
    if claim.limit is None:
        return None
    swap, states = _swaps(claim)
    for s in claim.source.states:
        if states[s.symbol] == unread(s):
            for expr in (s.init, s.update):
                put = canonical(_put(expr, swap, states), table)
                if value_at_zero(put, table) is None:
                    return Equation(f"the size of {s.name}, which is to be ignored", put, unread(s))
    return None


def _table(claim: Claim) -> dict[sympy.Symbol, Axes]:
    # The small quantity counts as varying along every axis, so that it is never pulled out of a contraction.
    ignored = {unread(s): s.axes for s in claim.source.states}
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
    small = [c for c in expr.atoms(SumK, SumV) if EPS in c.free_symbols]
    if small and expr.is_Add:
        parts = [value_at_zero(a, table) for a in expr.args]
        return None if any(p is None for p in parts) else sympy.Add(*parts)
    if small and expr.is_Mul:
        # A factor that is singular may be cured by another outside contractions, never by one inside.
        sums = [a for a in expr.args if any(a.has(c) for c in small)]
        rest = value_at_zero(sympy.Mul(*(a for a in expr.args if a not in sums)), table)
        parts = [value_at_zero(a, table) for a in sums]
        return None if rest is None or any(p is None for p in parts) else sympy.Mul(rest, *parts)
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
    return (numerator / denominator).xreplace(inner)


def first_order(expr: sympy.Expr, table: Mapping[sympy.Symbol, Axes]) -> sympy.Expr | None:
    """Coefficient of ``eps`` in ``expr``; None where it cannot be had by cancellation."""
    slope = _differentiate(expr)
    return None if slope is None else value_at_zero(canonical(slope, table), table)


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
    known |= {unread(s): s for s in claim.source.states}
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

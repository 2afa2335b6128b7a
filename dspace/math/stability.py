"""When forgetting dominates: the importance that a posterior settles at, and what it does to the readout.

For a precision-like state (affine, nonnegative, dividing in the readout) with decay ``a`` and mean write ``phi``,
the stationary value is ``phi / (1 - a) = N phi`` with the memory horizon ``N = 1 / (1 - a)``. Where it is small beside
the prior, the divisor is the prior and the variant behaves like its twin without that state; the first correction
to the readout is ``-state / prior``, relatively.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dspace.math.ir import AffineState, Analysis, Recurrence, axes_of, contractions_in
from dspace.math.printing import text_of

HORIZON = sympy.Symbol("N", positive=True)
"""Memory horizon in tokens, ``1 / (1 - decay)``."""
PHI = sympy.Symbol("phi", nonnegative=True)
"""Mean of what one token writes to the state."""


@dataclass(frozen=True)
class Stationary:
    """A state ``x`` that divides as ``x + prior``: where it settles, and what that does.

    ``stationary`` is the fixed point of ``x`` for the mean write ``phi``; ``ratio`` is it over the prior: forgetting
    dominates where it is far below 1. ``write`` is what one token adds, whose mean is ``phi``.
    """

    state: str
    divisor: sympy.Expr
    prior: sympy.Expr
    decay: sympy.Expr
    write: sympy.Expr
    stationary: sympy.Expr
    ratio: sympy.Expr
    first_correction: sympy.Expr
    """First relative change of ``1 / divisor`` from its value at ``x = 0``."""


def stationary(analysis: Analysis) -> tuple[Stationary, ...]:
    """Every state that divides in the readout beside a prior; empty where there is none or it never forgets."""
    affine = analysis.classification.affine
    if affine is None:
        return ()
    found = []
    for a in affine:
        divisor = _divisor(analysis.recurrence, a)
        if divisor is not None and a.decay != 1:
            found.append(_settle(analysis.recurrence, a, divisor))
    return tuple(found)


def _settle(r: Recurrence, a: AffineState, divisor: sympy.Expr) -> Stationary:
    x = next(s.symbol for s in r.states if s.name == a.name)
    prior = divisor.xreplace({x: sympy.S.Zero})
    slope = sympy.diff(divisor, x)
    at = HORIZON * PHI
    write = sympy.Add(*(w.key * w.value for w in a.writes))
    return Stationary(
        a.name, divisor, prior, a.decay, write, at, sympy.simplify(slope * at / prior), -slope * x / prior
    )


def _divisor(r: Recurrence, a: AffineState) -> sympy.Expr | None:
    """The divisor of the readout that is affine in state ``a`` alone and not zero where the state is."""
    x = next(s.symbol for s in r.states if s.name == a.name)
    others = {s.symbol for s in r.states} - {x}
    for p in sorted(r.output.atoms(sympy.Pow), key=str):
        base = p.base
        if not p.exp.is_negative or x not in base.free_symbols or base.free_symbols & others:
            continue
        if contractions_in(base) or sympy.diff(base, x, 2) != 0:
            continue
        if base.xreplace({x: sympy.S.Zero}).is_positive:
            return base
    return None


def sentences(analysis: Analysis) -> tuple[str, ...]:
    """:func:`stationary` in words, for :mod:`dspace.math.show`."""
    lines = []
    for s in stationary(analysis):
        table = analysis.recurrence.axes_table()
        axes = axes_of(s.decay, table)
        where = {"": "", "k": ", for each key channel", "v": ", for each value channel"}.get(axes, ", elementwise")
        lines += [
            f"memory horizon N = 1/(1 - {text_of(s.decay)}) tokens{where}; φ = mean of {text_of(s.write)}",
            f"{s.state} settles at N·φ, so the divisor settles at {text_of(s.prior)} + N·φ",
            f"forgetting dominates where N·φ ≪ {text_of(s.prior)}: then the readout is that of the twin without "
            f"{s.state}, with {text_of(s.prior)} as its divisor",
            f"first correction, relative: {text_of(s.first_correction)}",
        ]
    return tuple(lines)

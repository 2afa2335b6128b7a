"""When forgetting dominates: the importance that a posterior settles at, and what it does to the readout.

For a precision-like state (affine, nonnegative, dividing in the readout) with decay ``a`` and mean write ``phi``,
the stationary value is ``phi / (1 - a) = N phi`` with the memory horizon ``N = 1 / (1 - a)``. Where it is small beside
the prior, the divisor is the prior and the variant behaves like its twin without that state; the first correction
to the readout is ``-state / prior``, relatively.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from dspace.math.affinity import coefficients
from dspace.math.ir import Analysis, Recurrence, State, axes_of, contractions_in
from dspace.math.printing import text_of
from dspace.math.simplify import simplify

HORIZON = sympy.Symbol("N", positive=True)
"""Memory horizon in tokens, ``1 / (1 - decay)``."""
PHI = sympy.Symbol("phi", nonnegative=True)
"""Mean of what one token writes to the state."""


@dataclass(frozen=True)
class Stationary:
    """A state ``x`` that divides as ``x + prior``: where it settles, and what that does.

    ``stationary`` is the fixed point of ``x`` for the mean write ``phi`` (None where it never forgets and grows for
    ever); ``ratio`` is it over the prior: forgetting dominates where it is far below 1 (None where there is no such
    limit: nothing settles, or the prior is forgotten too). ``write`` is what one token adds, whose mean is ``phi``.
    """

    state: str
    divisor: sympy.Expr
    prior: sympy.Expr
    decay: sympy.Expr
    write: sympy.Expr
    stationary: sympy.Expr | None
    ratio: sympy.Expr | None
    first_correction: sympy.Expr | None
    """First relative change of ``1 / divisor`` from its value at ``x = 0``."""
    place: str = "readout"
    """What it divides: the readout, or the write of a state by its name."""


def stationary(analysis: Analysis) -> tuple[Stationary, ...]:
    """Every state that divides in the readout, or in what another state writes; empty where there is none."""
    r = analysis.recurrence
    symbols = [s.symbol for s in r.states]
    found = []
    for s in r.states:
        form = coefficients(s.update, symbols)
        if form is None or set(form[0]) - {s.symbol}:
            continue
        decay = form[0].get(s.symbol, sympy.S.Zero)
        for divisor, place in _divisors(r, s):
            found.append(_settle(s, decay, form[1], divisor, place))
            break
    return tuple(found)


def _settle(s: State, decay: sympy.Expr, write: sympy.Expr, divisor: sympy.Expr, place: str) -> Stationary:
    x = s.symbol
    prior = divisor.xreplace({x: sympy.S.Zero})
    slope = sympy.diff(divisor, x)
    at = None if decay == 1 else HORIZON * PHI
    ratio = None if at is None or prior == 0 else sympy.simplify(slope * at / prior)
    correction = None if prior == 0 else -slope * x / prior
    return Stationary(s.name, divisor, prior, decay, write, at, ratio, correction, place)


def _divisors(r: Recurrence, s: State) -> Iterator[tuple[sympy.Expr, str]]:
    """Divisors that are affine in ``s`` alone, with what they divide; those of updates in terms of its new value."""
    x = s.symbol
    for base in _bases(r.output, r, s):
        rest = base.xreplace({x: sympy.S.Zero})
        if rest.is_positive or (rest == 0 and s.domain == "positive"):
            yield base, "readout"
    for other in r.states:
        if other is s:
            continue
        for base in _bases(other.update, r, s):
            rest = simplify(base - s.update, r.axes_table())
            if x not in rest.free_symbols and (rest.is_positive or (rest == 0 and s.domain == "positive")):
                yield x + rest, other.name


def _bases(expr: sympy.Expr, r: Recurrence, s: State) -> Iterator[sympy.Expr]:
    x = s.symbol
    others = {t.symbol for t in r.states} - {x}
    for p in sorted(expr.atoms(sympy.Pow), key=str):
        base = p.base
        if p.exp.is_negative and x in base.free_symbols and not base.free_symbols & others:
            if not contractions_in(base) and sympy.diff(base, x, 2) == 0:
                yield base


def sentences(analysis: Analysis) -> tuple[str, ...]:
    """:func:`stationary` in words, for :mod:`dspace.math.show`."""
    lines: list[str] = []
    for s in stationary(analysis):
        axes = axes_of(s.decay, analysis.recurrence.axes_table())
        where = {"": "", "k": ", for each key channel", "v": ", for each value channel"}.get(axes, ", elementwise")
        reads = "readout" if s.place == "readout" else f"write to {s.place}"
        phi = f"φ = mean of {text_of(s.write)}"
        if s.stationary is None:
            lines.append(f"{s.state} never forgets: it grows by φ a token, without end; {phi}")
            if s.ratio is None and s.prior != 0:
                lines.append(
                    f"after t tokens with t·φ ≪ {text_of(s.prior)} the {reads} is still that of the twin without "
                    f"{s.state}; first correction, relative: {text_of(s.first_correction)}"
                )
            continue
        lines.append(f"memory horizon N = 1/(1 - {text_of(s.decay)}) tokens{where}; {phi}")
        if s.prior == 0:
            lines += [
                f"{s.state}, the divisor of the {reads}, settles at N·φ: the prior is forgotten with the past",
                "so there is no limit in which forgetting dominates: the scale of φ only rescales what is read",
            ]
            continue
        condition = f"N·φ ≪ {text_of(s.prior)}"
        lines += [
            f"{s.state} settles at N·φ, so the divisor settles at {text_of(s.prior)} + N·φ",
            f"forgetting dominates where {condition}{_for_unit_keys(s, analysis.recurrence)}: then the {reads} is "
            f"that of the twin without {s.state}, with {text_of(s.prior)} as its divisor",
            f"first correction, relative: {text_of(s.first_correction)}",
        ]
    return tuple(lines)


def _for_unit_keys(s: Stationary, r: Recurrence) -> str:
    """The condition in the gain, where a token writes a gain times the square of a key: of norm 1 it has mean 1/K."""
    for v in r.inputs:
        gain = sympy.cancel(s.write / v.symbol**2)
        if v.axes == "k" and not gain.free_symbols & {w.symbol for w in r.inputs if "k" in w.axes}:
            gain_text = text_of(gain) if gain.is_Symbol else f"({text_of(gain)})"
            return f" (for keys of norm 1: N·{gain_text} ≪ K·{text_of(s.prior)})"
    return ""

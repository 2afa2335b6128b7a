"""What may go wrong in floating point, from the declared domains: overflow, division by zero, undefined logarithms."""

from __future__ import annotations

import numpy as np
import sympy

from dspace.math.intervals import domains_of, excludes_zero, interval, is_positive
from dspace.math.ir import Recurrence, State, SumK, SumV, Variable
from dspace.math.numeric import draw, evaluate, full

DRAWS = 32
"""Points at which a decay without a known bound is looked at, of each of two sizes."""

EXP_LIMIT = 88.0
"""exp(x) leaves float32 beyond this."""


def ranges(recurrence: Recurrence) -> tuple[str, ...]:
    """Sentences, each naming a hazard with its cure, or a property that was proven; empty if nothing is to be said."""
    return tuple(dict.fromkeys([*_hazards(recurrence), *_growth(recurrence)]))


def _expressions(recurrence: Recurrence) -> list[tuple[str, sympy.Expr]]:
    named = [(f"the update of {s.name}", s.update) for s in recurrence.states]
    named += [(f"the start of {s.name}", s.init) for s in recurrence.states]
    named.append(("the output", recurrence.output))
    if recurrence.variance is not None:
        named.append(("the variance", recurrence.variance))
    return named


def _hazards(recurrence: Recurrence) -> list[str]:
    domains = domains_of(recurrence)
    found = []
    for place, expr in _expressions(recurrence):
        for e in sorted(expr.atoms(sympy.exp), key=str):
            if interval(e.args[0], domains).high > EXP_LIMIT:
                found.append(
                    f"{e} in {place} may overflow: its exponent has no upper bound"
                    f"; cure: declare {_names(e.args[0])} nonpositive where it is a log retention, or bound it"
                )
        for p in sorted(expr.atoms(sympy.Pow), key=str):
            if p.exp.is_negative and not excludes_zero(p.base, domains):
                found.append(
                    f"the division by {p.base} in {place} may be by zero"
                    f"; cure: keep it away from zero, for example with a positive prior precision or maximum({p.base}, 1)"
                )
            elif not p.exp.is_Integer and p.exp.is_Rational and interval(p.base, domains).low < 0:
                found.append(f"the root of {p.base} in {place} may be of a negative number; cure: declare its sign")
        for e in sorted(expr.atoms(sympy.log), key=str):
            if not is_positive(e.args[0], domains):
                found.append(
                    f"{e} in {place} may be the logarithm of zero or less; cure: declare {_names(e.args[0])} positive"
                )
    return found


def grows(recurrence: Recurrence) -> bool:
    """Whether an elementwise decay exceeds 1 somewhere: not only no bound is known, as for ``g / (g + h)``."""
    rng = np.random.default_rng(0)
    drawn: tuple[Variable | State, ...] = (*recurrence.variables, *recurrence.states)
    for _, decay in _unbounded(recurrence):
        for scale in (1.0, 30.0) * DRAWS:
            point = {v.symbol: full(draw(v, rng) * (1.0 if v.domain == "unit" else scale), v.axes) for v in drawn}
            with np.errstate(all="ignore"):
                if bool((np.abs(evaluate(decay, point)) > 1 + 1e-9).any()):
                    return True
    return False


def _unbounded(recurrence: Recurrence) -> tuple[tuple[State, sympy.Expr], ...]:
    """States with an elementwise decay that may leave [-1, 1] as far as its intervals say, and that decay."""
    domains = domains_of(recurrence)
    found = []
    for s in recurrence.states:
        if any(s.symbol in c.free_symbols for c in s.update.atoms(SumK, SumV)):
            continue
        decay = sympy.diff(s.update, s.symbol)
        if s.symbol in decay.free_symbols:
            continue
        bounds = interval(decay, domains)
        if bounds.high > 1 or bounds.low < -1:
            found.append((s, decay))
    return tuple(found)


def _growth(recurrence: Recurrence) -> list[str]:
    """A state that grows is a hazard over long sequences, and has no chunk form on a GPU."""
    return [
        f"the decay {decay} of {s.name} may exceed 1 in size: the state may grow without bound, and a GPU may have to"
        f" take one token after the other; cure: bound {_names(decay)} by its domain (unit, or nonpositive under exp)"
        for s, decay in _unbounded(recurrence)
    ]


def _names(expr: sympy.Expr) -> str:
    return ", ".join(sorted(s.name for s in expr.free_symbols)) or str(expr)


def safe_for_log(recurrence: Recurrence, decay: sympy.Expr) -> bool:
    """Whether ``decay`` is provably positive, so that plans may work with its logarithm."""
    return is_positive(decay, domains_of(recurrence))

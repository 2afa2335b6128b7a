"""Search for values within the declared domains for which a formula leaves an interval it must stay in."""

from __future__ import annotations

import itertools
import math

import sympy

from dspace.math.ir import DOMAINS
from dspace.spec.expressions import constant_value
from dspace.spec.model import Spec

_SAMPLES = (1.0, -1.0, 0.0, 2.0, -2.0, 0.3, -0.3, 1e-3, -1e-3, 0.9, 1.5, 30.0, -30.0, 1000.0, -1000.0)
_MOST = 4_000


def counterexample(expr: sympy.Expr, spec: Spec, low: float, high: float, open_low: bool = False) -> str | None:
    """An example such as ``-1 at b = -1`` of a value outside of the interval, or None.

    None means that the formula is known or appears to stay inside: signs that SymPy can prove settle the
    matter, else corner values of the declared domains are tried (axes of size 1).
    """
    below = expr.is_positive if open_low else expr.is_nonnegative
    if below and high == math.inf:
        return None
    names = sorted(s.name for s in expr.free_symbols)
    tried = 0
    for values in itertools.islice(itertools.product(*(_samples(spec, n) for n in names)), _MOST):
        point = dict(zip(names, values, strict=True))
        try:
            value = constant_value(expr, point)
        except (OverflowError, ValueError, ZeroDivisionError):
            continue
        tried += 1
        slack = 1e-9 * max(1.0, *(abs(v) for v in values)) if values else 0.0
        if value < low - slack or value > high + slack or (open_low and value == low and _exact_zero(expr, point)):
            where = ", ".join(f"{n} = {v:g}" for n, v in point.items())
            return f"{value:.4g}" + (f" at {where}" if where else "")
    return None


def _exact_zero(expr: sympy.Expr, point: dict[str, float]) -> bool:
    """A float may underflow to zero where the value is positive: then no argument is a true zero."""
    return not expr.free_symbols or any(v == 0 for v in point.values()) or not any(abs(v) > 20 for v in point.values())


def _samples(spec: Spec, name: str) -> list[float]:
    domain = DOMAINS[spec.variables[name].domain]
    inside = []
    for value in _SAMPLES:
        low = value > domain.low or (value == domain.low and not domain.open_low)
        high = value < domain.high or (value == domain.high and not domain.open_high)
        if low and high:
            inside.append(value)
    return inside

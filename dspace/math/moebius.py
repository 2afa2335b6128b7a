"""Test for a Moebius (fractional linear) map, which composes by 2x2 matrices."""

from __future__ import annotations

import numpy as np
import sympy

from dspace.math import numeric
from dspace.math.simplify import atomise, fraction, is_zero


def moebius_matrix(update: sympy.Expr, state: sympy.Symbol) -> sympy.Matrix | None:
    """``[[A, B], [C, D]]`` with ``update = (A x + B) / (C x + D)`` up to a common factor; None if there is none."""
    numerator, denominator = fraction(update)
    rows = []
    for part in (numerator, denominator):
        rational, stands = atomise(part)
        if any(state in e.free_symbols for e in stands.values()):
            return None
        poly = sympy.Poly(rational, state)
        if poly.degree() > 1:
            return None
        rows.append([poly.coeff_monomial(state).xreplace(stands), poly.coeff_monomial(1).xreplace(stands)])
    return sympy.Matrix(rows)


def is_moebius(update: sympy.Expr, state: sympy.Symbol) -> bool:
    """Whether ``update`` is a Moebius map of ``state``: as a fraction, or, if that is hidden, by its Schwarzian."""
    if moebius_matrix(update, state) is not None:
        return True
    if (
        not keeps_cross_ratios(update, state)
        or sympy.count_ops(update) > 60
        or update.has(sympy.Abs, sympy.Max, sympy.Min, sympy.sign)
    ):
        return False
    first = sympy.diff(update, state)
    second = sympy.diff(first, state)
    third = sympy.diff(second, state)
    return is_zero(third * first - sympy.Rational(3, 2) * second**2) and not is_zero(first)


def keeps_cross_ratios(update: sympy.Expr, state: sympy.Symbol) -> bool:
    """Whether ``update``, at random values of all else, keeps the cross ratio of four states, as a Moebius map must.

    It refutes and never proves; where numbers overflow it says True.
    """
    rng = np.random.default_rng(0)
    values = {x: rng.uniform(0.3, 0.9, size=(1, 1)) for x in sorted(update.free_symbols, key=lambda x: x.name)}
    points = np.array([0.35, 0.5, 0.7, 0.95])
    a, b, c, d = np.broadcast_to(numeric.evaluate(update, values | {state: points.reshape(4, 1, 1)}), (4, 1, 1)).ravel()
    p, q, r, s = points
    # (a - c)(b - d) / ((b - c)(a - d)) without the division: a map may be nearly constant here.
    left, right = (a - c) * (b - d) * (q - r) * (p - s), (b - c) * (a - d) * (p - r) * (q - s)
    size = max(abs(left), abs(right), 1e-12 * max(abs(a), abs(b), abs(c), abs(d)) ** 2)
    return not np.isfinite(size) or bool(abs(left - right) <= 1e-5 * size)

"""Test for a Moebius (fractional linear) map, which composes by 2x2 matrices."""

from __future__ import annotations

import sympy

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
    if sympy.count_ops(update) > 60 or update.has(sympy.Abs, sympy.Max, sympy.Min, sympy.sign):
        return False
    first = sympy.diff(update, state)
    second = sympy.diff(first, state)
    third = sympy.diff(second, state)
    return is_zero(third * first - sympy.Rational(3, 2) * second**2) and not is_zero(first)

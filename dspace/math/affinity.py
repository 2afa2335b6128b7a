"""Degree of an expression in the states, and the coefficients of one that is affine in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy

from dspace.math.ir import SumK, SumV
from dspace.math.simplify import fraction

NOT_POLYNOMIAL = math.inf


def degree(expr: sympy.Expr, states: frozenset[sympy.Symbol]) -> float:
    """Total degree of ``expr`` in ``states`` as it is written; infinite where it is no polynomial.

    Contractions are linear. Cancellation is not attempted: see :func:`affine_form`.
    """
    if expr.is_Symbol:
        return 1 if expr in states else 0
    if not expr.args or not (expr.free_symbols & states):
        return 0
    if expr.is_Add:
        return max(degree(a, states) for a in expr.args)
    if expr.is_Mul:
        return sum(degree(a, states) for a in expr.args)
    if isinstance(expr, (SumK, SumV)):
        return degree(expr.args[0], states)
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        return degree(expr.base, states) * int(expr.exp)
    return NOT_POLYNOMIAL


def affine_form(expr: sympy.Expr, states: Sequence[sympy.Symbol]) -> sympy.Expr | None:
    """``expr`` written as a polynomial of degree at most 1 in ``states``, or None if it is not affine in them."""
    known = frozenset(states)
    if degree(expr, known) <= 1:
        return expr
    if expr.has(SumK, SumV):
        expr = expr.replace(lambda e: isinstance(e, (SumK, SumV)), lambda e: e.func(sympy.expand(e.args[0])))
    numerator, denominator = fraction(expr)
    if denominator.free_symbols & known:
        return None
    quotient = sympy.expand(numerator) / denominator
    return quotient if degree(sympy.expand(quotient), known) <= 1 else None


def coefficients(
    expr: sympy.Expr, states: Sequence[sympy.Symbol]
) -> tuple[dict[sympy.Symbol, sympy.Expr], sympy.Expr] | None:
    """Elementwise coefficients of ``expr`` in each state, and the rest; None if not affine and elementwise.

    ``expr == sum_s coefficient[s] * s + rest`` with coefficients and rest free of states.
    """
    known = frozenset(states)
    if any(c.free_symbols & known for c in expr.atoms(SumK, SumV)):
        return None
    form = affine_form(expr, states)
    if form is None:
        return None
    zero = {s: sympy.S.Zero for s in states}
    rest = form.xreplace(zero)
    linear = {}
    for s in states:
        if s in form.free_symbols:
            coefficient = sympy.diff(form, s)
            if coefficient.free_symbols & known:
                return None
            linear[s] = coefficient
    return linear, rest

"""Cheap simplifications that always end: a result is taken only where it has fewer operations.

Rational simplification works on atoms: every maximal sub-expression that is not rational (an exponential, a
contraction, ...) is a generator, simplified inside first. Powers of exponentials of one argument share a generator.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from dspace.math.gradients import sum_over
from dspace.math.ir import CONTRACTED, Axes, Recurrence, State, SumK, SumV

Table = dict[sympy.Symbol, Axes]

MAX_RATIONAL_OPS = 400
"""Beyond this size an expression is left as it is: cancellation could take long."""


def atomise(expr: sympy.Expr) -> tuple[sympy.Expr, dict[sympy.Symbol, sympy.Expr]]:
    """``expr`` as a rational expression in dummies, and what each dummy stands for."""
    stands: dict[sympy.Expr, sympy.Symbol] = {}

    def walk(e: sympy.Expr) -> sympy.Expr:
        if e.is_Symbol or e.is_Rational:
            return e
        if e.is_Add or e.is_Mul:
            return e.func(*(walk(a) for a in e.args))
        if e.is_Pow and e.exp.is_Rational:
            base = walk(e.base)
            if e.exp.is_Integer:
                return base**e.exp
            root = atom(base_root(e))
            return root**e.exp.p
        if isinstance(e, sympy.exp):
            number, rest = e.args[0].as_coeff_Mul()
            if number.is_Integer and number != 1:
                return atom(sympy.exp(rest)) ** number
        return atom(e)

    def base_root(e: sympy.Expr) -> sympy.Expr:
        return sympy.Pow(e.base, sympy.Rational(1, e.exp.q))

    def atom(e: sympy.Expr) -> sympy.Symbol:
        if e not in stands:
            stands[e] = sympy.Dummy(f"x{len(stands)}", **{k: v for k, v in _assumptions(e).items()})
        return stands[e]

    rational = walk(expr)
    return rational, {d: e for e, d in stands.items()}


def _assumptions(e: sympy.Expr) -> dict[str, bool]:
    known = {"real": True}
    if e.is_positive:
        known["positive"] = True
    elif e.is_nonnegative:
        known["nonnegative"] = True
    return known


def is_zero(expr: sympy.Expr) -> bool:
    """Whether ``expr`` is identically zero as a rational expression of its atoms (sound, not complete)."""
    if expr == 0:
        return True
    rational, _ = atomise(expr)
    numerator, _ = sympy.fraction(sympy.together(rational))
    return sympy.expand(numerator) == 0


def fraction(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Numerator and denominator of ``expr`` after cancellation, both polynomial in the atoms."""
    rational, stands = atomise(expr)
    if sympy.count_ops(rational) > MAX_RATIONAL_OPS:
        return expr, sympy.S.One
    numerator, denominator = sympy.fraction(sympy.cancel(rational))
    return numerator.xreplace(stands), denominator.xreplace(stands)


def simplify(expr: sympy.Expr, table: Table) -> sympy.Expr:
    """The smallest of a few equal forms of ``expr``; contractions are simplified inside and their factors pulled out."""
    expr = _inside(expr, table)
    if sympy.count_ops(expr) > MAX_RATIONAL_OPS:
        return expr
    rational, stands = atomise(expr)
    best, size = expr, _size(expr)
    for form in _forms(rational):
        candidate = form.xreplace(stands)
        if _size(candidate) < size:
            best, size = candidate, _size(candidate)
    return best


def _forms(rational: sympy.Expr) -> Iterable[sympy.Expr]:
    yield sympy.factor_terms(rational)
    if any(p.exp.is_negative for p in rational.atoms(sympy.Pow)):
        together = sympy.together(rational)
        yield together
        yield sympy.cancel(together)
    yield sympy.expand(rational)


def _size(expr: sympy.Expr) -> tuple[int, int]:
    """Operations, and the number of divisions among them to break ties (a division costs more)."""
    divisions = sum(1 for p in expr.atoms(sympy.Pow) if p.exp.is_negative)
    return int(sympy.count_ops(expr)) + 3 * divisions, divisions


def _inside(expr: sympy.Expr, table: Table) -> sympy.Expr:
    if not expr.args:
        return expr
    if isinstance(expr, (SumK, SumV)):
        body = simplify(expr.args[0], table)
        return sum_over(body, CONTRACTED[type(expr)], table)
    return expr.func(*(_inside(a, table) for a in expr.args)) if expr.has(SumK, SumV) else expr


def simplify_recurrence(recurrence: Recurrence) -> Recurrence:
    """All updates and readouts of ``recurrence`` simplified."""
    table = recurrence.axes_table()
    return recurrence.replace(
        states=tuple(
            State(s.name, s.axes, simplify(s.init, table), simplify(s.update, table), s.domain, s.doc)
            for s in recurrence.states
        ),
        output=simplify(recurrence.output, table),
        variance=None if recurrence.variance is None else simplify(recurrence.variance, table),
    )


def count_ops(recurrence: Recurrence) -> int:
    """Operations of all updates and readouts."""
    exprs = [*(s.update for s in recurrence.states), recurrence.output]
    if recurrence.variance is not None:
        exprs.append(recurrence.variance)
    return int(sum(sympy.count_ops(e) for e in exprs))

"""Splitting expressions by the axes of their factors."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from dspace.math.ir import AffineState, Axes, SumK, SumV, Write, axes_of
from dspace.math.simplify import atomise

Table = Mapping[sympy.Symbol, Axes]

MAX_TERMS = 8
"""More separable terms than this are not worth a matmul each."""


def factors(expr: sympy.Expr, table: Table) -> dict[Axes, sympy.Expr]:
    """Product of the factors of ``expr`` on each set of axes, keyed ``""``, ``"k"``, ``"v"``, ``"kv"``.

    Powers of products and exponentials of sums are split where their parts lie on different axes.
    """
    parts: dict[Axes, list[sympy.Expr]] = {"": [], "k": [], "v": [], "kv": []}
    for factor in sympy.Mul.make_args(_split_powers(expr, table)):
        parts[axes_of(factor, table)].append(factor)
    return {a: sympy.Mul(*p) for a, p in parts.items()}


def _split_powers(expr: sympy.Expr, table: Table) -> sympy.Expr:
    pieces = []
    for factor in sympy.Mul.make_args(expr):
        if axes_of(factor, table) == "kv":
            if isinstance(factor, sympy.exp):
                factor = sympy.Mul(*(sympy.exp(t) for t in sympy.Add.make_args(sympy.expand(factor.args[0]))))
            elif factor.is_Pow or factor.is_Add:
                factor = sympy.factor_terms(factor) if factor.is_Add else sympy.expand_power_base(factor)
                if factor.is_Add:
                    factor = factored(factor)
        pieces.append(factor)
    return sympy.Mul(*pieces)


def factored(expr: sympy.Expr) -> sympy.Expr:
    """``expr`` factored over its atoms, so that ``b*k + b`` is ``b*(k + 1)``; unchanged if it is large."""
    rational, stands = atomise(expr)
    if sympy.count_ops(rational) > 60:
        return expr
    return sympy.factor(rational).xreplace(stands)


def writes(expr: sympy.Expr, axes: Axes, table: Table) -> tuple[Write, ...] | None:
    """``expr`` as a sum of separable writes to a state on ``axes``; None where it is not separable.

    Terms that share their key factor are one write, and likewise those that share their value factor.
    """
    if expr == 0:
        return ()
    if axes != "kv":
        return (Write(expr, sympy.S.One),) if axes == "k" else (Write(sympy.S.One, expr),)
    for form in (expr, sympy.expand(expr)):
        by_key: dict[sympy.Expr, list[sympy.Expr]] = {}
        for term in sympy.Add.make_args(form):
            part = factors(term, table)
            if part["kv"] != 1:
                break
            by_key.setdefault(part["k"], []).append(part[""] * part["v"])
        else:
            by_value: dict[sympy.Expr, list[sympy.Expr]] = {}
            for key, values in by_key.items():
                by_value.setdefault(sympy.Add(*values), []).append(key)
            found = tuple(Write(sympy.Add(*keys), value) for value, keys in by_value.items() if value != 0)
            if len(found) <= MAX_TERMS:
                return found
    return None


def state_sums(expr: sympy.Expr, states: frozenset[sympy.Symbol]) -> list[sympy.Expr]:
    """Outermost contractions in ``expr`` whose body contains one of ``states``, in order of appearance."""
    found: list[sympy.Expr] = []

    def walk(e: sympy.Expr) -> None:
        if isinstance(e, (SumK, SumV)) and e.free_symbols & states:
            if e not in found:
                found.append(e)
            return
        for a in e.args:
            walk(a)

    walk(expr)
    return found


def separable(state: AffineState, table: Table) -> bool:
    """Whether matmuls over tokens give what they make of zeros, each part of them made of its token's channels alone.

    Writes are products of a key and a value, and decays weights of one of the two.
    """
    if state.axes != "kv" or state.decay_axes == "kv" or state.log_decay is None or not state.writes:
        return False
    parts = [(state.log_decay, state.decay_axes)]
    parts += [part for w in state.writes for part in ((w.key, "k"), (w.value, "v"))]
    return all(not e.atoms(SumK, SumV) and axes_of(e, table) in ("", axes) for e, axes in parts)

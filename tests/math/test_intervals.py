"""Interval arithmetic, proven signs, and the hazards told."""

from __future__ import annotations

import random

import pytest
import sympy
from variants import ALL, build

from dspace.math import analyse
from dspace.math.functions import Sigmoid, Softplus
from dspace.math.intervals import interval, sign_domain
from dspace.math.ir import DOMAINS, SumK
from dspace.math.ranges import grows

x, y = sympy.symbols("x y", real=True)
EXPRESSIONS = [
    x + y,
    x * y,
    x**2,
    x**3 - y,
    1 / (1 + x**2),
    sympy.exp(x) - sympy.exp(y),
    Sigmoid(x) * y,
    Softplus(x) - y,
    sympy.Abs(x) - sympy.Max(x, y),
    sympy.Min(x, y, 1),
    sympy.tanh(x) / 2,
    1 - sympy.exp(x),
    sympy.sqrt(1 + x**2),
]
POINTS = {
    "real": (-3, 3),
    "positive": (1e-6, 5),
    "nonnegative": (0, 5),
    "negative": (-5, -1e-6),
    "nonpositive": (-5, 0),
    "unit": (0, 1),
}


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_values_lie_in_the_interval(expr):
    random.seed(0)
    for dx in DOMAINS:
        for dy in DOMAINS:
            found = interval(expr, {x: DOMAINS[dx], y: DOMAINS[dy]})
            for _ in range(5):
                at = {x: random.uniform(*POINTS[dx]), y: random.uniform(*POINTS[dy])}
                value = float(expr.xreplace(at).evalf())
                assert found.low - 1e-9 <= value <= found.high + 1e-9, (dx, dy, at)


def test_signs_that_matter():
    g, b = sympy.Symbol("g", nonpositive=True), sympy.Symbol("b", nonnegative=True)
    r = ALL["metaplastic"]
    assert sign_domain(1 - sympy.exp(g), r) == "nonnegative"
    assert sign_domain(sympy.exp(g), r) == "positive"
    assert sign_domain(b * x**2, r) == "nonnegative"
    assert sign_domain(SumK(x**2), r) == "nonnegative"
    assert sign_domain(x, r) == "real"


def test_precision_is_proven_positive_by_induction():
    assert {s.name: s.domain for s in ALL["metaplastic"].states} == {"mean": "real", "precision": "positive"}


def test_a_safe_variant_has_no_warning():
    assert analyse(ALL["metaplastic"]).ranges == ()


def test_hazards_are_told_with_a_cure():
    r = build(
        "hazards",
        {"S": ("kv", "0", "exp(h)*S + v*k"), "z": ("k", "0", "z + k")},
        "sum_k(S*q)/sum_k(z*q)",
        **{"q": "k", "k": "k", "v": "v", "h": ""},
    )
    told = " ".join(analyse(r).ranges)
    assert "exp(h)" in told and "overflow" in told
    assert "may be by zero" in told
    assert "may exceed 1" in told
    assert all("cure" in s for s in analyse(r).ranges)


@pytest.mark.parametrize(
    "decay, expected",
    [("exp(h)", True), ("1.001", True), ("-1.5", True), ("exp(h)/(1 + exp(h))", False), ("exp(-h**2)", False)],
)
def test_growth_is_what_happens_somewhere_not_what_no_interval_excludes(decay: str, expected: bool):
    r = build(
        "growth", {"S": ("kv", "0", f"{decay}*S + v*k*h")}, "sum_k(S*q)", **{"q": "k", "k": "k", "v": "v", "h": ""}
    )
    assert grows(r) == expected

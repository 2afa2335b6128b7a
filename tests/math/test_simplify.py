"""Simplification never changes a value, never grows, and does something; the passes are recorded."""

from __future__ import annotations

import time

import sympy
from variants import ALL

from dspace.math import analyse
from dspace.math.ir import SumK
from dspace.math.simplify import atomise, count_ops, fraction, is_zero, simplify

a, b, c, k = sympy.symbols("a b c k", real=True)
TABLE = {a: "", b: "", c: "", k: "k"}


def test_cancels_common_factors():
    assert simplify((a * b + a * c) / (a * (b + c) * b), TABLE) == 1 / b


def test_pulls_factors_out_of_sums():
    assert simplify(SumK(a * k + b * k), TABLE) == SumK(k) * (a + b)


def test_powers_of_one_exponential_share_an_atom():
    assert is_zero((sympy.exp(2 * a) - 1) / (sympy.exp(a) - 1) - sympy.exp(a) - 1)


def test_fraction_has_polynomial_parts():
    numerator, denominator = fraction(1 / (1 / a + b))
    assert sympy.simplify(numerator / denominator - a / (1 + a * b)) == 0


def test_atomise_and_back():
    e = sympy.exp(a) * sympy.tanh(b) + sympy.sqrt(c**2 + 1) ** 3
    rational, stands = atomise(e)
    assert sympy.simplify(rational.xreplace(stands) - e) == 0


def test_simplify_never_grows():
    for r in ALL.values():
        table = r.axes_table()
        for s in r.states:
            assert sympy.count_ops(simplify(s.update, table)) <= sympy.count_ops(s.update)


def test_passes_are_recorded_and_the_search_saves_operations():
    analysis = analyse(ALL["metaplastic"])
    passes = {p.name: p for p in analysis.passes}
    assert list(passes) == ["coordinates", "simplify", "classify", "adjoint", "ranges", "cost"]
    assert passes["coordinates"].ops_after < passes["coordinates"].ops_before
    assert "M = mean * precision" in passes["coordinates"].note
    assert count_ops(analysis.recurrence) == passes["simplify"].ops_after


def test_analysis_is_quick():
    for r in ALL.values():
        start = time.process_time()
        analyse(r)
        assert time.process_time() - start < 1.5, r.name

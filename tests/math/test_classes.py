"""Classes, writes, reads and the fold."""

from __future__ import annotations

import pytest
import sympy
from variants import ALL, build, metaplastic

from dspace.math import analyse
from dspace.math.functions import Sigmoid, Softplus
from dspace.math.ir import SumK, axes_of
from dspace.math.logdecay import log_decay
from dspace.math.moebius import is_moebius, keeps_cross_ratios, moebius_matrix
from dspace.math.rank import rank_one
from dspace.math.separate import factors, writes

EXPECTED = {
    "scalar": "a",
    "vector": "b",
    "tied": "b",
    "before": "b",
    "normalised": "fold",
    "metaplastic": "c",
    "folded": "fold",
    "folded_wide": "fold",
    "channelwise": "c",
    "elementwise": "bp",
    "delta": "d",
    "kalman": "e",
    "momentum": "g",
    "nonlinear": "g",
    "coupled": "g",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_class(name):
    found = analyse(ALL[name]).classification
    assert found.letter == EXPECTED[name], found
    assert found.reason and found.steps


@pytest.mark.parametrize("name", [n for n, letter in EXPECTED.items() if letter in ("a", "b", "bp", "c", "fold")])
def test_affine_states_and_readout_rebuild_the_recurrence(name):
    r = analyse(ALL[name])
    recurrence, c = r.recurrence, r.classification
    table = recurrence.axes_table()
    for state, a in zip(recurrence.states, c.affine, strict=True):
        rebuilt = a.decay * state.symbol + sum(w.key * w.value for w in a.writes)
        assert sympy.simplify(rebuilt - state.update) == 0
        assert set(axes_of(a.decay, table)) <= set(a.decay_axes)
        if c.letter != "bp" and state.axes == "kv":
            assert all("v" not in axes_of(w.key, table) and "k" not in axes_of(w.value, table) for w in a.writes)
    for read in c.readout.reads:
        if read.queries is not None:
            symbols = {s.name: s.symbol for s in recurrence.states}
            assert sympy.expand(read.body - sum(q * symbols[n] for n, q in read.queries.items())) == 0
            assert all("v" not in axes_of(q, table) for q in read.queries.values())


def test_reading_before_the_update_splits_off_what_the_token_writes():
    c = analyse(ALL["before"]).classification
    q, k, u, v = (sympy.Symbol(n, real=True) for n in ("q", "k", "u", "v"))
    u = next(p.symbol for p in ALL["before"].parameters)
    (read,) = c.readout.reads
    assert read.queries == {"S": q}
    assert c.readout.output == read.symbol + v * SumK(k * q * u)


def test_fold_divides_the_query():
    a = analyse(ALL["folded"])
    (read,) = [r for r in a.classification.readout.reads]
    I, P = (x.symbol for x in (a.recurrence.parameters[0], a.recurrence.states[1]))
    assert sympy.simplify(read.queries["M"] * (I + P) / sympy.Symbol("q", real=True)) == 1
    assert "query" in a.classification.reason


def test_precision_on_v_alone_folds_into_the_output():
    r = build(
        "value",
        {"M": ("kv", "0", "exp(g)*M + v*k"), "P": ("v", "0", "exp(g)*P + b*sum_k(k**2)")},
        "sum_k(M*q/(P + I_p))",
        parameters={"I_p": ""},
        **{"q": "k", "k": "k", "v": "v", "b": "v", "g": ""},
    )
    c = analyse(r).classification
    assert c.letter == "fold" and "output" in c.reason
    assert c.readout.reads[0].queries == {"M": sympy.Symbol("q", real=True)}


def test_decay_that_may_be_zero_has_no_logarithm():
    assert analyse(ALL["tied"]).classification.affine[0].log_decay is None


def test_logarithms_of_decays():
    r = ALL["metaplastic"]
    g, x = sympy.Symbol("g", nonpositive=True), sympy.Symbol("x", real=True)
    p = r.parameters[0].symbol
    assert log_decay(sympy.S.One, r) == 0
    assert log_decay(sympy.exp(g), r) == g
    assert log_decay(sympy.exp(g) * Sigmoid(x), r) == g - Softplus(-x)
    assert log_decay(1 - Sigmoid(x), r) == -Softplus(x)
    assert log_decay(sympy.Rational(9, 10), r) == sympy.log(sympy.Rational(9, 10))
    assert log_decay(p / (1 + p), r) == sympy.log(p) - sympy.log(1 + p)
    assert log_decay(1 - sympy.exp(g), r) is None
    assert log_decay(x, r) is None


def test_moebius_by_fraction_and_by_schwarzian():
    x, p = sympy.Symbol("x", positive=True), sympy.Symbol("p", positive=True)
    assert moebius_matrix(x / (1 + p * x) + 3, x) is not None
    assert is_moebius(1 / (1 / x + p), x)
    assert not is_moebius(x**2 + p, x)
    assert not is_moebius(sympy.exp(x), x)


def test_a_map_that_is_no_moebius_map_is_refuted_by_numbers(monkeypatch):
    """Its Schwarzian multiplied out would take minutes."""

    def refuse(expr):
        raise AssertionError("symbolic test of something that numbers refute")

    monkeypatch.setattr("dspace.math.moebius.is_zero", refuse)
    x, v, k = sympy.symbols("x v k", positive=True)
    assert not is_moebius(((x + v + k) ** 30 + (x * v + k) ** 31) / ((x + 1) ** 29 + v), x)
    assert not is_moebius(sympy.tanh(v * x), x)


def test_numbers_do_not_refute_a_moebius_map():
    x, v, k = sympy.symbols("x v k", positive=True)
    for hidden in (1 / (1 / x + v), v * x / (k * x + 1e-9) + 1, 1 / (1 / (1 / x + k) + v) + k, x * 1e-6 + v, v + k):
        assert keeps_cross_ratios(sympy.sympify(hidden), x), hidden


def test_rank_one_finds_the_outer_product():
    r = ALL["delta"]
    found = rank_one(r)
    k, beta, g = (next(v.symbol for v in r.inputs if v.name == n) for n in ("k", "beta", "g"))
    assert found.holds
    assert sympy.simplify(found.decay - sympy.exp(g)) == 0
    assert sympy.simplify(found.erase * found.probe + sympy.exp(g) * beta * k**2) == 0


def test_two_outer_products_are_not_rank_one():
    r = build(
        "two",
        {"S": ("kv", "0", "S - k*sum_k(k*S) - p*sum_k(p*S) + v*k")},
        "sum_k(S*q)",
        **{"q": "k", "k": "k", "p": "k", "v": "v"},
    )
    assert analyse(r).classification.letter == "g"


def test_writes_separate_with_several_terms_and_share_keys():
    k, p, v, b = sympy.symbols("k p v b", real=True)
    table = {k: "k", p: "k", v: "v", b: "v"}
    assert len(writes(v * k + b * k, "kv", table)) == 1
    assert len(writes(v * k + b * p, "kv", table)) == 2
    assert writes((v + b) * (k + p), "kv", table) is not None
    assert writes(sympy.tanh(v * k), "kv", table) is None


def test_factors_split_powers_and_exponentials():
    k, v = sympy.symbols("k v", real=True)
    table = {k: "k", v: "v"}
    assert factors((k * v) ** 2, table)["kv"] == 1
    assert factors(sympy.exp(k + v), table)["kv"] == 1
    assert factors(sympy.exp(k * v), table)["kv"] != 1


def test_variance_that_varies_along_both_axes_keeps_the_variant_in_class_c():
    assert analyse(metaplastic()).classification.readout.variance is not None

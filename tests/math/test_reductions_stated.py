"""Reductions of variants that are no built-in ones: published delta rules, Kalman filters, other spellings.

Each spec is stated as its authors would; the edges are those that a reader of the papers knows (THEORY: reductions).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import sympy
from test_reductions import confirm, run

from dspace.math import analyse, explain
from dspace.math.ir import Recurrence
from dspace.math.numeric import draw, evaluate, full
from dspace.math.proofs import Claim, prove
from dspace.math.reductions import reduce
from dspace.spec import from_dict, load

NEGATIVE = {"axes": "k", "domain": "nonpositive"}
RATE = {"axes": "", "domain": "nonpositive"}
UNIT = {"axes": "", "domain": "unit"}
QKV = {"q": "k", "k": "k", "v": "v"}


def stated(name: str, inputs: dict, update: str, output: str = "scale * sum_k(S * q)", **more) -> dict:
    state = {"S": {"axes": "kv", "update": update}, **more.pop("state", {})}
    return {"name": name, "inputs": inputs, "state": state, "readout": {"output": output}, **more}


KALMAN = {
    "parameters": {
        "a": {"axes": "kv", "domain": "positive"},
        "p": {"axes": "kv", "domain": "nonnegative"},
        "L0": {"axes": "", "domain": "positive"},
    },
    "state": {"L": {"axes": "kv", "init": "L0", "domain": "positive", "update": "L / (a**2 + p * L) + b * k**2"}},
}

STATED = {
    "erase_write": stated(
        "erase_write",
        {**QKV, "e": {"axes": "k", "domain": "unit"}, "w": {"axes": "v", "domain": "unit"}, "g": NEGATIVE},
        "exp(g) * S - sum_k(exp(g) * S * e * k) * k + w * v * k",
    ),
    "feedback": stated(
        "feedback",
        {**QKV, "p": "k", "beta": UNIT, "g": RATE},
        "exp(g) * S + beta * (v - sum_k(exp(g) * S * p)) * k",
    ),
    "dplr": stated("dplr", {**QKV, "x": "k", "y": "k", "g": NEGATIVE}, "exp(g) * S + sum_k(S * x) * y + v * k"),
    "rwkv7": stated(
        "rwkv7",
        {**QKV, "kappa": "k", "a": {"axes": "k", "domain": "unit"}, "w": {"axes": "k", "domain": "unit"}},
        "w * S - sum_k(S * kappa) * a * kappa + v * k",
    ),
    "preconditioned": stated(
        "preconditioned",
        {**QKV, "beta": UNIT, "ba": {"axes": "", "domain": "nonnegative"}, "g": RATE, "ga": RATE},
        "exp(g) * S + beta * (v - sum_k(exp(g) * S * k)) * m * k",
        define={"An": "exp(ga) * A + ba * k**2", "m": "exp(-s * tanh(log(An + 0.000001) - c))"},
        parameters={"c": {"axes": ""}, "s": {"axes": "", "domain": "nonnegative"}},
        state={"A": {"axes": "k", "domain": "nonnegative", "update": "An"}},
    ),
    "momentum": stated(
        "momentum",
        {**QKV, "eta": UNIT, "theta": UNIT, "a": UNIT},
        "(1 - a) * S + Mn",
        define={"Mn": "eta * M - theta * (sum_k(S * k) - v) * k"},
        state={"M": {"axes": "kv", "update": "Mn"}},
    ),
    "kalman_step": stated(
        "kalman_step",
        {**QKV, "beta": UNIT},
        "S + beta / (1 + beta * sum_k(k**2)) * (v - sum_k(S * k)) * k",
    ),
    "kalman": stated(
        "kalman",
        {**QKV, "b": {"axes": "v", "domain": "nonnegative"}},
        "a * S / (a**2 + p * L) + v * k",
        "scale * sum_k(S / L * q)",
        **copy.deepcopy(KALMAN),
    ),
    "kalman_weighted": stated(
        "kalman_weighted",
        {**QKV, "b": {"axes": "v", "domain": "nonnegative"}},
        "a * S / (a**2 + p * L) + v * b * k",
        "scale * sum_k(S / L * q)",
        **copy.deepcopy(KALMAN),
    ),
    "unforgetting": {
        "name": "unforgetting",
        "extends": "palimpsa",
        "remove": ["inputs.g", "layer.g"],
        "forgetting": {"retain": "1"},
    },
    "moments": stated(
        "moments",
        {**QKV, "b": {"axes": "v", "domain": "nonnegative"}, "g": RATE},
        "(exp(g) * P * S + v * k) / Pn",
        define={"Pn": "exp(g) * P + (1 - exp(g)) * I_p + b * k**2"},
        parameters={"I_p": {"axes": "", "domain": "positive"}},
        state={"P": {"axes": "kv", "init": "I_p", "update": "Pn"}},
    ),
    "gate_in_words": stated(
        "gate_in_words",
        {"query": "k", "key": "k", "value": "v", "forget": {"axes": "k", "domain": "unit"}},
        "forget * S + key * value",
        "sum_k(query * S)",
    ),
    "steps": stated(
        "steps",
        {"C": "k", "B": "k", "x": "v", "dt": {"axes": "", "domain": "positive"}},
        "exp(-dt * A) * S + dt * x * B",
        "sum_k(S * C)",
        parameters={"A": {"axes": "", "domain": "positive"}},
    ),
    "bayes_delta": stated(
        "bayes_delta",
        {**QKV, "beta": UNIT, "g": RATE},
        "D + beta * (v - sum_k(D * k)) * k / Pn",
        define={"D": "exp(g) * S", "Pn": "exp(g) * P + (1 - exp(g)) * I_p + beta * k**2"},
        parameters={"I_p": {"axes": "k", "domain": "positive"}},
        state={"P": {"axes": "k", "init": "I_p", "domain": "positive", "update": "Pn"}},
    ),
    "longhorn": stated(
        "longhorn",
        {**QKV, "beta": {"axes": "v", "domain": "nonnegative"}},
        "(1 - eps * k**2) * S + eps * v * k",
        define={"eps": "beta / (1 + beta * sum_k(k**2))"},
    ),
}


@lru_cache
def recurrence(name: str) -> Recurrence:
    return analyse(from_dict(STATED[name]) if name in STATED else load(name)).recurrence


@pytest.mark.parametrize(
    ("source", "target", "kind", "wanted"),
    [
        ("erase_write", "kda", "exact", "w = beta, e = beta"),
        ("erase_write", "gated_delta_net", "exact", "g equal along k, w = beta, e = beta"),
        ("erase_write", "delta_net", "exact", "g = 0, w = beta, e = beta"),
        ("feedback", "gated_delta_net", "exact", "p = k"),
        ("feedback", "simple_gla", "exact", "v = v/beta, p = 0"),
        ("dplr", "kda", "exact", "v = beta·v, x = -beta·k·exp(g), y = k"),
        ("dplr", "rwkv7", "exact", "g = log(w), x = kappa, y = -a·kappa"),
        ("rwkv7", "gated_delta_net", "exact", "v = beta·v, kappa = k, a = beta·exp(g), w = exp(g)"),
        ("preconditioned", "gated_delta_net", "exact", "s = 0"),
        ("momentum", "gated_delta_net", "exact", "v = v·exp(-g), eta = 0, theta = beta·exp(g), a = 1 - exp(g)"),
        ("delta_net", "kalman_step", "exact", "beta = beta/(beta·Σₖ(k²) + 1)"),
        ("kalman", "unforgetting", "exact", "a = 1, p = 0, L0 = I_p"),
        ("kalman_weighted", "unforgetting", "exact", "v = v/b, a = 1, p = 0, L0 = I_p"),
        ("kalman", "linear_attention", "exact", "q = L0·q, b = 0, a = 1, p = 0"),
        ("palimpsa", "unforgetting", "exact", "g = 0"),
        ("moments", "palimpsa", "exact", "the same recurrence"),
        ("palimpsa", "moments", "exact", "the same recurrence"),
        ("gate_in_words", "gla", "exact", "query = q·scale, key = k, value = v, forget = exp(g)"),
        ("gla", "gate_in_words", "exact", "q = query, k = key, v = value, g = log(forget), scale = 1"),
        ("simple_gla", "steps", "exact", "q = C, k = B, v = dt·x, g = -A·dt, scale = 1"),
        ("longhorn", "linear_attention", "limit", "beta → 0 with v = v/beta"),
    ],
)
def test_what_papers_say_is_found_and_holds_on_sequences(source, target, kind, wanted):
    answer = reduce(recurrence(source), recurrence(target))
    found = getattr(answer, kind)
    assert found is not None and answer.seconds < 30
    head, _, rest = explain.substitution_text(found).rpartition(" with ")
    said, _, sought = wanted.rpartition(" with ")
    assert (head, sorted(rest.split(", "))) == (said, sorted(sought.split(", ")))
    assert confirm(found) < (1e-9 if found.exact else 1e-4)


@pytest.mark.parametrize(
    ("source", "target"),
    [("rwkv7", "kda"), ("kalman_step", "delta_net"), ("steps", "simple_gla"), ("steps", "longhorn")],
)
def test_what_does_not_hold_is_refuted_at_a_point(source, target):
    answer = reduce(recurrence(source), recurrence(target))
    assert answer.exact is None and answer.limit is None
    assert answer.failure.counterexample["source"] != answer.failure.counterexample["target"]


def test_where_a_substitution_is_defined_is_said():
    found = reduce(recurrence("kalman_weighted"), recurrence("unforgetting")).exact
    assert explain.conditions(found) == ("b ≠ 0",)
    assert "defined where b ≠ 0" in explain.proof(found)
    assert explain.conditions(reduce(recurrence("gla"), recurrence("gate_in_words")).exact) == ("forget > 0",)
    assert explain.conditions(reduce(recurrence("palimpsa"), recurrence("simple_gla")).limit) == ()


FEIGNED = stated(
    "feigned",
    {**QKV, "g": RATE},
    "exp(g) * S + v * k",
    "scale * sum_k(S * q / (X + p))",
    parameters={"p": {"axes": "", "domain": "positive"}},
    state={"X": {"axes": "k", "domain": "nonnegative", "update": "exp(g) * X + p * k**2"}},
)


def test_a_state_that_vanishes_as_fast_as_what_it_is_added_to_is_no_zero():
    """X is a multiple of p: as p goes to 0, p/(X + p) does not go to 1, though each equation alone says so."""
    source, target = analyse(from_dict(FEIGNED)).recurrence, recurrence("simple_gla")
    x = {v.name: v.symbol for v in source.variables}
    S, X = (next(s.symbol for s in source.states if s.name == n) for n in "SX")
    variables = {v: v for v in x.values()} | {x["q"]: x["p"] * x["q"]}
    claim = Claim(source, target, variables, {S: target.states[0].symbol, X: sympy.S.Zero}, x["p"], "zero")
    verdict = prove(claim)
    assert not verdict.proven and verdict.failing.what == "the output" and verdict.counterexample


def test_the_order_of_an_error_is_found_out():
    """With the square of a parameter in front of the erasing, the error is of second order."""
    update = "exp(g) * S + v * k - c**2 * sum_k(S * k) * k"
    spec = stated("slow", {**QKV, "g": RATE}, update, parameters={"c": {"axes": "", "domain": "positive"}})
    source = analyse(from_dict(spec)).recurrence
    found = reduce(source, recurrence("simple_gla")).limit
    assert found.order == 2 and explain.as_dict(reduce(source, recurrence("simple_gla")))["limit"]["order"] == 2
    assert any("ε^2·(-k·Σₖ(S·k)) + O(ε^3)" in line for line in explain.proof(found))
    (error,) = found.verdict.errors.values()
    assert str(error) == "-k*SumK(S*k)"


def test_the_small_quantity_is_nobody_s_parameter():
    """A parameter may be called eps, as one of the built-in variants has it."""
    found = reduce(recurrence("linear_attention"), recurrence("normalized_linear_attention")).fold
    assert found.carried == ("z",)
    assert explain.substitution_text(found) == "q = q/(eps + Σₖ(q·z)), scale = 1, z carried beside"
    renamed = recurrence("normalized_linear_attention")
    assert any(p.name == "eps" for p in renamed.parameters)


FOLDS = [
    ("simple_gla", "palimpsa_folded", "q = q/(I_p + Ibar), Ibar carried beside"),
    ("feedback", "bayes_delta", "k = k/(I_p + P_bar), p = k, P_bar carried beside"),
]


@pytest.mark.parametrize(("source", "target", "text"), FOLDS)
def test_small_states_are_carried_beside(source, target, text):
    """The fold, E15: exact for whatever values the small states have, hence for their own."""
    answer = reduce(recurrence(source), recurrence(target))
    assert answer.exact is None and answer.failure is None
    assert explain.substitution_text(answer.fold) == text
    assert confirm(answer.fold) < 1e-9
    assert "carried beside" in explain.latex(answer.fold) and f"fold: {source} becomes {target}" in explain.text(answer)
    assert explain.as_dict(answer)["fold"]["carried"]


def test_a_fold_holds_with_the_small_state_s_own_values():
    """The divided query, computed from the importance that the folded variant itself carries, token by token."""
    source, target = recurrence("simple_gla"), recurrence("palimpsa_folded")
    found = reduce(source, target).fold
    rng = np.random.default_rng(2)
    constants = {v.symbol: full(draw(v, rng), v.axes) for v in target.variables if v.role != "input"}
    tokens = [{v.symbol: full(draw(v, rng), v.axes) for v in target.inputs} for _ in range(6)]
    beside = next(s for s in target.states if s.name == "Ibar")
    value = full(evaluate(beside.init, constants), beside.axes)
    mapped = []
    for token in tokens:
        value = full(evaluate(beside.update, {**token, **constants, beside.symbol: value}), beside.axes)
        known = {**token, **constants, beside.symbol: value}
        mapped.append({v.symbol: full(evaluate(found.claim.variables[v.symbol], known), v.axes) for v in source.inputs})
    scale = {x: e for x, e in constants.items() if x.name == "scale"}
    for one, other in zip(run(source, mapped, scale), run(target, tokens, constants), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_a_large_or_entangled_state_is_not_carried_beside():
    assert reduce(recurrence("simple_gla"), recurrence("palimpsa")).fold is None
    entangled = stated(
        "entangled",
        {**QKV, "g": RATE},
        "exp(g) * S + v * k / (1 + X)",
        state={"X": {"axes": "", "update": "X + sum_k(sum_v(S * k * v)) ** 2"}},
    )
    assert reduce(recurrence("simple_gla"), analyse(from_dict(entangled)).recurrence).fold is None


def test_a_limit_of_a_parameter_per_channel():
    found = reduce(recurrence("metaplastic_gla"), recurrence("gla")).limit
    assert str(found.claim.limit) == "I_p" and found.order == 1


def test_a_latex_proof_says_what_it_claims_and_why():
    told = explain.latex(reduce(recurrence("palimpsa"), recurrence("simple_gla")).limit)
    for part in (
        r"\paragraph{Claim.} palimpsa becomes simple\_gla in the limit $I_{\mathrm{p}} \to \infty$.",
        r"\bar I &\leftarrow \bar I e^{g} + b k^{2}, & \bar I_0 &= 0",
        r"q &:= I_{\mathrm{p}} q",
        r"M e^{g} + k v \;\mapsto\; S e^{g} + k v",
        r"\xrightarrow{\epsilon \to 0}",
        r"O(\epsilon^{2})",
        r"\square",
    ):
        assert part in told
    assert told.count("{") == told.count("}") and told.count(r"\begin{align*}") == told.count(r"\end{align*}")
    assert "unread" not in told


def test_a_planted_mistake_is_refuted_in_every_equation():
    source, target = recurrence("erase_write"), recurrence("kda")
    S = source.states[0]
    for wrong in (replace(S, update=S.update * 2), replace(S, init=sympy.S.One)):
        answer = reduce(replace(source, states=(wrong,)), target)
        assert answer.exact is None and answer.failure.counterexample

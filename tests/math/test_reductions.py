"""Reductions between the built-in variants: found by search, proven by algebra, confirmed by running tokens."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import sympy
from relations import ANALYSES, RECURRENCES
from variants import ALL, build

import dspace.spec
from dspace.math import analyse, drawing, explain
from dspace.math.canonical import canonical_hash
from dspace.math.ir import Recurrence
from dspace.math.map import build_map, load_or_build
from dspace.math.numeric import draw, evaluate, full
from dspace.math.proofs import Claim, prove
from dspace.math.reductions import Reduction, reduce


def run(recurrence: Recurrence, tokens: list[dict], constants: dict, states: dict | None = None) -> list[np.ndarray]:
    """Outputs of ``recurrence`` token by token; inputs and constants by symbol."""
    states = states or {s.symbol: full(evaluate(s.init, constants), s.axes) for s in recurrence.states}
    outputs = []
    for token in tokens:
        known = {**token, **constants}
        new = {s.symbol: full(evaluate(s.update, known | states), s.axes) for s in recurrence.states}
        outputs.append(evaluate(recurrence.output, known | (new if recurrence.read == "after" else states)))
        states = new
    return outputs


def confirm(reduction: Reduction, length: int = 6) -> float:
    """Largest difference between the substituted source and the target over a sequence, relative to the outputs."""
    claim = reduction.claim
    rng = np.random.default_rng(3)
    source, target = claim.source, claim.target
    constants = {p.symbol: full(draw(p, rng), p.axes) for p in (*target.parameters, target.variables[-1])}
    free = {x: v for v in source.variables for x in [v.symbol] if claim.variables[x] == x}
    held = {x: full(draw(v, rng), v.axes) for x, v in free.items() if x not in {v.symbol for v in target.variables}}
    if claim.limit is not None:
        held[claim.limit] = np.full((1, 1), 1e7 if claim.direction == "infinity" else 1e-7)
    tokens = [{v.symbol: full(draw(v, rng), v.axes) for v in target.inputs} for _ in range(length)]
    mapped = []
    axes = {v.symbol: v.axes for v in source.variables}
    for token in tokens:
        known = {**held, **constants, **token}
        mapped.append({x: full(evaluate(e, known), axes[x]) for x, e in claim.variables.items()})
    wanted = run(target, tokens, constants)
    fixed = {v.symbol: mapped[0][v.symbol] for v in source.variables if v.role != "input"}
    found = run(source, [{v.symbol: m[v.symbol] for v in source.inputs} for m in mapped], fixed)
    size = max(np.abs(w).max() for w in wanted)
    return max(np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)) / size


LONELY = "normalized_linear_attention"

EDGES = [
    ("palimpsa", "simple_gla", "exact", {"b": "0", "q": "I_p*q"}),
    ("palimpsa", "simple_gla", "limit", {"q": "I_p*q"}),
    ("palimpsa", "palimpsa_folded", "exact", {"b": "b"}),
    ("meta_mamba2", "mamba2", "exact", {"b": "0", "q": "I_p*q"}),
    ("simple_gla", "mamba2", "exact", {"scale": "1"}),
    ("simple_gla", "linear_attention", "exact", {"g": "0"}),
    ("simple_gla", "retnet", "exact", {"g": "g_h"}),
    ("simple_gla", "lightning_attention", "exact", {"g": "-slope"}),
    ("gla", "simple_gla", "exact", {"g": "g"}),
    ("gla", "hgrn2", "exact", {"k": "1 - exp(g)"}),
    ("metaplastic_gla", "palimpsa", "exact", {"g": "g", "I_p": "I_p"}),
    ("metaplastic_gla", "gla", "exact", {"b": "0", "q": "I_p*q"}),
    ("kda", "gated_delta_net", "exact", {"g": "g"}),
    ("gated_delta_net", "delta_net", "exact", {"g": "0"}),
    ("gated_delta_net", "simple_gla", "limit", {"v": "v/beta"}),
    ("metaplastic_gla", "gla", "limit", {"q": "I_p*q"}),
    ("rwkv6", "linear_attention", "exact", {"w": "0", "u": "1"}),
    ("rwkv6", "retnet", "exact", {"w": "g_h", "q": "q*exp(g_h)", "u": "exp(-g_h)"}),
]


@pytest.mark.parametrize(("source", "target", "kind", "substitution"), EDGES)
def test_edges_of_the_theory_are_found(answers, source, target, kind, substitution):
    found = getattr(answers[source, target], kind)
    assert found is not None
    assert {name: str(e) for name, e in found.substitution.items()} == substitution


def test_what_is_no_reduction_is_not_found(answers):
    for source, target in [
        ("rwkv6", "gla"),
        ("gla", "rwkv6"),
        ("simple_gla", "palimpsa"),
        ("simple_gla", "gla"),
        ("linear_attention", "retnet"),
        ("delta_net", "gated_delta_net"),
        ("palimpsa", "gla"),
        ("retnet", "simple_gla"),
    ]:
        assert answers[source, target].exact is None and answers[source, target].limit is None


def test_every_edge_is_confirmed_on_sequences(answers):
    count = 0
    for answer in answers.values():
        for found, tolerance in ((answer.exact, 1e-10), (answer.limit, 1e-4)):
            if found is not None:
                count += 1
                assert confirm(found) < tolerance, (answer.source, answer.target, found.substitution)
    assert count > 50


def test_every_other_pair_is_refuted_at_a_point(answers):
    for answer in answers.values():
        assert answer.seconds < 30
        if answer.failure is not None:
            point = answer.failure.counterexample
            assert point["source"] != point["target"], (answer.source, answer.target, answer.failure.what)


def test_a_planted_mistake_breaks_the_edge():
    source = RECURRENCES["palimpsa"]
    g = next(v.symbol for v in source.inputs if v.name == "g")
    M = source.states[0]
    wrong = replace(source, states=(replace(M, update=M.update - M.symbol * sympy.exp(g) / 2), source.states[1]))
    answer = reduce(wrong, RECURRENCES["simple_gla"])
    assert answer.exact is None and answer.limit is None
    assert answer.failure.counterexample


def test_a_false_claim_has_a_counterexample():
    source, target = RECURRENCES["palimpsa"], RECURRENCES["simple_gla"]
    found = reduce(source, target).exact.claim
    b = next(v.symbol for v in source.inputs if v.name == "b")
    verdict = prove(Claim(source, target, {**found.variables, b: sympy.S.One}, found.states))
    assert not verdict.proven
    assert verdict.failing.what == "the update of Ibar"
    assert verdict.counterexample["source"] != verdict.counterexample["target"]


def test_the_error_of_a_limit_is_the_theory_s(answers):
    """E3b: the first correction is -Ibar/I_p, relatively."""
    found = answers["palimpsa", "simple_gla"].limit
    (error,) = found.verdict.errors.values()
    names = {x.name: x for x in error.free_symbols}
    S, q, scale, Ibar = (names[n] for n in ("S", "q", "scale", "Ibar_unread"))
    from dspace.math.ir import SumK

    assert sympy.simplify(error + scale * SumK(Ibar * S * q)) == 0


def test_a_state_that_explodes_may_not_be_ignored():
    """With the key scaled up the importance grows with it: the numerator's limit alone proves nothing."""
    source = ALL["metaplastic"]
    r = analyse(source).recurrence
    target = analyse(ALL["scalar"]).recurrence
    found = reduce(r, target).limit
    k, q, I_p = (next(v.symbol for v in r.variables if v.name == n) for n in ("k", "q", "I_p"))
    S = target.states[0].symbol
    M = r.states[0].symbol
    scaled = {**found.claim.variables, k: k * I_p, q: q}
    claim = replace(found.claim, variables=scaled, states={**found.claim.states, M: S * I_p})
    assert not prove(claim).proven


def test_answers_are_told(answers):
    for pair in (("palimpsa", "simple_gla"), ("palimpsa", "gla"), ("kda", "gated_delta_net")):
        answer = answers[pair]
        assert pair[0] in explain.text(answer)
        json.dumps(explain.as_dict(answer))
    assert r"\begin{align*}" in explain.latex(answers["palimpsa", "simple_gla"].exact)
    assert "false at" in explain.text(answers["palimpsa", "gla"])


def test_map_is_drawn_stored_and_quick_again(tmp_path):
    few = {n: ANALYSES[n] for n in ("palimpsa", "palimpsa_folded", "simple_gla", "mamba2", "linear_attention", LONELY)}
    hashes = {n: dspace.spec.load(n).hash for n in few}
    drawn = load_or_build(hashes, lambda: few, tmp_path / "map.json")
    start = time.process_time()
    again = load_or_build(hashes, lambda: pytest.fail("built again"), tmp_path / "map.json")
    assert time.process_time() - start < 1
    assert again.edges == drawn.edges
    kept = {(e.source, e.target, e.kind) for e in drawn.skeleton()}
    assert ("palimpsa", "palimpsa_folded", "exact") in kept
    assert ("palimpsa", "linear_attention", "exact") not in kept, "it follows from others"
    assert ("mamba2", "simple_gla") in drawn.families()
    drawing.draw(drawn, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text().count("palimpsa") >= 2
    assert drawn.dot().startswith("digraph")
    assert "palimpsa → palimpsa_folded: b equal along v" in drawn.text()
    assert f"linear_attention ↠ {LONELY}: q = q/(eps" in drawn.text()
    assert "related to no other here: mamba2" in build_map({n: few[n] for n in ("mamba2",)}).text()
    json.dumps(drawn.as_dict())
    assert drawn.graph().number_of_nodes() == len(few)


def test_a_damaged_store_is_built_anew(tmp_path):
    store = tmp_path / "map.json"
    store.write_text('{"key": 3')
    few = {n: ANALYSES[n] for n in ("simple_gla", "linear_attention")}
    assert load_or_build({}, lambda: few, store).edges == build_map(few).edges


def test_one_mathematics_has_one_hash():
    one = build("one", {"S": ("kv", "0", "exp(g)*S + v*k")}, "scale*sum_k(S*q)", q="k", k="k", v="v", g="")
    two = build("two", {"H": ("kv", "0", "k*x + H*exp(g)")}, "sum_k(q*H*scale)", k="k", q="k", x="v", g="")
    other = build("other", {"S": ("kv", "0", "exp(2*g)*S + v*k")}, "scale*sum_k(S*q)", q="k", k="k", v="v", g="")
    assert canonical_hash(one) == canonical_hash(two)
    assert canonical_hash(one) != canonical_hash(other)
    hashes = {canonical_hash(r) for r in RECURRENCES.values()}
    assert len(hashes) == len(RECURRENCES)


def test_two_spellings_of_a_posterior_have_one_hash():
    assert canonical_hash(analyse(ALL["folded_wide"]).recurrence) == canonical_hash(analyse(ALL["folded"]).recurrence)

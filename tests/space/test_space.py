"""The space: what its points mean, which are variants, which coincide; a random hundred compile and agree with the oracle."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from dspace.errors import UserError
from dspace.math import analyse, canonical_hash, reduce
from dspace.space import Point, all_points, build, coincides, compose, load_or_build, parse_point, why_not
from dspace.space.catalogue import candidates, examine
from dspace.spec import load, loads
from tests import cheap

PLAIN = Point("constant", "none", "token", "prior", "head", "zero", "none", "mean")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "simple_gla"),
        ({"forgetting": "none"}, "linear_attention"),
        ({"forgetting": "token_key"}, "gla"),
        ({"correction": "delta"}, "gated_delta_net"),
        ({"correction": "delta", "forgetting": "none"}, "delta_net"),
        ({"correction": "delta", "forgetting": "token_key"}, "kda"),
        ({"structure": "key_value", "evidence": "energy"}, "palimpsa"),
        ({"structure": "key", "evidence": "energy"}, "palimpsa_folded"),
        (
            {"structure": "key_value", "evidence": "energy", "forgetting": "token_key", "prior_precision": "key"},
            "metaplastic_gla",
        ),
    ],
)
def test_known_variants_are_points(changes, name):
    made = examine(replace(PLAIN, **changes))
    assert made.hash == canonical_hash(analyse(load(name)).recurrence)


def test_every_combination_is_a_point_or_refused_in_words():
    points = list(all_points())
    refused = [p for p in points if why_not(p)]
    for point in random.Random(1).sample(refused, 20):
        with pytest.raises(UserError, match="is not a variant"):
            compose(point)
    assert len(points) == len(refused) + sum(not why_not(p) for p in points)
    with pytest.raises(UserError, match="a constant precision takes no evidence"):
        compose(replace(PLAIN, evidence="gain"))
    with pytest.raises(UserError, match="not a choice"):
        parse_point("a/b/c/d/e/f/g/h")
    with pytest.raises(UserError, match="not a point"):
        parse_point("constant")
    assert parse_point(str(PLAIN)) == PLAIN


def test_every_candidate_composes_to_a_file_of_its_own():
    specs = [compose(p) for p in candidates()]
    assert len({s.name for s in specs}) == len({s.hash for s in specs}) == len(specs) >= 200
    for spec in random.Random(2).sample(specs, 20):
        assert loads(spec.to_toml()).hash == spec.hash
        assert set(spec.layer) >= set(spec.inputs)


def test_what_is_said_to_coincide_does():
    said = [(p, q) for p in all_points() if not why_not(p) and (q := coincides(p)) is not None]
    targets = [(p, q) for p, q in said if p.prior_precision == q.prior_precision]
    for point, other in random.Random(3).sample(targets, 12):
        assert examine(point).hash == examine(other).hash


def test_a_prior_of_a_constant_precision_only_rescales_what_is_written():
    with_prior = loads("""
name = "x"
extends = "palimpsa"
remove = ["precision", "inputs.b", "layer.b", "readout.variance"]
""")
    answer = reduce(analyse(with_prior).recurrence, analyse(load("simple_gla")).recurrence)
    assert answer.exact is not None


def test_two_hundred_points_are_pairwise_inequivalent():
    cheaper = [p for p in candidates() if p.readout == "mean"]
    chosen = random.Random(4).sample(cheaper, 205)
    found = build(chosen)
    assert len(found.entries) >= 200
    assert len({e.hash for e in found.entries}) == len(found.entries)
    assert found.sample(10, 1) == found.sample(10, 1) != found.sample(10, 2)


def test_the_catalogue_is_kept(tmp_path, monkeypatch):
    from dspace.space import catalogue

    monkeypatch.setattr(catalogue, "candidates", lambda: tuple(itertools.islice(candidates(), 6)))
    first = load_or_build(tmp_path)
    monkeypatch.setattr(catalogue, "build", None)
    assert load_or_build(tmp_path) == first


def test_a_random_hundred_compile_and_agree_with_the_oracle():
    chosen = random.Random(5).sample(candidates(), 100)
    told = cheap.verify({f"p{i:03d}": compose(p) for i, p in enumerate(chosen)})
    assert len(told) == 100
    assert not [(str(chosen[int(t["name"][1:])]), t) for t in told if not t["passed"]]
    assert all(t["forms"] == ["chunk", "recurrent", "reference"] and t["gradients"] for t in told)
    assert {t["class"] for t in told} >= {"a", "c", "d", "fold"}
    assert sum(t["seconds"] for t in told) < 120

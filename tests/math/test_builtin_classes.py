"""Classes of the built-in specs, as the theory's table says."""

from __future__ import annotations

import time

import pytest

import dspace.spec
from dspace.errors import UserError
from dspace.math import analyse, lower

TABLE = {
    "linear_attention": "a",
    "normalized_linear_attention": "fold",
    "retnet": "a",
    "lightning_attention": "a",
    "simple_gla": "a",
    "mamba2": "a",
    "gla": "b",
    "hgrn2": "b",
    "rwkv6": "b",
    "palimpsa": "c",
    "meta_mamba2": "c",
    "palimpsa_folded": "fold",
    "metaplastic_gla": "c",
    "delta_net": "d",
    "gated_delta_net": "d",
    "kda": "d",
}


@pytest.mark.parametrize("name", TABLE)
def test_class_and_speed(name):
    spec = dspace.spec.load(name)
    start = time.process_time()
    analysis = analyse(spec)
    assert time.process_time() - start < 1.5
    assert analysis.classification.letter == TABLE[name]
    assert analysis.source == lower(spec)
    assert [p.name for p in analysis.passes] == [
        "lower",
        "coordinates",
        "simplify",
        "classify",
        "adjoint",
        "ranges",
        "cost",
    ]


def test_every_affine_built_in_decays_without_a_logarithm_of_zero():
    for name, letter in TABLE.items():
        if letter in ("a", "b", "c", "fold"):
            affine = analyse(dspace.spec.load(name)).classification.affine
            assert all(a.log_decay is not None for a in affine), name


def test_states_of_the_metaplastic_posterior():
    states = analyse(dspace.spec.load("palimpsa")).recurrence.states
    assert [(s.name, s.axes, s.doc) for s in states] == [
        ("M", "kv", "mean * precision"),
        ("Ibar", "kv", "precision - I_p"),
    ]


def test_a_full_precision_is_refused_with_place_and_cure(tmp_path):
    path = tmp_path / "full.toml"
    path.write_text(
        """name = "full"
[inputs]
q = "k"
k = "k"
v = "v"
[precision]
evidence = "1"
structure = "full"
[mean]
evidence = "v * k"
[readout]
output = "scale * sum_k(mean * q)"
"""
    )
    with pytest.raises(UserError) as refused:
        analyse(dspace.spec.load(path))
    assert "full.toml:8:14: precision.structure" in str(refused.value) and "key_value" in str(refused.value)

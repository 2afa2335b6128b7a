"""Two spellings of one mathematics: one set of kernels, each module with its own names."""

from __future__ import annotations

import inspect

import pytest
import torch

import dspace
from dspace.math import analyse, canonical_hash
from dspace.spec import load, loads

RENAMED = """
name = "renamed"
[inputs]
decay = { axes = "", domain = "nonpositive" }
x = "v"
key = "k"
gain = { axes = "v", domain = "nonnegative" }
r = "k"
[parameters]
prior = { axes = "", domain = "positive", init = 1.0 }
[state.B]
axes = "kv"
update = "gain * key * key + exp(decay) * B"
[state.A]
axes = "kv"
update = "key * x + exp(decay) * A"
[readout]
output = "sum_k(r * A * scale / (B + prior))"
variance = "scale**2 * sum_k(r**2 / (prior + B))"
"""
"""Palimpsa in other names, its inputs and its states in another order."""


@pytest.fixture
def modules(tmp_path):
    base = dspace.compile("palimpsa", certify=False, cache_dir=tmp_path)
    return base, dspace.compile(loads(RENAMED), certify=False, cache_dir=tmp_path)


def drawn() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    size = {"q": (1, 7, 2, 4), "k": (1, 7, 2, 4), "v": (1, 7, 2, 3), "b": (1, 7, 2, 3), "g": (1, 7, 2), "I_p": (2,)}
    found = {n: torch.randn(s) for n, s in size.items()}
    found |= {"b": found["b"].abs(), "g": -found["g"].abs(), "I_p": found["I_p"].abs() + 0.5}
    return {n: x.requires_grad_() for n, x in found.items()}


NAMES = {"q": "r", "k": "key", "v": "x", "b": "gain", "g": "decay", "I_p": "prior"}


def test_the_renamed_variant_runs_on_the_kernels_of_the_first(modules, monkeypatch):
    base, other = modules
    assert canonical_hash(analyse(loads(RENAMED)).recurrence) == canonical_hash(analyse(load("palimpsa")).recurrence)
    assert other._SHARED == "palimpsa" and not hasattr(base, "_SHARED")
    assert list(inspect.signature(other.chunk_renamed).parameters)[:6] == ["decay", "x", "key", "gain", "r", "prior"]
    monkeypatch.setattr(other, "_native_forward_op", None, raising=False)  # its own kernels are not asked
    for form in ("chunk", "recurrent"):
        one, two = drawn(), drawn()
        o, state = getattr(base, f"{form}_palimpsa")(**one, output_final_state=True)
        p, other_state = getattr(other, f"{form}_renamed")(
            **{NAMES[n]: x for n, x in two.items()}, output_final_state=True
        )
        assert torch.equal(o, p)
        assert torch.equal(state[0], other_state[1]) and torch.equal(state[1], other_state[0]), "B comes before A"
        (o.sum() + state[0].sum()).backward()
        (p.sum() + other_state[1].sum()).backward()
        assert all(torch.equal(one[n].grad, two[n].grad) for n in one)
    again, _ = other.chunk_renamed(**{NAMES[n]: x for n, x in drawn().items()}, initial_state=other_state)
    wanted, _ = base.chunk_palimpsa(**drawn(), initial_state=state)
    assert torch.equal(again, wanted)


def test_it_is_certified_and_found_again(tmp_path):
    dspace.compile("linear_attention", certify=False, cache_dir=tmp_path)
    text = """
name = "sums"
[inputs]
w = "v"
f = "k"
u = "k"
[state.H]
axes = "kv"
update = "f * w + H"
[readout]
output = "sum_k(H * u) * scale"
"""
    made = dspace.compile(loads(text), cache_dir=tmp_path)
    assert made._SHARED == "linear_attention"
    (tmp_path / "sums.toml").write_text(text)
    assert dspace.compile(tmp_path / "sums.toml", cache_dir=tmp_path)._SHARED == "linear_attention"


def test_what_differs_shares_nothing_and_a_lost_module_is_not_missed(tmp_path):
    dspace.compile("simple_gla", certify=False, cache_dir=tmp_path)
    assert not hasattr(dspace.compile("gla", certify=False, cache_dir=tmp_path), "_SHARED")
    for path in (tmp_path / "modules").glob("simple_gla_*"):
        path.unlink()
    text = 'name = "again"\nextends = "simple_gla"\n[state.S]\nupdate = "k * v + exp(g) * S"\n'
    made = dspace.compile(loads(text), certify=False, cache_dir=tmp_path)
    assert not hasattr(made, "_SHARED") and made.reference_again is not None

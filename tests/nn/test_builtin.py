"""Every kind of compiled variant serves a layer: in chunks, step by step, packed, with gradients."""

from __future__ import annotations

import pytest
import torch

import dspace
from dspace.errors import UserError
from dspace.nn import Mixer, Model, train
from dspace.tasks import rebinding_mqar

NAMES = ["palimpsa", "simple_gla", "palimpsa_folded", "mamba2", "gated_delta_net"]
"""One of each plan: native ratio, chunkwise, fold, a shared definition in [layer], contraction of the state."""


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_a_compiled_spec(name):
    torch.manual_seed(0)
    mixer = Mixer(name, 24, 2, 8, 2.0)
    x = torch.randn(2, 9, 24)
    whole = mixer(x)
    whole.square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    first, state = mixer(x[:, :4], output_final_state=True)
    outs = [first]
    for t in range(4, 9):
        y, state = mixer.step(x[:, t], state)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-4)
    packed = mixer(x.reshape(1, 18, 24), cu_seqlens=torch.tensor([0, 9, 9, 18]))
    torch.testing.assert_close(packed.reshape(2, 9, 24), whole, rtol=1e-4, atol=1e-4)


def test_a_module_a_spec_and_a_name_make_the_same_layer():
    sources = ["simple_gla", dspace.spec.load("simple_gla"), dspace.compile("simple_gla")]
    x = torch.randn(1, 5, 16)
    results = []
    for source in sources:
        torch.manual_seed(0)
        results.append(Mixer(source, 16, 2)(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with pytest.raises(UserError, match="cannot be made from"):
        Mixer(3, 16, 2)
    with pytest.raises(UserError, match="no SPEC"):
        Mixer(torch, 16, 2)


def test_equal_state_bytes_of_a_variant_and_its_twin():
    with_importance = Mixer("palimpsa", 24, 2, 8, 2.0).state_size()
    assert with_importance == Mixer("simple_gla", 24, 2, 16, 1.0).state_size() == 2 * 2 * 8 * 16


def test_a_model_learns_to_rebind():
    sizes = {"vocab_size": 64, "input_seq_len": 32, "num_kv_pairs": 4, "num_updates": 2}
    data = rebinding_mqar(**sizes, num_examples=6400, seed=(0, 0))
    held_out = rebinding_mqar(**sizes, num_examples=100, seed=(0, 1))
    model = Model("palimpsa", vocab_size=64, hidden_size=24, num_heads=2, decay="small")
    result = train(model, data, held_out, steps=100, batch_size=64, eval_every=50)
    assert result.curve[1].loss < 0.95 * result.curve[0].loss
    assert {"accuracy", "stability", "plasticity", "intrusion"} == set(result.metrics)

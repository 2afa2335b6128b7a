"""A Mixer computes what its recipe says, in chunks, step by step and packed, with gradients everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dspace.errors import UserError
from dspace.nn import Mixer, SoftmaxAttention
from dspace.nn.functions import causal_conv, packed_conv, spread

from .stub import STUB, metaplastic

torch.manual_seed(0)


def mixers():
    yield "plain", Mixer(STUB, 24, 2, 8, 2.0)
    yield "grouped", Mixer(STUB, 24, 2, 8, num_v_heads=4, skip=True, output_gate=False)
    yield "bare", Mixer(STUB, 24, 3, layer={"q": "linear", "v": "conv(linear) + conv(silu(linear))"}, output_norm=False)
    yield "attention", SoftmaxAttention(24, 2)


CASES = list(mixers())
IDS = [name for name, _ in CASES]


@pytest.mark.parametrize("mixer", [m for _, m in CASES], ids=IDS)
def test_shapes_and_gradients_of_everything(mixer):
    x = torch.randn(2, 7, 24, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape and mixer(x[:, :0]).shape == (2, 0, 24)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mixer", [m for _, m in CASES], ids=IDS)
def test_steps_and_splits_equal_the_whole(mixer):
    x = torch.randn(2, 9, 24)
    whole = mixer(x)
    state, outs = None, []
    for t in range(9):
        y, state = mixer.step(x[:, t], state)
        outs.append(y)
    torch.testing.assert_close(torch.stack(outs, 1), whole, rtol=1e-4, atol=1e-5)
    first, state = mixer(x[:, :2], output_final_state=True)
    second = mixer(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", [m for _, m in CASES], ids=IDS)
def test_packed_sequences_do_not_see_each_other(mixer):
    lengths = [5, 0, 1, 2, 9]
    parts = [torch.randn(1, n, 24) for n in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed, state = mixer(torch.cat(parts, 1), cu_seqlens=offsets, output_final_state=True)
    separate = torch.cat([mixer(p) for p in parts], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)
    if isinstance(mixer, Mixer):
        more = [torch.randn(1, n, 24) for n in (1, 2, 0, 3, 4)]
        ends = torch.tensor([0, 1, 2, 0, 3, 4]).cumsum(0)
        carried = mixer(torch.cat(more, 1), state, cu_seqlens=ends)
        joined = [mixer(torch.cat([a, b], 1))[:, a.shape[1] :] for a, b in zip(parts, more, strict=True)]
        torch.testing.assert_close(carried, torch.cat(joined, 1), rtol=1e-4, atol=1e-5)


def test_the_recipe_is_what_is_computed():
    mixer = Mixer(STUB, 12, 2, 4, output_norm=False, output_gate=False, decay="small", init={"I_p": 3.0})
    seen = {}

    def spy(*args, **options):
        seen["args"] = args
        return metaplastic(*args, **options)

    object.__setattr__(mixer.operator, "chunk", spy)
    try:
        x = torch.randn(1, 6, 12)
        mixer(x)
    finally:
        object.__setattr__(mixer.operator, "chunk", metaplastic)
    q, k, v, b, g, i_p = seen["args"]
    mixed = mixer.project(x)
    conv = F.conv1d(F.pad(mixed[..., :24].mT, (3, 0)), mixer.taps[0].T[:, None], groups=24).mT
    heads = F.silu(conv).unflatten(-1, (3, 2, 4))
    gate = torch.sigmoid(mixed[..., 24:26])
    torch.testing.assert_close(q, F.normalize(heads[..., 0, :, :], dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k, F.normalize(heads[..., 1, :, :], dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v, gate[..., None] * heads[..., 2, :, :])
    logits = mixer.expand[0](mixed[..., 26:30]).unflatten(-1, (2, 4))
    torch.testing.assert_close(b, gate[..., None] * logits.sigmoid(), rtol=1e-4, atol=1e-5)  # softplus(head_scale) = 1
    rate = torch.tensor([0.01, 0.16])
    torch.testing.assert_close(g, -F.softplus(mixed[..., 30:32] + mixer.atoms["dt_bias"]) * rate)
    torch.testing.assert_close(i_p, torch.full((2,), 3.0))


def test_start_of_the_atoms():
    mixer = Mixer(STUB, 64, 64, 1, decay=100.0, frozen=("I_p", "A_log"))
    dt = F.softplus(mixer.atoms["dt_bias"])
    assert dt.min() > 0.99e-3 and dt.max() < 0.101 and dt.log().std() > 1
    torch.testing.assert_close(dt * mixer.atoms["A_log"].exp(), torch.full((64,), 0.01))
    assert not mixer.atoms["A_log"].requires_grad and not mixer.constants["I_p"].raw.requires_grad
    rates = Mixer(STUB, 64, 64, 1).atoms["A_log"].exp()
    assert rates.min() > 0 and 8 < rates.max() < 16
    assert Mixer(STUB, 8, 2, init={"head_scale": -1.0}).atoms["head_scale"].tolist() == [-1, -1]


def test_state_size_counts_every_state_of_every_head():
    assert Mixer(STUB, 24, 2, 8, 2.0).state_size() == 2 * 2 * 8 * 16
    assert SoftmaxAttention(24, 2).state_size(100) == 100 * 2 * 24


def test_a_mixer_can_be_copied_saved_and_half_precision():
    mixer = Mixer(STUB, 24, 2, 8)
    twin = copy.deepcopy(mixer)
    x = torch.randn(1, 5, 24)
    torch.testing.assert_close(twin(x), mixer(x))
    other = Mixer(STUB, 24, 2, 8)
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(other(x), mixer(x))
    assert mixer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_heads": 5}, "does not divide"),
        ({"num_heads": 2, "num_v_heads": 3}, "a multiple of num_heads"),
        ({"num_heads": 2, "init": {"Ip": 1.0}}, "nothing is called 'Ip'"),
        ({"num_heads": 2, "frozen": ("B_log",)}, "nothing is called 'B_log'"),
        ({"num_heads": 2, "init": {"I_p": -1.0}}, "is not positive"),
        ({"num_heads": 2, "decay": "tiny"}, "decay = 'tiny'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Mixer(STUB, 24, **options)


def test_convolutions_agree_with_the_textbook_and_their_gradients():
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    cache = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(torch.cat([cache, x], 1).mT, taps.T[:, None], groups=3).mT
    torch.testing.assert_close(causal_conv(x, taps, cache)[0], expected)
    assert torch.autograd.gradcheck(lambda *a: causal_conv(*a)[0], (x, taps, cache))
    offsets = torch.tensor([0, 4, 11])
    flat = x[:1].detach().requires_grad_()
    y, tail = packed_conv(flat, taps, offsets, cache)
    torch.testing.assert_close(y[:, :4], causal_conv(flat[:, :4], taps, cache[:1])[0])
    torch.testing.assert_close(y[:, 4:], causal_conv(flat[:, 4:], taps, cache[1:])[0])
    torch.testing.assert_close(tail[0], flat[0, 1:4])
    assert torch.autograd.gradcheck(lambda a, b, c: packed_conv(a, b, offsets, c)[0], (flat, taps, cache))
    assert causal_conv(x, taps[:1])[1].shape == (2, 0, 3)


def test_values_spread_over_named_axes():
    assert spread(torch.zeros(2, 5, 3), "", "kv").shape == (2, 5, 3, 1, 1)
    assert spread(torch.zeros(2, 5, 3, 7), "k", "kv").shape == (2, 5, 3, 7, 1)
    assert spread(torch.zeros(3, 7), "v", "kv").shape == (3, 1, 7)

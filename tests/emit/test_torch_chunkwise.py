"""The chunkwise PyTorch form against the token loop, in float64: values, states and every gradient."""

from __future__ import annotations

import pytest
import torch

import dspace
from dspace.plan.affine import affine_plan

CHUNKWISE = [
    n for n in dspace.spec.builtin_names() if affine_plan(dspace.math.analyse(dspace.spec.load(n))) is not None
]

DECAY_ON_V = """
name = "decay_on_v"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "v", domain = "nonpositive" }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k + (v**2) * k**2"
[readout]
read = "before"
output = "scale * sum_k(S * q)"
"""


def module_of(source: str, tmp_path, monkeypatch):
    monkeypatch.setenv("DSPACE_CACHE", str(tmp_path))
    if source == "decay_on_v":
        (tmp_path / "decay_on_v.toml").write_text(DECAY_ON_V)
        source = str(tmp_path / "decay_on_v.toml")
    return dspace.compile(source, certify=False)


def arguments(module, steps: int, sequences: int, size_k: int, size_v: int, batch: int, corner: bool):
    generator = torch.Generator().manual_seed(steps)
    sizes = {"k": size_k, "v": size_v}

    def draw(declared, lead):
        x = torch.randn(*lead, *(sizes[a] for a in declared["axes"]), generator=generator, dtype=torch.float64)
        if declared["domain"] in ("positive", "nonnegative"):
            x = x.abs() + 0.1
        elif declared["domain"] in ("negative", "nonpositive"):
            x = -0.2 * x.abs()
            if corner and len(lead) == 3:  # no decay, a clean reset, and ordinary gates side by side
                x[:, 3::7], x[:, 5::11] = 0.0, -1e4
        elif declared["domain"] == "unit":
            x = x.sigmoid()
        return x

    heads = 2
    spec = module.SPEC
    inputs = [draw(d, (batch, steps, heads)) for d in spec["inputs"]]
    parameters = [draw(d, (heads,)) for d in spec["parameters"]]
    states = [draw({**s, "domain": s.get("domain", "real")}, (sequences, heads)) for s in spec["states"]]
    return [x.requires_grad_() for x in (*inputs, *parameters, *states)]


def both(module, tensors, offsets):
    results = []
    for core in (module._chunk_torch_core, module._reference_core):
        outputs = [x for x in core(*tensors, 0.3, offsets, module.SPEC["variance"]) if x is not None]
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in outputs]
        loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        results.append(
            [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True))]
        )
    return results


@pytest.mark.parametrize("name", [*CHUNKWISE, "decay_on_v"])
@pytest.mark.parametrize(("steps", "packed", "corner"), [(1, False, False), (67, False, True), (41, True, False)])
def test_agrees_with_the_token_loop(name, steps, packed, corner, tmp_path, monkeypatch) -> None:
    module = module_of(name, tmp_path, monkeypatch)
    offsets = torch.tensor([0, 17, 17, 40, steps]) if packed else None
    tensors = arguments(module, steps, 4 if packed else 2, 5, 3, 1 if packed else 2, corner)
    found, expected = both(module, tensors, offsets)
    for f, e in zip(found, expected, strict=True):
        assert torch.isfinite(f).all()
        # exp(-30) of the past survives a reset of per-channel gates: the floor of blocks._LOG_DECAY_FLOOR.
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-9)


def test_serves_affine_classes_only() -> None:
    assert {"linear_attention", "simple_gla", "gla", "rwkv6", "palimpsa_folded"} <= set(CHUNKWISE)
    assert not {"palimpsa", "delta_net", "kda"} & set(CHUNKWISE)

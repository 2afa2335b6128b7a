"""The GPU kernel of the short convolution's gradient: under Triton's interpreter, and through the compilers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dspace.runtime import offline

pytest.importorskip("triton")
from dspace.nn import conv_kernel  # noqa: E402

INTERPRETED = """
import json, torch
from dspace.nn import conv_kernel
from dspace.nn.functions import _FusedConv, _shifted_sum

conv_kernel._MANY = LIMIT

def by_formulas(x, taps):
    channels = taps.shape[-1]
    zeros = x.new_zeros(len(x), taps.shape[-2] - 1, channels)
    return _shifted_sum(x[..., :channels], zeros, taps), x[..., channels:]

compiled = torch.compile(lambda x, taps: _FusedConv.apply(x, taps), fullgraph=True, backend="aot_eager")
torch.manual_seed(SEED)
found = {}
for trials, batch, length, channels, others, size, stacked in CASES:
    wide = torch.randn(trials * batch, length, channels + others + 3, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(*([trials] if stacked else []), size, channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(trials * batch, length, channels + others, dtype=torch.float64)
    results = []
    for conv in (by_formulas, _FusedConv.apply, compiled):
        y, rest = conv(wide[..., 2 : 2 + channels + others], taps)
        y = torch.cat([torch.nn.functional.silu(y), rest.tanh()], -1)
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), (wide, taps))])
    for name, other in zip(("kernel", "compiled"), results[1:]):
        errors = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(other, results[0])]
        found[f"{name} {trials} {batch} {length} {channels} {others} {size}"] = errors
print(json.dumps(found))
"""
CASES = [
    (1, 2, 5, 7, 3, 4, False),
    (3, 2, 130, 70, 130, 4, True),
    (2, 1, 64, 64, 0, 3, True),
    (1, 1, 1, 3, 1, 4, False),
    (2, 2, 3, 5, 64, 1, True),
    (2, 1, 16, 64, 65, 8, True),
]


@pytest.mark.parametrize("many", [0, conv_kernel._MANY], ids=["four tiles a program", "one"])
def test_gradients_are_those_of_the_formulas(many: int) -> None:
    """Of strided inputs, stacked and not, with other channels and without, fewer tokens than taps; sums are float32."""
    code = (
        INTERPRETED.replace("CASES", repr(CASES))
        .replace("LIMIT", str(many))
        .replace("SEED", str(int.from_bytes(os.urandom(3), "big")))
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(CASES)
    for case, errors in found.items():
        assert max(errors) < 2e-6, (case, errors)


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_compiles_without_a_gpu_and_spills_nothing(target: str, dtype: torch.dtype) -> None:
    x, taps = torch.zeros(4, 50, 800, dtype=dtype), torch.zeros(2, 4, 512)
    with offline.recording(conv_kernel) as launches:
        conv_kernel.conv_backward(x, taps, x[..., :512], x[..., 512:])
    (launch,) = launches
    built = offline.build(launch, target)
    assert built.name == "_conv_backward_kernel" and built.spilled == 0 and not built.faults

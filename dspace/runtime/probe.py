"""A probe for the miscompilation that made public kernels wrong on Hopper GPUs: run it, do not trust a version list.

A product whose left factor is the transpose of another product's result, ``dot(trans(x), y)`` with
``x = dot(a, b)`` accumulated in a loop, came out wrong from Triton 3.4 to 3.7.0 on sm_90, silently, depending on the
number of warps. The kernel below is that pattern and nothing else. It also runs under Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TOLERANCE = 2e-2
"""Relative RMS error above which a product of bf16 matrices is wrong and not merely rounded."""


@triton.jit
def _chained_products(
    a, b, y, z, plain, transposed, M: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    """``x = mask * (a b^T)`` summed over blocks of K, ``plain = x y``, ``transposed = x^T z``.

    a, b ``[M, K]``; y, z, plain, transposed ``[M, D]``, all row-major.
    """
    rows = tl.arange(0, M)
    inner = tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    x = tl.zeros([M, M], dtype=tl.float32)
    for start in range(0, K, BLOCK):
        block_a = tl.load(a + rows[:, None] * K + start + inner[None, :])
        block_b = tl.load(b + rows[:, None] * K + start + inner[None, :])
        x += tl.dot(block_a, tl.trans(block_b))
    x = tl.where(rows[:, None] >= rows[None, :], x, 0.0)
    block_y = tl.load(y + rows[:, None] * D + columns[None, :])
    block_z = tl.load(z + rows[:, None] * D + columns[None, :])
    x = x.to(block_y.dtype)
    tl.store(plain + rows[:, None] * D + columns[None, :], tl.dot(x, block_y))
    tl.store(transposed + rows[:, None] * D + columns[None, :], tl.dot(tl.trans(x), block_z))


@dataclass(frozen=True)
class ProbeResult:
    """One configuration of the probe: relative errors of ``dot(x, y)`` and ``dot(trans(x), z)``, or what it raised."""

    dtype: str
    size: int
    warps: int
    stages: int
    plain_error: float
    transposed_error: float
    raised: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.raised) or not (self.plain_error <= TOLERANCE and self.transposed_error <= TOLERANCE)


def probe_chained_products(device: str = "cuda", quick: bool = False) -> list[ProbeResult]:
    """Run the pattern in several tile sizes, warps and pipeline depths; ``quick`` tries one configuration.

    A launch that fails at run time (an illegal access) is a finding, too, and ends the probe, since the process
    can no longer use the GPU.
    """
    configurations = [(torch.float16, 16, 4, 2)]
    if not quick:
        configurations = list(itertools.product((torch.bfloat16, torch.float16), (64, 128), (2, 4, 8), (2, 3)))
    results = []
    for dtype, size, warp, stage in configurations:
        result = _run(device, dtype, size, warp, stage)
        if result.raised.startswith("OutOfResources"):  # a small GPU: this tile says nothing about the compiler
            continue
        results.append(result)
        if "illegal" in result.raised:
            break
    return results


def _run(device: str, dtype: torch.dtype, size: int, warps: int, stages: int) -> ProbeResult:
    torch.manual_seed(0)
    inner, block, width = 2 * size, min(size, 64), min(size, 64)
    a, b = (torch.randn(size, inner, device=device, dtype=dtype) / math.sqrt(inner) for _ in range(2))
    y, z = (torch.randn(size, width, device=device, dtype=dtype) for _ in range(2))
    plain, transposed = (torch.full((size, width), math.nan, device=device) for _ in range(2))
    name = str(dtype).removeprefix("torch.")
    try:
        _chained_products[(1,)](
            a, b, y, z, plain, transposed, size, inner, block, width, num_warps=warps, num_stages=stages
        )
        x = torch.tril(a.double() @ b.double().T)
        return ProbeResult(
            name, size, warps, stages, _error(x @ y.double(), plain), _error(x.T @ z.double(), transposed)
        )
    except Exception as error:  # a compiler that raises is a finding
        first = next(iter(str(error).splitlines()), "")
        return ProbeResult(name, size, warps, stages, math.nan, math.nan, f"{type(error).__name__}: {first[:120]}")


def _error(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float((reference - found.double()).square().mean().sqrt() / reference.square().mean().sqrt())


SUSPECT = """
name = "suspect"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "", domain = "nonpositive" }
[state.S]
axes = "kv"
update = "exp(g) * S + v * k"
[readout]
output = "sum_k(S * q)"
"""
"""The smallest variant whose gradients multiply transposed products in a loop over tiles."""


def assembler_faults() -> tuple[str, ...]:
    """Instructions that the assembler of this Triton gets wrong for Hopper in a kernel that is known to provoke it.

    The kernel is that of the gradients of a linear recurrence, with narrow operands on warp-group matrix instructions:
    a configuration that dspace itself avoids. It is compiled, disassembled and never run, since what it does then
    depends on what lies in shared memory; so this needs no GPU. See :mod:`dspace.runtime.sass`.
    """
    import tempfile
    from pathlib import Path

    from dspace import spec
    from dspace.runtime import offline
    from dspace.runtime.analysis import module_text
    from dspace.runtime.load import load_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dspace_suspect.py"
        path.write_text(module_text(spec.loads(SUSPECT)), encoding="utf-8")
        module = load_file(path, path.stem)
        found: list[str] = []
        for K, V in ((16, 32), (64, 32)):
            tile = (K, V, 4, 1)
            module._CONFIGS.clear()
            module.__dict__["_chosen"] = lambda propose, *key, tile=tile: (64, tile, tile, tile)
            for launch in offline.launches_of(module, "chunk", K=K, V=V):
                found += offline.build(launch, "sm_90").faults
    return tuple(found)

"""Class c on a GPU: forward, forward + backward and peak memory at the shapes of the Palimpsa paper.

    python benchmarks/ratio_gpu.py [--json FILE]

bf16 inputs, medians of ``triton.testing.do_bench``, milliseconds; memory in MiB, everything that is allocated while
one forward and backward pass runs, inputs and gradients included. ``graph_``: replayed from a CUDA graph, without the
time that Python takes to launch. A shape is timed only after outputs and every
gradient agree with the float64 reference at its head sizes; otherwise its row says so instead of a time. The
published kernel's times were measured once on an H100 (torch 2.11, triton 3.6) and are printed as given: its
repository is not a package that this script could install and run beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import triton
from chunkwise_gpu import LIMIT, draw, graphed, time, worst_error

import dspace

SHAPES = {
    "p760": (2, 4096, 16, 96, 192),
    "pow64": (8, 4096, 16, 64, 64),
    "p170": (8, 4096, 16, 48, 48),
    "mqar": (64, 512, 8, 16, 32),
}
PUBLISHED = {"p760": (14.26, 74.6), "pow64": (10.45, 58.4), "p170": (7.50, 37.7), "mqar": (0.684, 3.46)}
"""Forward and forward + backward of the published kernel."""


def peak(op: Callable[..., tuple], inputs: list[torch.Tensor]) -> float:
    """MiB allocated at most during one forward and backward pass."""
    cotangent = torch.randn(inputs[2].shape, device="cuda", dtype=inputs[2].dtype)
    for t in inputs:
        t.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    op(*inputs)[0].backward(cotangent)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", help="also write the rows there")
    asked = arguments.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    module = dspace.compile("palimpsa")
    rows = []
    for label, shape in SHAPES.items():
        error = worst_error(module, *shape[-2:])
        row = {"shape": label, "sizes": shape, "error": error}
        if error < LIMIT:
            inputs = draw(module, shape)
            row["peak_MiB"] = peak(module.chunk_palimpsa, inputs)
            row["fwd"], row["fwd_bwd"] = time(module.chunk_palimpsa, inputs)
            row["graph_fwd"], row["graph_fwd_bwd"] = graphed(module.chunk_palimpsa, inputs)
            row["published_fwd"], row["published_fwd_bwd"] = PUBLISHED[label]
            del inputs
        rows.append(row)
        numbers = {k: f"{v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "error"}
        print(f"{label:6} error {error:.1e}", numbers if error < LIMIT else "WRONG, not timed", flush=True)
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

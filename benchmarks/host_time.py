"""What a call of a generated module costs the host: checks, allocations, autograd, Triton's dispatch. No GPU needed.

    python benchmarks/host_time.py [SPEC ...] [--json FILE]

Triton dispatches to a driver that launches nothing (dspace.runtime.absent), tensors are on the CPU, so allocations and
the driver's own part of a launch are not those of a GPU. Microseconds, the least of seven means; "Triton's" are those of
the same calls with every launch going through Triton's dispatch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

import dspace
from dspace.runtime import offline
from dspace.runtime.absent import AbsentGPU

B, T, H, K, V = 2, 64, 8, 16, 32  # sizes do not matter, as long as nothing takes time but the host


def least(call: Callable[[], object], times: int = 300) -> float:
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, (time.perf_counter() - begin) / times)
    return round(best * 1e6, 1)


def measure(name: str, gpu: AbsentGPU) -> dict[str, float]:
    module = dspace.compile(name, certify=False)
    table, sizes = module.SPEC, {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    inputs = [torch.zeros(B, T, H, *sizes[v["axes"]], dtype=torch.bfloat16) for v in table["inputs"]]
    parameters = [torch.ones(H, *sizes[p["axes"]]) for p in table["parameters"]]
    leaves = [*inputs, *parameters]
    function = getattr(module, f"chunk_{table['name']}")

    def forward() -> torch.Tensor:
        return function(*inputs, *parameters)[0]

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, leaves, out, allow_unused=True)

    direct = module._launch
    found: dict[str, float] = {}
    with offline.elsewhere(module):
        for label, launch in (("", direct), ("_by_triton", by_triton)):
            module.__dict__["_launch"] = launch
            module._TAPES.clear()  # calls that were recorded with the other one
            for leaf in leaves:
                leaf.requires_grad_(False)
            for _ in range(3):
                forward()
            found[f"forward{label}"] = least(forward)
            for leaf in leaves:
                leaf.requires_grad_(True)
            for _ in range(3):
                both()
            gpu.recording = True
            gpu.launched.clear()
            both()
            found[f"launches{label}"] = len(gpu.launched)
            gpu.recording = False
            found[f"both{label}"] = least(both)
    module.__dict__["_launch"] = direct
    return found


def by_triton(kernel, grid, pointers, numbers, fixed, **constants) -> None:  # noqa: ANN001
    kernel[grid](*pointers, *numbers, *fixed, **constants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["palimpsa", "simple_gla", "gla", "palimpsa_folded"])
    parser.add_argument("--json")
    args = parser.parse_args()
    gpu, rows = AbsentGPU.install(), {}
    print(f"{'':24s}{'forward':>10s}{'Triton’s':>10s}{'fwd+bwd':>10s}{'Triton’s':>10s}{'launches':>10s}")
    for name in args.specs:
        row = rows[name] = measure(name, gpu)
        print(
            f"{name:24s}{row['forward']:10.1f}{row['forward_by_triton']:10.1f}"
            f"{row['both']:10.1f}{row['both_by_triton']:10.1f}{row['launches']:10.0f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

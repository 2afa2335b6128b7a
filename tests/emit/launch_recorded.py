"""Run as a program: what a driver gets from launches by Triton's dispatch and from those without it, as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import triton

from dspace.runtime import offline
from dspace.runtime.absent import AbsentGPU, Launched
from dspace.runtime.load import load_file

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

SIZES = {"": (), "k": (16,), "v": (32,), "kv": (16, 32)}


def show(launched: list[Launched]) -> list:
    def one(arg: object) -> object:
        return [str(arg.dtype), list(arg.shape)] if isinstance(arg, torch.Tensor) else str(arg)

    return [[x.name, x.code, list(x.grid), [one(a) for a in x.args]] for x in launched]


def tensor(*shape: int, shift: int = 0) -> torch.Tensor:
    """Zeros whose address is a multiple of 16 bytes only without ``shift``."""
    flat = torch.zeros(torch.Size(shape).numel() + shift, dtype=torch.bfloat16)
    return flat[shift:].view(shape).requires_grad_()


def call(
    gpu: AbsentGPU, module: ModuleType, steps: int = 64, heads: int = 8, shift: int = 0, kept: list | None = None
) -> list:
    """What forward and backward of both forms launch; ``kept`` gets what they are given."""
    table = module.SPEC
    inputs = [tensor(2, steps, heads, *SIZES[v["axes"]], shift=shift) for v in table["inputs"]]
    parameters = [torch.ones(heads, *SIZES[p["axes"]]).requires_grad_() for p in table["parameters"]]
    if kept is not None:
        kept += [*inputs, *parameters]
    gpu.launched.clear()
    for form in ("chunk", "recurrent"):
        out = getattr(module, f"{form}_{table['name']}")(*inputs, *parameters)[0]
        torch.autograd.grad(out, [*inputs, *parameters], out, allow_unused=True)
    return show(gpu.launched)


def naming(direct: Callable[..., None], gpu: AbsentGPU) -> Callable[..., None]:
    """``direct``, with the tensors in the record whose addresses the driver got."""

    def launch(kernel, grid, pointers, numbers, fixed, **constants) -> None:  # noqa: ANN001
        direct(kernel, grid, pointers, numbers, fixed, **constants)
        last = gpu.launched[-1]
        given = [p if a is None or isinstance(a, torch.Tensor) or a == p.data_ptr() else a
                 for p, a in zip(pointers, last.args, strict=False)]  # fmt: skip
        gpu.launched[-1] = dataclasses.replace(last, args=(*given, *last.args[len(pointers) :]))

    return launch


def by_triton(kernel, grid, pointers, numbers, fixed, **constants) -> None:  # noqa: ANN001
    kernel[grid](*pointers, *numbers, *fixed, **constants)


def repeated(gpu: AbsentGPU, module: ModuleType, **given: int) -> list:
    """Of the second to fourth call of a kind, the first of which is recorded, what is launched; how many kinds are known."""
    found = []
    for _ in range(4):
        kept: list[torch.Tensor] = []
        call(gpu, module, **given, kept=kept)
        places = {t.data_ptr(): f"given {i}" for i, t in enumerate(kept)}

        def one(arg: object, places: dict[int, str] = places) -> str:
            address = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
            if isinstance(address, int) and address > 2**32:
                return places.get(address, "made")
            return str(address)

        found.append([[x.name, x.code, list(x.grid), [one(a) for a in x.args]] for x in gpu.launched])
    return [*found[1:], sum(isinstance(tape, tuple) for tape in module._TAPES.values())]


CASES: dict[str, dict[str, int]] = {
    "as before": {},
    "longer": {"steps": 80},
    "heads": {"heads": 16},
    "not aligned": {"shift": 1},
    "again": {},
}


def main() -> None:
    gpu, found = AbsentGPU.install(), {}
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)
    for name in sys.argv[1:]:
        module = load_file(KERNELS / f"{name}.py", f"launched_{name}")  # its own kernels, whatever a cache shares
        direct, results = naming(module._launch, gpu), {}
        module.__dict__["_launch"] = direct
        with offline.elsewhere(module):
            for label, given in CASES.items():
                call(gpu, module, **given)  # compiles, by Triton's dispatch
                before = len(compiled)  # since the start of this process
                ours = call(gpu, module, **given)
                module._TAPES.clear()
                module.__dict__["_launch"] = by_triton
                theirs = call(gpu, module, **given)
                module.__dict__["_launch"] = direct
                module._TAPES.clear()
                counts = {"before": before, "compiled": len(compiled) - before}
                results[label] = {"ours": ours, "theirs": theirs, "repeated": repeated(gpu, module, **given), **counts}
        found[name] = results
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

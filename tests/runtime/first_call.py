"""Run as a program: where the kernels of a first call and of its backward pass were compiled, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from triton.compiler.compiler import ASTSource

from dspace.runtime import first, offline, versions
from dspace.runtime.absent import AbsentGPU
from dspace.runtime.analysis import module_text
from dspace.runtime.cache import Cache
from dspace.runtime.load import load_file

HERE: list[str] = []
"""Kernels that this process compiled, not a forked one."""


def main() -> None:
    gpu, folder = AbsentGPU.install(), Path(sys.argv[1])
    path = folder / "m.py"
    path.write_text(module_text("simple_gla"))
    module = load_file(path, "first_simple_gla")
    cache, plain = Cache(folder / "cache"), dict(module._CORES)
    first.arm(module, cache)
    armed = {form for (device, form), core in module._CORES.items() if core is not plain[device, form]}
    leaves = [torch.zeros(1, 40, 2, *n, requires_grad=True) for n in ((16,), (16,), (16,), ())]
    seen = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return x

    original = ASTSource.make_ir

    def counted(self: ASTSource, *given: object, **named: object) -> object:
        HERE.append(self.fn.__name__)
        return original(self, *given, **named)

    with (
        mock.patch.object(ASTSource, "make_ir", counted),
        mock.patch.object(versions, "device_name", lambda device: "a GPU"),
        mock.patch("dspace.runtime.ahead._cores", lambda: 2),
        offline.elsewhere(module),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        counts = []
        for _ in range(2):
            out = module.chunk_simple_gla(*leaves)[0]
            torch.autograd.grad(out, leaves, out)
            counts.append((len(gpu.launched), seen))
        left = [form for form in armed if module._CORES["cuda", form] is not plain["cuda", form]]
    again = load_file(path, "again_simple_gla")
    first.arm(again, cache)
    first.disarm(again)
    report = {
        "armed": sorted(armed), "left": left,
        "here": HERE, "counts": counts, "launched": sorted({x.name for x in gpu.launched}),
        "noted": len(list((folder / "cache" / "calls").iterdir())),
        "disarmed": all(type(core).__name__ == "function" for core in again._CORES.values()),
    }  # fmt: skip
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()

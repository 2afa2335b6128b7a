"""Peak memory of forward + backward of a chunk form, counted without a GPU: what its host code keeps alive.

    python benchmarks/memory.py [SPEC ...]

The module runs on the CPU as if it were on an H100 (132 multiprocessors: they decide how long windows of time are) with
every launch left out, so that nothing is computed and no page of a tensor is touched. Every storage is counted once,
from the first operation that returns it until it is freed, in blocks of 512 bytes as PyTorch's allocator does; inputs,
cotangent and gradients included. ``peak`` of benchmarks/ratio_gpu.py gave 605.6 MiB where this gives 604.3.
"""

from __future__ import annotations

import sys
import weakref
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dspace
from dspace.runtime import offline

SHAPES = {"p760": (2, 4096, 16, 96, 192), "pow64": (8, 4096, 16, 64, 64), "p170": (8, 4096, 16, 48, 48)}
"""B, T, H, K, V of the Palimpsa paper."""


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive (``now``) and the most there were (``peak``) while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if place in self.known:
            return

        def freed(_: object) -> None:
            del self.known[place]
            self.now -= size

        self.known[place] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak(module: ModuleType, shape: tuple[int, int, int, int, int]) -> tuple[float, float, list[torch.Tensor]]:
    """One forward and backward pass of the chunk form, bf16 inputs of ``shape``: MiB that live at most, those of the
    inputs and the cotangent among them, and the leaves."""
    B, T, H, K, V = shape
    sizes = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    changed = {"_launch": lambda *_, **__: None, "_multiprocessors": lambda _: 132}
    own = {name: getattr(module, name) for name in changed}
    try:
        vars(module).update(changed)
        with offline.elsewhere(module), Live() as live:
            inputs = [torch.empty(B, T, H, *sizes[x["axes"]], dtype=torch.bfloat16) for x in module.SPEC["inputs"]]
            inputs += [torch.empty(H, *sizes[x["axes"]]) for x in module.SPEC["parameters"]]
            cotangent = torch.empty(B, T, H, V, dtype=torch.bfloat16)
            given, leaves = live.now, [x.requires_grad_() for x in inputs]
            getattr(module, f"chunk_{module.SPEC['name']}")(*leaves)[0].backward(cotangent)
    finally:
        vars(module).update(own)
    return live.peak / 2**20, given / 2**20, leaves


if __name__ == "__main__":
    for name in sys.argv[1:] or ["palimpsa"]:
        module = dspace.compile(name, certify=False)
        print(name, *(f"{label} {peak(module, shape)[0]:.1f} MiB" for label, shape in SHAPES.items()), sep="  ")

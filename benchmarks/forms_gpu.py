"""Forms of one variant on a GPU beside each other: which of them a call should take, and where.

    python benchmarks/forms_gpu.py [SPEC ...] [--only B,T,H,K,V ...] [--json FILE]

Of states that compose (metaplastic_gla): a sequence a program, and all chunks at once. Of rank-one transitions
(gated_delta_net, kda, delta_net): token by token, and chunkwise, which no module has yet (dspace.emit.triton.delta). bf16
inputs, medians of ``triton.testing.do_bench`` in milliseconds, forward and forward + backward; peak memory in MiB; how far
results and gradients are from those of the first form. A shape is timed only after both forms agree with the float64
reference at its head sizes.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from chunkwise_gpu import LIMIT, draw, time, worst_error
from ratio_gpu import peak

import dspace
import dspace.math
import dspace.spec
from dspace.emit import module
from dspace.emit.triton import features
from dspace.emit.triton import section as triton_section
from dspace.runtime.load import load_file

SPECS = ("metaplastic_gla", "gated_delta_net", "kda", "delta_net")
SHAPES = [
    (1, 4096, 1, 64, 64), (1, 4096, 4, 64, 64), (1, 65536, 2, 64, 64), (1, 4096, 16, 64, 64), (1, 2048, 8, 128, 128),
    (2, 4096, 16, 64, 64), (4, 4096, 16, 64, 64), (64, 512, 8, 16, 32), (8, 4096, 16, 64, 64), (2, 4096, 16, 96, 192),
]  # fmt: skip
DELTA_SHAPES = [(4, 4096, 16, 128, 128), (1, 4096, 16, 64, 64), (64, 512, 8, 16, 32)]
Shape = tuple[int, int, int, int, int]
Form = tuple[str, ModuleType, Callable[..., Any]]


def delta_module(name: str) -> ModuleType:
    """The module of a rank-one transition with its chunkwise form."""
    spec = dspace.spec.load(name)
    analysis = dspace.math.analyse(spec)

    def target(a: Any) -> Any:
        made = features.section(a, delta=True)
        if made is None:
            raise SystemExit(f"{name} has no chunkwise form of class d")
        return triton_section.joined(made, a)

    path = Path(tempfile.mkdtemp()) / f"{name}_forms.py"
    path.write_text(module.emit(spec, analysis, [target]))
    return load_file(path, path.stem)


def forms(name: str) -> Iterator[Form]:
    """Name of each form, the module, and its function; a form holds until the next one is asked for."""
    compiled = dspace.compile(name)
    if compiled.SPEC["class"] == "d":
        made = delta_module(name)
        yield "token by token", made, getattr(made, f"recurrent_{name}")
        yield "chunkwise", made, getattr(made, f"chunk_{name}")
        return
    usual = compiled._segmented
    for form, chunks in (("a sequence a program", False), ("all chunks at once", True)):
        compiled._segmented = functools.partial(lambda chunks, *_: chunks, chunks)
        compiled._TAPES.clear()
        yield form, compiled, getattr(compiled, f"chunk_{name}")
    compiled._segmented = usual
    compiled._TAPES.clear()


def results(op: Callable[..., Any], inputs: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    o = op(*inputs)[0]
    return [o.detach().float(), *(g.float() for g in torch.autograd.grad(o, inputs, cotangent))]


def row(name: str, shape: Shape) -> dict[str, Any]:
    found: dict[str, Any] = {"spec": name, "shape": shape}
    first: list[torch.Tensor] = []
    for form, made, op in forms(name):
        error = worst_error(made, *shape[-2:])
        if not error < LIMIT:
            found[form] = {"wrong": error}
            continue
        torch.manual_seed(0)
        inputs = draw(made, shape)
        cotangent = torch.randn(*shape[:3], shape[-1], device="cuda", dtype=inputs[0].dtype)
        now = results(op, inputs, cotangent)
        first = first or now
        apart = max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in zip(first, now, strict=True))
        most = peak(op, inputs)
        forward, both = time(op, inputs)
        found[form] = {"forward": forward, "forward_backward": both, "peak_MiB": most, "apart": apart}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--only", nargs="+", metavar="B,T,H,K,V", help="these shapes")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    rows = []
    for name in asked.specs:
        own = DELTA_SHAPES if dspace.compile(name).SPEC["class"] == "d" else SHAPES
        for shape in [tuple(map(int, s.split(","))) for s in asked.only] if asked.only else own:
            rows.append(row(name, shape))  # type: ignore[arg-type]
            print(name, *shape)
            for form, numbers in list(rows[-1].items())[2:]:
                print(f"    {form:22}", {k: float(f"{v:.4g}") for k, v in numbers.items()}, flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

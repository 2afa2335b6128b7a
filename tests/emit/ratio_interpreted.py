"""Run as a program under TRITON_INTERPRET=1: chunk cores of class c against the float64 reference, errors as JSON.

As :mod:`triton_interpreted`, with the section of class c, and with windows of time so short that several are needed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import types
from pathlib import Path

import torch

import dspace.math
import dspace.spec
from dspace.emit import module
from dspace.emit.triton import ratio

FOLDER = tempfile.mkdtemp()


def build(text: str) -> types.ModuleType:
    """The generated module of a spec given as text or built-in name, with the section of class c only."""
    spec = dspace.spec.loads(text) if "\n" in text else dspace.spec.load(text)
    source = module.emit(spec, dspace.math.analyse(spec), [ratio.section])
    # As tensor cores sum, by a product with ones and zeros: what is not finite spreads to other sums.
    apart = "return tl.where(column_8 == i_g, z + _sum_columns(x, FAST), z)"
    together = "return z + _sum_columns(x, FAST) * (column_8 == i_g).to(tl.float32)"
    assert apart in source
    source = source.replace(apart, together)
    # Triton reads the source of its kernels from the file.
    file = Path(FOLDER) / f"ratio_{spec.name}.py"
    file.write_text(source)
    made = types.ModuleType(file.stem)
    made.__file__ = str(file)
    sys.modules[made.__name__] = made
    exec(compile(source, made.__file__, "exec"), made.__dict__)
    return made


def of_shut_gates(made: types.ModuleType, gate: float) -> float:
    """The largest gradient of a log decay of a token that forgets all, beside the largest of the others."""
    from triton_interpreted import draw

    generator, sizes = torch.Generator().manual_seed(1), {"": (), "k": (12,), "v": (5,)}
    inputs = [draw(v["domain"], (2, 35, 2, *sizes[v["axes"]]), generator) for v in made.SPEC["inputs"]]
    parameters = [draw(p["domain"], (2, *sizes[p["axes"]]), generator) for p in made.SPEC["parameters"]]
    decay = next(x for x, v in zip(inputs, made.SPEC["inputs"], strict=True) if v["domain"] == "nonpositive")
    decay.view(-1)[::3] = gate
    decay.requires_grad_()
    states = [None for _ in made.SPEC["states"]]
    output, *_ = made._CORES["cuda", "chunk"](*inputs, *parameters, *states, 0.4, None, False)
    (grad,) = torch.autograd.grad(output, [decay], torch.randn(output.shape, generator=generator))
    shut = decay.detach() == gate
    return float(grad[shut].abs().max() / grad[~shut].abs().max())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from triton_interpreted import errors

    found: dict[str, dict[str, float]] = {}
    for case in json.load(sys.stdin):
        try:
            made = build(case["spec"])
            if case["window"]:
                made.__dict__["_windows"] = lambda T, *_, size=case["window"]: [*range(0, T, size), T]
            found[case["id"]] = errors(made, case["steps"], case["sizes"], case["packed"], lean=case["lean"])
            if case.get("gate"):
                found[case["id"]]["of shut gates"] = of_shut_gates(made, case["gate"])
        except Exception as error:  # reported by the test that asked
            traceback.print_exc(limit=-3)
            found[case["id"]] = {f"{type(error).__name__}: {error}"[:300]: float("inf")}
    json.dump(found, sys.stdout)

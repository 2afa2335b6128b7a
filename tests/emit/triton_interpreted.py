"""Run as a program under TRITON_INTERPRET=1: every case's chunk core against the float64 reference, errors as JSON.

Triton decides when it is imported whether it interprets, hence a process of its own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import tempfile
import traceback
import types

import torch

import dspace.math
import dspace.spec
from dspace.emit import module
from dspace.emit.base import Section
from dspace.emit.triton import features
from dspace.emit.triton.section import joined

PACKED = [0, 0, 37, 38, 75]


def delta_section(analysis: dspace.math.Analysis) -> Section:
    made = features.section(analysis, delta=True)
    assert made is not None
    return joined(made, analysis)


def build(text: str, delta: bool = False) -> types.ModuleType:
    """The generated module of a spec given as text or built-in name, with the Triton section only; ``delta``: of class d."""
    spec = dspace.spec.loads(text) if "\n" in text else dspace.spec.load(text)
    analysis = dspace.math.analyse(spec)
    source = module.emit(spec, analysis, [delta_section if delta else features.section])
    # Triton reads the source of its kernels from the file.
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    atexit.register(os.unlink, file.name)
    made = types.ModuleType(f"generated_{spec.name}")
    made.__file__ = file.name
    sys.modules[made.__name__] = made
    exec(compile(source, file.name, "exec"), made.__dict__)
    return made


def draw(domain: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    if domain in ("positive", "nonnegative"):
        return x.abs() + 0.1
    if domain in ("nonpositive", "negative"):
        return -0.5 * x.abs()
    return torch.sigmoid(x) if domain == "unit" else x


def errors(
    made: types.ModuleType,
    steps: int,
    sizes: dict[str, int],
    packed: bool,
    gates: list[float] | None = None,
    lean: bool = False,
) -> dict[str, float]:
    """Relative error of each result and gradient of the chunk core; of ``gates``, one of each in three log decays.

    ``lean``: without initial and final states, and nothing but the output has a gradient.
    """
    generator = torch.Generator().manual_seed(steps)
    heads, batch = 2, 1 if packed else 2
    sequences = len(PACKED) - 1 if packed else batch
    spec = made.SPEC

    def shape(axes: str, *lead: int) -> tuple[int, ...]:
        return (*lead, *(sizes[a] for a in axes))

    tensors = {}
    for v in spec["inputs"]:
        tensors[v["name"]] = draw(v["domain"], shape(v["axes"], batch, steps, heads), generator)
        if gates and v["domain"] == "nonpositive":
            for i, gate in enumerate(gates):
                tensors[v["name"]].view(-1)[i::3] = gate
    for p in spec["parameters"]:
        tensors[p["name"]] = draw(p["domain"], shape(p["axes"], heads), generator)
    for s in spec["states"]:
        state = draw(s["domain"], shape(s["axes"], sequences, heads), generator)
        tensors["state " + s["name"]] = state * 0 if lean else state
    assert not packed or steps == PACKED[-1], "a core believes its offsets: the check is the public function's"
    offsets = torch.tensor(PACKED) if packed else None
    chunk = made._CORES["cuda", "chunk"]
    results = []
    weights: list[torch.Tensor] = []
    for core, dtype in ((made._reference_core, torch.float64), (chunk, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
        rest: tuple = 0.4, offsets, spec["variance"]
        if lean:
            leaves = leaves[: -len(spec["states"])]
            empty = [t.to(dtype) if core is made._reference_core else None for n, t in tensors.items() if "state" in n]
            o, _, *final = core(*leaves, *empty, *rest, *([] if core is made._reference_core else [False]))
            assert core is made._reference_core or not any(t is not None and t.dim() == 4 for t in final)
            outputs = [o]
        else:
            o, variance, *final = core(*leaves, *rest)
            outputs = [t for t in (o, variance, *final) if t is not None]
        weights = weights or [torch.randn(t.shape, generator=generator) for t in outputs]
        loss = sum((w.to(dtype) * t).sum() for w, t in zip(weights, outputs, strict=True))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        results.append([t.detach().double() for t in (*outputs, *grads)])
    names = [f"result {i}" for i in range(len(weights))] + [f"d {name}" for name in tensors]
    pairs = list(zip(names[: len(results[0])], *results, strict=True))
    with torch.no_grad():  # a core may go another way where nothing is differentiated
        leaves = [t.to(torch.float32) for n, t in tensors.items()]
        pairs.append(("result without gradients", results[0][0], chunk(*leaves, 0.4, offsets, False)[0].double()))
    return {n: float((a - b).norm() / a.norm().clamp(min=1e-12)) for n, a, b in pairs}


if __name__ == "__main__":
    found: dict[str, dict[str, float]] = {}
    for case in json.load(sys.stdin):
        try:
            made = build(case["spec"], case.get("delta", False))
            settings = dict(case.get("settings", {}))
            if "_CHUNKS" in settings:  # tokens a chunk of a triangular system
                proposals = [n for n in vars(made) if n.startswith("_erase_proposals_")]
                tiles = (settings.pop("_CHUNKS"), 16, 4, 1)
                vars(made).update({n: lambda *_, tiles=tiles: [tiles] for n in proposals})
            vars(made).update(settings)
            torch.compiler.is_compiling = functools.partial(bool, case.get("operators", False))
            found[case["id"]] = errors(
                made, case["steps"], case["sizes"], case["packed"], case.get("gates"), case.get("lean", False)
            )
        except Exception as error:  # reported by the test that asked
            traceback.print_exc(limit=-3)
            found[case["id"]] = {f"{type(error).__name__}: {error}"[:300]: float("inf")}
    json.dump(found, sys.stdout)

"""Classes a, b and fold on a GPU: forward and forward + backward, beside fla-core in the same run where it is installed.

    python benchmarks/chunkwise_gpu.py [--only NAME ...] [--peer] [--seconds N] [--json FILE]

bf16 inputs, medians of ``triton.testing.do_bench``, milliseconds. A variant is timed only after its outputs and every
gradient agree with the float64 reference on a small problem; otherwise its row says so instead of a time. ``graph_``:
replayed from a CUDA graph, without the time that Python takes to launch.
fla-core autotunes for minutes at its first call: what it tries is compiled before, by a process for each of its
operators and shapes, and its own choice is made later, on an idle GPU. It refuses the gated backward of simple_gla on
Hopper with Triton 3.4 to 3.7.0, which miscompile it: the refusal is lifted here, to time it and nothing else. Its
backward at the shape ``mqar`` reads memory that is not its own there, and is not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import triton

import dspace

SHAPES = {"large": (4, 4096, 16, 128, 128), "mqar": (64, 512, 8, 16, 32)}
VARIANTS = ("simple_gla", "mamba2", "gla", "palimpsa_folded")
PEERS = {"simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla"), "gla": ("fla.ops.gla", "chunk_gla")}
PEER_BACKWARD = {"large"}
LIMIT = 8e-3


def draw(module: ModuleType, shape: tuple[int, int, int, int, int], gate: float = 0.1) -> list[torch.Tensor]:
    """Inputs and parameters: keys and queries of unit length, log decays in (-gate, 0), the rest in (0, 1)."""
    batch, steps, heads, size_k, size_v = shape
    sizes = {"": (), "k": (size_k,), "v": (size_v,)}
    made = []
    for v in module.SPEC["inputs"]:
        full = (batch, steps, heads, *sizes[v["axes"]])
        if v["domain"] == "nonpositive":
            made.append(-gate * torch.rand(full, device="cuda"))
        elif v["domain"] in ("nonnegative", "unit"):
            made.append(torch.rand(full, device="cuda").bfloat16())
        else:
            x = torch.randn(full, device="cuda")
            made.append((torch.nn.functional.normalize(x, dim=-1) if v["axes"] == "k" else x).bfloat16())
    made += [torch.rand((heads, *sizes[p["axes"]]), device="cuda") + 0.5 for p in module.SPEC["parameters"]]
    return [t.requires_grad_() for t in made]


def worst_error(module: ModuleType, size_k: int, size_v: int) -> float:
    """Largest relative error of outputs and gradients against the float64 reference, 130 tokens.

    Of 16 heads: the gradient of a parameter is one number a head, a sum over all tokens and channels that nearly
    cancels for some heads, and beside which rounding is then large however well a kernel computes.
    """
    torch.manual_seed(0)
    inputs = draw(module, (2, 130, 16, size_k, size_v), 0.3)
    name = module.SPEC["name"]
    results = []
    weight = None
    for form, leaves in (("reference", [t.detach().double().requires_grad_() for t in inputs]), ("chunk", inputs)):
        o, _ = getattr(module, f"{form}_{name}")(*leaves)
        weight = torch.randn_like(o) if weight is None else weight
        results.append([o, *torch.autograd.grad((o * weight.to(o.dtype)).sum(), leaves)])
    pairs = zip(*results, strict=True)
    return max(float((b.double() - a).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)


def time(op: Callable[..., tuple], inputs: list[torch.Tensor], backward: bool = True) -> tuple[float, float]:
    """Median milliseconds of forward, and of forward + backward (nan without)."""

    def bench(call: Callable[[], object]) -> float:
        return triton.testing.do_bench(call, warmup=25, rep=150, quantiles=[0.5])

    with torch.no_grad():
        forward = bench(lambda: op(*inputs))
    if not backward:
        return forward, float("nan")
    cotangent = torch.randn_like(op(*inputs)[0])

    def both() -> None:
        for t in inputs:
            t.grad = None
        op(*inputs)[0].backward(cotangent)

    return forward, bench(both)


def graphed(op: Callable[..., tuple], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """Median milliseconds of the same replayed from a CUDA graph: without the time that the host takes to launch."""
    bare = [t.detach() for t in inputs]
    cotangent = torch.randn_like(op(*bare)[0])
    found = []
    for call in (lambda: op(*bare), lambda: torch.autograd.grad(op(*inputs)[0], inputs, cotangent)):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        found.append(triton.testing.do_bench(graph.replay, warmup=25, rep=150, quantiles=[0.5]))
        del graph
    return found[0], found[1]


def peer(name: str) -> Callable[..., tuple] | None:
    """fla-core's operator for the same variant; None without it."""
    try:
        module, function = PEERS[name]
        op = getattr(__import__(module, fromlist=[function]), function)
        from fla.ops.common import chunk_o
    except (KeyError, ImportError):
        return None
    if hasattr(chunk_o, "TRITON_ABOVE_3_7_1"):
        chunk_o.TRITON_ABOVE_3_7_1 = True
    return lambda q, k, v, g: op(q, k, v, g=g)


def try_peer(name: str, label: str) -> None:
    """One pass of fla-core's operator, so that all that its autotuner may choose from is compiled."""
    op = peer(name)
    if op is not None:
        inputs = draw(dspace.compile(name), SHAPES[label])
        o = op(*inputs)[0]
        if label in PEER_BACKWARD:
            o.sum().backward()
        torch.cuda.synchronize()


def compile_peers(names: list[str], seconds: float) -> None:
    """:func:`try_peer` of these variants and all shapes at once, each in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--try-peer"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([*command, n, s], **quiet) for n in names for s in SHAPES]  # type: ignore[call-overload]
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants")
    arguments.add_argument("--peer", action="store_true", help="time fla-core beside (autotunes for minutes)")
    arguments.add_argument("--seconds", type=float, default=200.0, help="for compiling what fla-core tries")
    arguments.add_argument(
        "--try-peer", nargs=2, metavar=("VARIANT", "SHAPE"), help="compile for fla-core, time nothing"
    )
    arguments.add_argument("--json", help="also write the rows there")
    asked = arguments.parse_args()
    if asked.try_peer:
        return try_peer(*asked.try_peer)
    if asked.peer:
        os.environ["FLA_CACHE_RESULTS"] = "0"  # what is chosen beside other processes is no choice
        compile_peers([n for n in asked.only if n in PEERS], asked.seconds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    rows = []
    for name in asked.only:
        module = dspace.compile(name)
        for label, shape in SHAPES.items():
            error = worst_error(module, *shape[-2:])
            row = {"variant": name, "shape": label, "sizes": shape, "error": error}
            if error < LIMIT:
                op = getattr(module, f"chunk_{name}")
                row["fwd"], row["fwd_bwd"] = time(op, draw(module, shape))
                row["graph_fwd"], row["graph_fwd_bwd"] = graphed(op, draw(module, shape))
                found = peer(name) if asked.peer else None
                if found is not None:
                    row["peer_fwd"], row["peer_fwd_bwd"] = time(found, draw(module, shape), label in PEER_BACKWARD)
            rows.append(row)
            numbers = {k: f"{v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "error"}
            print(
                f"{name:16} {label:6} error {error:.1e}", numbers if error < LIMIT else "WRONG, not timed", flush=True
            )
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

"""Calls to time, clocks for them, and what this machine can do at best: the measured roofs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dspace.math.roofline import Gpu

Run = Callable[[], object]


def arguments(
    table: dict[str, Any], sizes: tuple[int, int, int, int, int], dtype: str, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs with parameters, and initial states, of ``sizes = (B, T, H, K, V)`` in the domains of a module's SPEC.

    Keys and queries have unit length; log decays lie in (-0.1, 0) and are float32, as are parameters and states.
    """
    B, T, H, K, V = sizes
    channels = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}

    def drawn(variable: dict[str, Any], *lead: int) -> Tensor:
        shape = (*lead, *channels[variable["axes"]])
        match variable["domain"]:
            case "nonpositive" | "negative":
                return -0.1 * torch.rand(shape, device=device).clamp_(min=1e-4)
            case "nonnegative" | "unit":
                return torch.rand(shape, device=device)
            case "positive":
                return torch.rand(shape, device=device) + 0.5
        x = torch.randn(shape, device=device)
        return torch.nn.functional.normalize(x, dim=-1) if variable["axes"] == "k" else x

    given = []
    for v in table["inputs"]:
        gate = v["domain"] in ("nonpositive", "negative")
        given.append(drawn(v, B, T, H).to(torch.float32 if gate else getattr(torch, dtype)))
    given += [drawn(p, H) for p in table["parameters"]]
    return given, [drawn({**s, "domain": "nonnegative"}, B, H) for s in table["states"]]


def forward_of(function: Callable[..., Any], leaves: list[Tensor], **options: Any) -> Run:
    """A forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return function(*leaves, **options)

    return run


def both_of(function: Callable[..., Any], leaves: list[Tensor]) -> Run:
    """A forward pass and the gradients of everything, for one fixed cotangent."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    cotangent: list[Tensor] = []

    def run() -> object:
        output = function(*leaves)[0]
        if not cotangent:
            cotangent.append(torch.randn_like(output))
        return torch.autograd.grad(output, leaves, cotangent[0], allow_unused=True)

    return run


def calls(module: ModuleType, keys: int, values: int, dtype: str, device: str = "cuda") -> list[Run]:
    """Calls that use every kernel family of ``module``: whole sequences, token by token, one token."""
    table = module.SPEC
    long, _ = arguments(table, (4, 2048, 16, keys, values), dtype, device)
    short, _ = arguments(table, (4, 128, 16, keys, values), dtype, device)
    one, states = arguments(table, (64, 1, 16, keys, values), dtype, device)
    chunk, recurrent = (getattr(module, f"{form}_{table['name']}") for form in ("chunk", "recurrent"))
    decode = forward_of(recurrent, one, initial_state=states, output_final_state=True)
    return [both_of(chunk, long), both_of(recurrent, short), decode]


def clock(run: Run, device: str, repeats: int = 5) -> float:
    """Median seconds of ``run``: on a GPU with its cache cleared in between (``triton.testing.do_bench``)."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(run, warmup=25, rep=max(20 * repeats, 100), quantiles=[0.5]))
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def graphed(run: Run, repeats: int = 20) -> float:
    """Median seconds of ``run`` replayed from a CUDA graph: the time of the GPU without that of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times += [1e-3 * start.elapsed_time(end)] if i >= 2 else []
    return statistics.median(times)


def peak_memory(run: Run, device: str) -> int | None:
    """Bytes that ``run`` has allocated at most at one time, beyond what was there; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured_roofs(device: str, nbytes: int = 1 << 30) -> Gpu:
    """What this machine reaches: bytes a second of a copy that moves ``nbytes``, matmul, fp32 and exponential rates.

    The fp32 rate of a GPU is computed, from its multiprocessors and clock: no library call is bound by it.
    """
    from dspace.math.roofline import Gpu
    from dspace.runtime.versions import device_name

    gpu = device.startswith("cuda")
    nbytes = nbytes if gpu else min(nbytes, 1 << 28)
    source = torch.ones(max(nbytes // 8, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / clock(lambda: target.copy_(source), device)
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    tensor = 2 * size**3 / clock(lambda: a @ b, device)
    small = torch.rand(1 << 12, device=device)
    if not gpu:
        special = small.numel() / clock(lambda: torch.exp(small), device, 50)
        return Gpu(device_name("cpu"), bandwidth, tensor, tensor, special)
    properties = torch.cuda.get_device_properties(0)
    cycles = properties.multi_processor_count * 1e3 * getattr(properties, "clock_rate", 1_755_000)
    return Gpu(device_name("cuda"), bandwidth, tensor, 2 * 128 * cycles, 16 * cycles)

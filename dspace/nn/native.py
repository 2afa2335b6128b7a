"""Native CPU loops for the two small operations that dominate a layer on a processor: short convolution, row norm.

PyTorch runs them as a dozen passes over memory; here each direction is one. Used for float32 and float64 on a CPU
when numba is there, see :func:`usable`; everything has its PyTorch form in :mod:`dspace.nn.functions`. Work is cut
into a number of parts that does not depend on the number of threads, so results do not either.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARTS = 32
"""Into how many parts the rows of a norm are cut."""

WORTH_THREADS = 1 << 18
"""Numbers in a tensor from which starting threads pays."""


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def usable(x: Tensor) -> bool:
    """Whether the native loops serve ``x`` here and now."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and _has_numba()
    )


def conv_forward(x: Tensor, history: Tensor, taps: Tensor) -> Tensor:
    """``y[t] = sum_j taps[-1 - j] * x[t - j]``; ``x`` ``[B, T, C]``, ``history`` ``[B, size - 1, C]`` before it."""
    x, history, taps = x.contiguous(), history.contiguous(), taps.contiguous()
    y = torch.empty_like(x)
    _run(_conv_forward, len(x), x, history, taps, y)
    return y


def conv_backward(x: Tensor, history: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``history`` and ``taps``."""
    x, history, taps, dy = x.contiguous(), history.contiguous(), taps.contiguous(), dy.contiguous()
    dx, dhistory = torch.empty_like(x), torch.zeros_like(history)
    dtaps = taps.new_zeros(len(x), *taps.shape)
    _run(_conv_backward, len(x), x, history, taps, dy, dx, dhistory, dtaps)
    return dx, dhistory, dtaps.sum(0)


def unit_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x * r * weight`` with ``r = 1 / sqrt(sum(x**2) + eps)`` over the last axis; returns it and ``r`` ``[rows]``."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    r = x.new_empty(rows)
    _run(_unit_forward, PARTS, x.view(rows, -1), weight, _like(eps, x), y.view(rows, -1), r)
    return y, r


def unit_backward(x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``."""
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    dweight = weight.new_zeros(PARTS, *weight.shape)
    rows = len(r)
    _run(_unit_backward, PARTS, x.view(rows, -1), weight, r, dy.view(rows, -1), dx.view(rows, -1), dweight)
    return dx, dweight.sum(0)


def _like(value: float, x: Tensor) -> Any:
    return np.asarray(value, dtype=np.float32 if x.dtype == torch.float32 else np.float64)


@functools.cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """``loop`` compiled by numba, kept on disk for the next process where there is room."""
    import numba
    from numba.core.compiler import CompilerBase, DefaultPassBuilder

    class DistinctArrays(CompilerBase):
        """The usual compiler, told that arrays do not overlap: the inner loops vectorise only then."""

        def define_pipelines(self) -> list[Any]:
            self.state.flags.noalias = True
            return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},
        "pipeline_class": DistinctArrays,
    }
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # nowhere to keep the compiled code
        return numba.njit(**options)(loop)


def _run(loop: Callable[..., None], parts: int, *arguments: Any) -> None:
    """Do parts ``0..parts - 1`` on as many threads as PyTorch may use."""
    compiled = _compiled(loop)
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = min(torch.get_num_threads(), parts) if arrays[0].size >= WORTH_THREADS else 1
    if threads == 1:
        compiled(0, parts, *arrays)
        return
    bounds = [parts * i // threads for i in range(threads + 1)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(compiled, a, b, *arrays) for a, b in zip(bounds, bounds[1:], strict=False)]
        for job in jobs:
            job.result()


def _conv_forward(first, last, x, history, taps, y):  # type: ignore[no-untyped-def]
    size, channels = taps.shape
    for b in range(first, last):
        for t in range(x.shape[1]):
            for c in range(channels):
                y[b, t, c] = taps[size - 1, c] * x[b, t, c]
            for j in range(1, size):
                if t >= j:
                    for c in range(channels):
                        y[b, t, c] += taps[size - 1 - j, c] * x[b, t - j, c]
                else:
                    for c in range(channels):
                        y[b, t, c] += taps[size - 1 - j, c] * history[b, size - 1 + t - j, c]


def _conv_backward(first, last, x, history, taps, dy, dx, dhistory, dtaps):  # type: ignore[no-untyped-def]
    size, channels = taps.shape
    for b in range(first, last):
        for t in range(x.shape[1]):
            for c in range(channels):
                dx[b, t, c] = taps[size - 1, c] * dy[b, t, c]
                dtaps[b, size - 1, c] += x[b, t, c] * dy[b, t, c]
            for j in range(1, size):
                if t >= j:
                    for c in range(channels):
                        dx[b, t - j, c] += taps[size - 1 - j, c] * dy[b, t, c]
                        dtaps[b, size - 1 - j, c] += x[b, t - j, c] * dy[b, t, c]
                else:
                    for c in range(channels):
                        dhistory[b, size - 1 + t - j, c] += taps[size - 1 - j, c] * dy[b, t, c]
                        dtaps[b, size - 1 - j, c] += history[b, size - 1 + t - j, c] * dy[b, t, c]


def _unit_forward(first, last, x, weight, eps, y, r):  # type: ignore[no-untyped-def]
    rows, size = x.shape
    for i in range(rows * first // PARTS, rows * last // PARTS):
        total = eps[()]
        for c in range(size):
            total += x[i, c] * x[i, c]
        scale = 1 / np.sqrt(total)
        r[i] = scale
        for c in range(size):
            y[i, c] = x[i, c] * scale * weight[c]


def _unit_backward(first, last, x, weight, r, dy, dx, dweight):  # type: ignore[no-untyped-def]
    rows, size = x.shape
    for part in range(first, last):
        for i in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            scale = r[i]
            total = scale * 0
            for c in range(size):
                total += x[i, c] * weight[c] * dy[i, c]
            total *= scale * scale
            for c in range(size):
                dx[i, c] = scale * (weight[c] * dy[i, c] - x[i, c] * total)
                dweight[part, c] += x[i, c] * scale * dy[i, c]

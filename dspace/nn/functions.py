"""Tensor functions of layer recipes, and the short convolution with its carried state."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspace.nn import native

_TRITON = importlib.util.find_spec("triton") is not None


class _Unit(torch.autograd.Function):
    """``x * r * weight``, ``r = rsqrt(sum(x**2) + eps)`` over the last axis, in float32 at least within.

    Backward, with ``u = x * r`` and ``w = weight * dy``: ``dx = r * (w - u * sum(u * w))``, ``dweight = sum(u * dy)``.
    That keeps one number of each row, where the gradient that a compiler makes by itself keeps ``size``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.native = native.usable(x) and (weight is None or weight.ndim == 1)
        if ctx.native:
            y, r = native.unit_forward(x, x.new_ones(x.shape[-1]) if weight is None else weight, eps)
        else:
            wide = x.to(_wide(x))
            r = torch.rsqrt((wide * wide).sum(-1, keepdim=True) + eps)
            y = wide * r if weight is None else wide * r * weight
        ctx.save_for_backward(x, weight, r)
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (dy,) = grads
        x, weight, r = ctx.saved_tensors
        if ctx.native:
            dx, summed = native.unit_backward(x, x.new_ones(x.shape[-1]) if weight is None else weight, r, dy)
            return dx, None if weight is None else summed, None
        dy, u = dy.to(r.dtype), x.to(r.dtype) * r
        w = dy if weight is None else dy * weight
        dx = torch.addcmul(w, u, (u * w).sum(-1, keepdim=True), value=-1) * r
        dweight = (u * dy).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), dweight, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unit(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(sum(x**2) + eps) * weight``; ``weight`` ``[size]``, or one for each row of the batch, ``[rows, 1, 1, size]``."""
    return _Unit.apply(x, None if weight is None else weight.to(_wide(x)), eps)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / |x|`` over the last axis, finite at zero."""
    return _unit(x, None, eps)


class HeadNorm(torch.nn.Module):
    """RMS normalisation of each head with a learned weight ``[size]``: ``x / sqrt(mean(x**2) + eps) * weight``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        # x / sqrt(mean + eps) = sqrt(size) * x / sqrt(sum + size * eps)
        weight = per_row(self.weight, len(x))[..., None, :] if self.weight.ndim == 2 else self.weight
        return _unit(x, weight * self.size**0.5, self.size * self.eps)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": F.elu,
    "l2norm": l2norm,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "neg": lambda x: -x,
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "**": lambda x, y: x**y,
}


def per_row(value: Tensor, rows: int) -> Tensor:
    """``value`` ``[S, ...]`` of ``S`` stacked trials, for a batch of ``rows`` sequences: ``[rows, 1, ...]``.

    Rows come trial by trial. The 1 stands for time.
    """
    trials = len(value)
    return value[:, None].expand(trials, rows // trials, *value.shape[1:]).flatten(0, 1).unsqueeze(1)


class _ByOwn(torch.autograd.Function):
    """``x w'`` of each trial. PyTorch's own makes the gradient of ``w`` transposed, which what uses it then pays for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx = torch.bmm(dy, weight) if ctx.needs_input_grad[0] else None
        return dx, torch.bmm(dy.mT, x) if ctx.needs_input_grad[1] else None


def by_own(x: Tensor, weight: Tensor) -> Tensor:
    """Rows ``x`` ``[S, rows, in]`` of each trial by its own ``weight`` ``[S, out, in]``, in autocast's dtype if any."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
    return _ByOwn.apply(x, weight)


def spread(value: Tensor, axes: str, onto: str) -> Tensor:
    """Insert singleton dimensions so that ``value`` ``[..., *axes]`` broadcasts against ``[..., *onto]``."""
    for back, axis in enumerate(reversed(onto)):
        if axis not in axes:
            value = value.unsqueeze(-1 - back)
    return value


class _CausalConv(torch.autograd.Function):
    """Depthwise causal convolution of ``x`` ``[B, T, C]`` behind ``history`` ``[B, size - 1, C]``, taps ``[size, C]``.

    As shifted multiply-adds: on a CPU ``conv1d`` with groups takes several times as long, backward above all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, history: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, history, taps)
        ctx.native = native.usable(x)
        if ctx.native:
            return native.conv_forward(x, history, taps)
        whole, length = torch.cat([history, x], 1), x.shape[1]
        y = x * taps[-1]
        for j in range(len(taps) - 1):
            y.addcmul_(whole[:, j : j + length], taps[j])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (dy,) = grads
        x, history, taps = ctx.saved_tensors
        if ctx.native:
            return native.conv_backward(x, history, taps, dy)
        whole, length, past = torch.cat([history, x], 1), x.shape[1], history.shape[1]
        d_whole = torch.zeros_like(whole)
        for j in range(len(taps)):
            d_whole[:, j : j + length].addcmul_(dy, taps[j])
        dtaps = torch.stack([(whole[:, j : j + length] * dy).sum((0, 1)) for j in range(len(taps))])
        return d_whole[:, past:], d_whole[:, :past], dtaps


def causal_conv(x: Tensor, taps: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convolve ``x`` ``[B, T, C]`` over time with ``taps`` ``[size, C]`` (the last tap is the present token).

    ``cache`` ``[B, size - 1, C]`` holds the inputs before ``x`` (zeros when None). Returns the result and the
    cache for what follows. ``taps`` ``[S, size, C]`` are those of ``S`` stacked trials.
    """
    return conv_of_some(x, taps, cache)[:2]


def conv_of_some(x: Tensor, taps: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`causal_conv` of as many channels of ``x`` as ``taps`` have, its cache, and the other channels as they are."""
    past, channels = taps.shape[-2] - 1, taps.shape[-1]
    first, rest, length = x[..., :channels], x[..., channels:], x.shape[1]
    history = x.new_zeros(len(x), past, channels) if cache is None else cache.to(x.dtype)
    tail = first[:, length - past :] if length >= past else torch.cat([history, first], 1)[:, length:]
    if taps.ndim == 2 and not torch.compiler.is_compiling():
        y = _CausalConv.apply(first, history, taps.to(x.dtype))
    elif cache is None and x.is_cuda and _TRITON:
        y, rest = _FusedConv.apply(x, taps)
    else:
        y = _shifted_sum(first, history, taps)
    return y, tail, rest


def _shifted_sum(x: Tensor, history: Tensor | None, taps: Tensor) -> Tensor:
    """The convolution in formulas, which a compiler fuses with those around it; without ``history`` behind zeros."""
    past, length = taps.shape[-2] - 1, x.shape[1]
    whole = F.pad(x, (0, 0, past, 0)) if history is None else torch.cat([history, x], 1)
    each = [per_row(taps[:, j], len(x)) if taps.ndim == 3 else taps[j] for j in range(past + 1)]
    y = x * each[past].to(x.dtype)
    for j in range(past):
        y = y + whole[:, j : j + length] * each[j].to(x.dtype)
    return y


class _FusedConv(torch.autograd.Function):
    """Formulas one way, one kernel the other, which joins the gradients of the channels where they come apart here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, taps)
        convolved, rest = x.split([taps.shape[-1], x.shape[-1] - taps.shape[-1]], -1)
        return _shifted_sum(convolved, None, taps), rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from dspace.nn.conv_kernel import conv_backward

        x, taps = ctx.saved_tensors
        stacked = taps if taps.ndim == 3 else taps[None]
        dx, parts = conv_backward(x, stacked, *grads)
        dtaps = parts.view(len(stacked), -1, *stacked.shape[1:]).sum(1)
        return dx, dtaps.view(taps.shape).to(taps.dtype)


def packed_conv(x: Tensor, taps: Tensor, offsets: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`causal_conv` for sequences packed in ``x`` ``[1, T, C]`` at ``offsets`` ``[N + 1]``.

    No sequence sees its neighbour: what stands before its first token is its own row of ``cache``
    ``[N, size - 1, C]``. Sequences may be empty.
    """
    size, channels = taps.shape
    sequences = len(offsets) - 1
    if cache is None:
        cache = x.new_zeros(sequences, size - 1, channels)
    # Lay each sequence out behind its own history: rows of `history` come first, tokens after them.
    history = sequences * (size - 1)
    pool = torch.cat([cache.to(x.dtype).reshape(history, channels), x[0]])
    offsets = offsets.to(x.device, torch.long)
    starts, lengths = offsets[:-1], offsets.diff()
    owner = torch.repeat_interleave(torch.arange(sequences, device=x.device), lengths, output_size=x.shape[1])

    def row(sequence: Tensor, at: Tensor) -> Tensor:
        """Where token ``at`` of a sequence lies in the pool; negative ``at`` is history."""
        return torch.where(at >= 0, history + starts[sequence] + at, sequence * (size - 1) + size - 1 + at)

    place = torch.arange(x.shape[1], device=x.device) - starts[owner]
    taps = taps.to(x.dtype)
    y = pool[row(owner, place)] * taps[size - 1]
    for back in range(1, size):
        y = y + pool[row(owner, place - back)] * taps[size - 1 - back]
    ahead = torch.arange(size - 1, device=x.device) - (size - 1)
    last = row(torch.arange(sequences, device=x.device)[:, None], lengths[:, None] + ahead)
    return y[None], pool[last]

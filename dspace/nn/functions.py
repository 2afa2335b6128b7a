"""Tensor functions of layer recipes, and the short convolution with its carried state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Unit(torch.autograd.Function):
    """``x * rsqrt(sum(x**2) + eps)`` over the last axis; the backward pass is ``r * (dy - y * sum(y * dy))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        y, r = ctx.saved_tensors
        return torch.addcmul(dy, y, (y * dy).sum(-1, keepdim=True), value=-1).mul_(r), None


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / |x|`` over the last axis, finite at zero."""
    return _Unit.apply(x, eps)


class HeadNorm(torch.nn.Module):
    """RMS normalisation of each head with a learned weight ``[size]``: ``x / sqrt(mean(x**2) + eps) * weight``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        # x / sqrt(mean + eps) = sqrt(size) * x / sqrt(sum + size * eps)
        return l2norm(x, self.size * self.eps) * (self.weight * self.size**0.5)


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


def spread(value: Tensor, axes: str, onto: str) -> Tensor:
    """Insert singleton dimensions so that ``value`` ``[..., *axes]`` broadcasts against ``[..., *onto]``."""
    for back, axis in enumerate(reversed(onto)):
        if axis not in axes:
            value = value.unsqueeze(-1 - back)
    return value


class _CausalConv(torch.autograd.Function):
    """Depthwise causal convolution ``[B, T, C]`` with taps ``[size, C]``, as shifted multiply-adds.

    On a CPU this is half the time of ``conv1d`` with groups, whose backward pass is not vectorised.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        """``x`` carries ``size - 1`` tokens of history in front; returns ``T = len - size + 1`` tokens."""
        ctx.save_for_backward(x, taps)
        size = len(taps)
        length = x.shape[1] - size + 1
        y = x[:, :length] * taps[0]
        for j in range(1, size):
            y.addcmul_(x[:, j : j + length], taps[j])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        x, taps = ctx.saved_tensors
        size, length = len(taps), dy.shape[1]
        dx = torch.zeros_like(x)
        for j in range(size):
            dx[:, j : j + length].addcmul_(dy, taps[j])
        dtaps = torch.stack([(x[:, j : j + length] * dy).sum((0, 1)) for j in range(size)])
        return dx, dtaps


def causal_conv(x: Tensor, taps: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convolve ``x`` ``[B, T, C]`` over time with ``taps`` ``[size, C]`` (the last tap is the present token).

    ``cache`` ``[B, size - 1, C]`` holds the inputs before ``x`` (zeros when None). Returns the result and the
    cache for what follows.
    """
    size = len(taps)
    taps = taps.to(x.dtype)
    padded = F.pad(x, (0, 0, size - 1, 0)) if cache is None else torch.cat([cache.to(x.dtype), x], 1)
    tail = padded[:, padded.shape[1] - size + 1 :]
    return _CausalConv.apply(padded, taps), tail


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

"""The gradient of the short convolution as one GPU kernel.

A compiler fuses what made the gradient of its result into every use of it. There are ``size`` uses, one a tap, and
before it comes the derivative of an activation, which is then evaluated ``size`` times. A kernel of its own ends that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _CHANNELS = 16, 64
"""Of a tile: what one warp holds in registers, so that it waits for no other."""


_MANY = 4096
"""Programs that keep a GPU busy: with more of them each takes several tiles, and there are fewer sums to add up."""


@triton.jit
def _conv_backward_kernel(
    x, taps, dy, drest, dx, dtaps, T, C, W, row_stride, token_stride, rows_of_trial,
    SIZE: tl.constexpr, SIZES: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """``dx[t] = sum_j taps[-1 - j] dy[t + j]``, and of ``TURNS`` tiles ``dtaps[-1 - j] = sum_t x[t - j] dy[t]``.

    Programs behind those of the convolved channels put the gradient of the others beside. SIZES: SIZE or more.
    """
    parts, part = tl.cdiv(T, BT * TURNS), tl.program_id(0).to(tl.int64)
    row = part // parts
    first = (part % parts).to(tl.int32) * BT * TURNS
    dx += row * T * W
    blocks = tl.cdiv(C, BC)
    if tl.program_id(1) < blocks:
        o_c = tl.program_id(1) * BC + tl.arange(0, BC)
        m_c = o_c < C
        o_j = tl.arange(0, SIZES)
        taps += row // rows_of_trial * SIZE * C
        x, dy = x + row * row_stride, dy + row * T * C
        sums = tl.zeros([SIZES, BC], dtype=tl.float32)
        for turn in range(TURNS):
            o_t = first + turn * BT + tl.arange(0, BT)
            m_t = (o_t < T)[:, None]
            at, read = o_t[:, None] * C + o_c[None, :], o_t[:, None] * token_stride + o_c[None, :]
            mask = m_t & m_c[None, :]
            here = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            total = tl.zeros([BT, BC], dtype=tl.float32)
            for j in tl.static_range(SIZE):
                tap = tl.load(taps + (SIZE - 1 - j) * C + o_c, mask=m_c, other=0.0).to(tl.float32)
                later = tl.load(dy + at + j * C, mask=(o_t < T - j)[:, None] & m_c[None, :], other=0.0).to(tl.float32)
                total += tap[None, :] * later
                earlier = tl.load(x + read - j * token_stride, mask=mask & (o_t >= j)[:, None], other=0.0).to(
                    tl.float32
                )
                sums += tl.where(o_j[:, None] == SIZE - 1 - j, tl.sum(earlier * here, axis=0)[None, :], 0.0)
            tl.store(dx + o_t[:, None] * W + o_c[None, :], total.to(dx.dtype.element_ty), mask=mask)
        at = part * SIZE * C + o_j[:, None] * C + o_c[None, :]
        tl.store(dtaps + at, sums, mask=(o_j < SIZE)[:, None] & m_c[None, :])
    else:
        o_c = (tl.program_id(1) - blocks) * BC + tl.arange(0, BC)
        for turn in range(TURNS):
            o_t = first + turn * BT + tl.arange(0, BT)
            mask = (o_t < T)[:, None] & (o_c < W - C)[None, :]
            rest = tl.load(drest + row * T * (W - C) + o_t[:, None] * (W - C) + o_c[None, :], mask=mask)
            tl.store(dx + o_t[:, None] * W + C + o_c[None, :], rest, mask=mask)


@torch.library.custom_op("dspace_nn::conv_backward", mutates_args=())
def conv_backward(x: Tensor, taps: Tensor, dy: Tensor, drest: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` ``[S * B, T, W]`` and of ``taps`` ``[S, size, C]``, the latter float32 ``[S * B, parts, size, C]``.

    The first ``C`` channels of ``x`` were convolved, and nothing is before their first token; ``drest`` is the gradient
    of the others. The caller adds up the parts, with what else it does to them.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    taps, dy, drest = taps.contiguous(), dy.contiguous(), drest.contiguous()
    dx, dtaps = _results(x, taps)
    if dx.numel():
        C, W = taps.shape[2], x.shape[2]
        sizes: tuple[Any, ...] = (x.shape[1], C, W, *x.stride()[:2], len(x) // len(taps))
        tile: dict[str, Any] = {"BT": _TOKENS, "BC": _CHANNELS, "TURNS": _turns(x, taps)}
        tile |= {"SIZE": taps.shape[1], "SIZES": triton.next_power_of_2(taps.shape[1])}
        _conv_backward_kernel[(len(x) * dtaps.shape[1], _blocks(x, taps))](
            x, taps, dy, drest, dx, dtaps, *sizes, **tile, num_warps=1
        )
    return dx, dtaps


@conv_backward.register_fake
def _results(x: Tensor, taps: Tensor, dy: Tensor | None = None, drest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    parts = -(-x.shape[1] // (_TOKENS * _turns(x, taps)))
    return x.new_empty(x.shape), x.new_empty((x.shape[0], parts, *taps.shape[1:]), dtype=torch.float32)


def _blocks(x: Tensor, taps: Tensor) -> int:
    """Of channels: those that are convolved, and the others."""
    return -(-taps.shape[2] // _CHANNELS) - (-(x.shape[2] - taps.shape[2]) // _CHANNELS)


def _turns(x: Tensor, taps: Tensor) -> int:
    return 4 if len(x) * -(-x.shape[1] // _TOKENS) * _blocks(x, taps) > _MANY else 1

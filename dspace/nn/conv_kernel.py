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


@triton.jit
def _conv_backward_kernel(
    x, taps, dy, drest, dx, dtaps, T, C, W, row_stride, token_stride, rows_of_trial,
    SIZE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``dx[t] = sum_j taps[-1 - j] dy[t + j]``, and of every tile ``dtaps[-1 - j] = sum_t x[t - j] dy[t]``.

    Programs behind those of the convolved channels put the gradient of the others beside.
    """
    tiles, tile = tl.cdiv(T, BT), tl.program_id(0).to(tl.int64)
    row = tile // tiles
    o_t = (tile % tiles).to(tl.int32) * BT + tl.arange(0, BT)
    m_t = (o_t < T)[:, None]
    dx += row * T * W
    blocks = tl.cdiv(C, BC)
    if tl.program_id(1) < blocks:
        o_c = tl.program_id(1) * BC + tl.arange(0, BC)
        m_c = o_c < C
        taps += row // rows_of_trial * SIZE * C
        dtaps += tile * SIZE * C
        x, dy = x + row * row_stride, dy + row * T * C
        at, read = o_t[:, None] * C + o_c[None, :], o_t[:, None] * token_stride + o_c[None, :]
        mask = m_t & m_c[None, :]
        here = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BT, BC], dtype=tl.float32)
        for j in tl.static_range(SIZE):
            tap = tl.load(taps + (SIZE - 1 - j) * C + o_c, mask=m_c, other=0.0).to(tl.float32)
            later = tl.load(dy + at + j * C, mask=(o_t < T - j)[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            total += tap[None, :] * later
            earlier = tl.load(x + read - j * token_stride, mask=mask & (o_t >= j)[:, None], other=0.0).to(tl.float32)
            tl.store(dtaps + (SIZE - 1 - j) * C + o_c, tl.sum(earlier * here, axis=0), mask=m_c)
        tl.store(dx + o_t[:, None] * W + o_c[None, :], total.to(dx.dtype.element_ty), mask=mask)
    else:
        o_c = (tl.program_id(1) - blocks) * BC + tl.arange(0, BC)
        mask = m_t & (o_c < W - C)[None, :]
        rest = tl.load(drest + row * T * (W - C) + o_t[:, None] * (W - C) + o_c[None, :], mask=mask)
        tl.store(dx + o_t[:, None] * W + C + o_c[None, :], rest, mask=mask)


@torch.library.custom_op("dspace_nn::conv_backward", mutates_args=())
def conv_backward(x: Tensor, taps: Tensor, dy: Tensor, drest: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` ``[S * B, T, W]`` and of ``taps`` ``[S, size, C]``, the latter float32 ``[S * B, tiles, size, C]``.

    The first ``C`` channels of ``x`` were convolved, and nothing is before their first token; ``drest`` is the gradient
    of the others. The caller adds up the tiles, with what else it does to them.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    taps, dy, drest = taps.contiguous(), dy.contiguous(), drest.contiguous()
    dx, dtaps = _results(x, taps)
    if dx.numel():
        C, W = taps.shape[2], x.shape[2]
        grid = (len(x) * dtaps.shape[1], triton.cdiv(C, _CHANNELS) + triton.cdiv(W - C, _CHANNELS))
        sizes: tuple[Any, ...] = (x.shape[1], C, W, *x.stride()[:2], len(x) // len(taps))
        tile: dict[str, Any] = {"SIZE": taps.shape[1], "BT": _TOKENS, "BC": _CHANNELS}
        _conv_backward_kernel[grid](x, taps, dy, drest, dx, dtaps, *sizes, **tile, num_warps=1)
    return dx, dtaps


@conv_backward.register_fake
def _results(x: Tensor, taps: Tensor, dy: Tensor | None = None, drest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    tiles = -(-x.shape[1] // _TOKENS)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], tiles, *taps.shape[1:]), dtype=torch.float32)

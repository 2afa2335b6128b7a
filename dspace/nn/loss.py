"""Losses of a language model whose embedding makes its logits too.

The logits are the largest tensor of a small model. A GPU that runs compiled code makes them once and reads them once:
one kernel takes the loss and its gradient (:mod:`dspace.nn.loss_kernel`), matmuls do the rest.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None


def fused(weight: Tensor) -> bool:
    """Whether :func:`tied_rows` and :func:`logit_losses` are the way to go for this embedding, here and now."""
    return torch.compiler.is_compiling() and weight.is_cuda and weight.dtype == torch.float32 and _TRITON


def tied_rows(weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``weight`` ``[..., entries, size]``, and ``weight`` for :func:`logit_losses`.

    The gradients of both meet in one tensor. ``rows`` of several embeddings are counted through.
    """
    return _Tied.apply(weight, rows)


def logit_losses(x: Tensor, weight: Tensor, targets: Tensor, narrow: Tensor | None = None) -> Tensor:
    """Cross-entropies, float32 ``[S, rows]``, of ``x`` ``[S, rows, size]`` by float32 ``weight`` ``[S, classes, size]``.

    ``targets`` are int64 ``[S, rows]``. ``narrow`` is ``weight`` in the dtype of matmuls, autocast's if that is on, where
    such a copy exists. The gradient of ``weight`` is float32 as its matmul made it.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if narrow is None or narrow.dtype != dtype:
        narrow = weight.detach().to(dtype)
    return _LogitLosses.apply(x, weight, narrow.detach().view(weight.shape), targets)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return F.embedding(rows, weight.flatten(0, -2)), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        looked_up, multiplied = grads
        (rows,) = ctx.saved_tensors
        looked_up = looked_up.to(multiplied.dtype).flatten(0, -2)
        whole = multiplied.flatten(0, -2).index_put((rows.flatten(),), looked_up, accumulate=True)
        return whole.view(multiplied.shape), None


class _LogitLosses(torch.autograd.Function):
    """Gradients of rows are scaled where they are small: behind one matmul, before the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, narrow: Tensor, targets: Tensor) -> Tensor:
        from dspace.nn.loss_kernel import cross_entropy

        ctx.dtype = x.dtype
        x = x.to(narrow.dtype)
        logits = torch.bmm(x, narrow.mT)
        losses, slopes = cross_entropy(logits.flatten(0, 1), targets.flatten())
        ctx.save_for_backward(x, narrow, slopes.view(logits.shape))
        return losses.view(targets.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, narrow, slopes = ctx.saved_tensors
        each = grads[0][..., None]
        dx = (torch.bmm(slopes, narrow) * each).to(ctx.dtype)
        return dx, _wide_product(slopes.mT, (x * each).to(x.dtype)), None, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float32 at least; on an NVIDIA GPU as the matmul accumulates it."""
    if a.is_cuda and torch.version.hip is None and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    product = torch.bmm(a, b)
    return product.to(torch.promote_types(product.dtype, torch.float32))

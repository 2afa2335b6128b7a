"""Cross-entropies and their gradients as one GPU kernel, which reads the logits once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 16384
"""Classes that a program holds in registers; of more it makes two turns."""


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, gradient, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program. ``gradient = softmax(logits) - onehot(target)``, the latter by a store behind the others."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * CLASSES
    gradient += row * CLASSES
    target = tl.load(targets + row)
    there = (target >= 0) & (target < CLASSES)
    chosen = tl.load(logits + target, mask=there, other=0.0).to(tl.float32)
    o = tl.arange(0, BLOCK)
    x = tl.load(logits + o, mask=o < CLASSES, other=-float("inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    x = tl.exp(x - top)
    total = tl.sum(x, axis=0)
    if BLOCK >= CLASSES:
        factor = 1.0 / total
        tl.store(gradient + o, (factor * x).to(gradient.dtype.element_ty), mask=o < CLASSES)
    else:
        for start in range(BLOCK, CLASSES, BLOCK):
            x = tl.load(logits + start + o, mask=start + o < CLASSES, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        factor = 1.0 / total
        for start in range(0, CLASSES, BLOCK):
            x = tl.load(logits + start + o, mask=start + o < CLASSES, other=0.0).to(tl.float32)
            p = factor * tl.exp(x - top)
            tl.store(gradient + start + o, p.to(gradient.dtype.element_ty), mask=start + o < CLASSES)
    tl.store(losses + row, top + tl.log(total) - chosen)
    tl.debug_barrier()
    p = factor * tl.exp(chosen - top) - 1.0
    tl.store(gradient + target, p.to(gradient.dtype.element_ty), mask=there)


@torch.library.custom_op("dspace_nn::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``logits`` ``[rows, classes]`` and int64 ``targets`` ``[rows]``: losses, float32 ``[rows]``, and the gradient of
    each, as the logits are."""
    logits = logits.contiguous()
    losses, gradient = _results(logits, targets)
    rows, classes = logits.shape
    if logits.numel():
        block = min(triton.next_power_of_2(classes), _MOST)
        _cross_entropy_kernel[(rows,)](
            logits, targets.contiguous(), losses, gradient,
            CLASSES=classes, BLOCK=block, num_warps=max(1, min(block // 1024, 16)),
        )  # fmt: skip
    return losses, gradient


@cross_entropy.register_fake
def _results(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(logits.shape)

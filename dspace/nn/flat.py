"""AdamW over flat buffers: float32 master weights and moments of all trials, a rate for each trial.

The parameters of a model become views into one buffer, so that a step is a dozen operations whatever the number of
parameters, fit to be recorded in a CUDA graph or fused by a compiler. Each (parameter, trial) fills whole blocks. Large
parameters have buffers of their own: their gradients are used where they lie, where those of small ones are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256
"""Numbers in a block; a block belongs to one parameter of one trial."""

LARGE = 1 << 18
"""Numbers from which copying a gradient costs more than a few operations of its own."""


class FlatAdamW:
    """Decoupled weight decay, bias correction and clipping as in PyTorch's AdamW; one learning rate for each trial.

    ``decays`` ``[S]``: the trials' weight decays, not applied to parameters marked ``no_weight_decay``.
    """

    def __init__(
        self,
        module: nn.Module,
        trials: int,
        decays: list[float],
        clip: float | None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.trials, self.clip, self.betas, self.eps = trials, clip, betas, eps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        alone = [i for i, p in enumerate(self.parameters) if p.numel() >= LARGE and p.numel() % (trials * BLOCK) == 0]
        small = [i for i in range(len(self.parameters)) if i not in alone]
        self.groups = [group for group in (small, *([i] for i in alone)) if group]
        """Indices of the parameters of each buffer."""
        self.buffers = [_Buffer([self.parameters[i] for i in group], trials, decays) for group in self.groups]

    def narrow(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A copy of ``parameter`` in ``dtype`` that every step renews as it writes it; None for a small one."""
        for buffer, group in zip(self.buffers, self.groups, strict=True):
            if buffer.grads is None and self.parameters[group[0]] is parameter:
                buffer.narrow = buffer.values.to(dtype)
                return buffer.narrow.view(parameter.shape)
        return None

    def controls(self, rates: Tensor) -> Tensor:
        """What :meth:`update` is told at each step, ``[steps, S + 2]``, from learning rates ``[steps, S]``."""
        steps = torch.arange(1, len(rates) + 1, dtype=torch.float64)
        corrections = torch.stack([1 - self.betas[0] ** steps, (1 - self.betas[1] ** steps).sqrt()], 1)
        return torch.cat([rates.double(), corrections], 1).float().to(self.parameters[0].device)

    def update(self, control: Tensor, grads: Sequence[Tensor | None]) -> None:
        """One step on gradients of all parameters (None: zero); ``control`` is a row of :meth:`controls`."""
        flat = [b.gather([grads[i] for i in group]) for b, group in zip(self.buffers, self.groups, strict=True)]
        factors = None
        if self.clip is not None:
            norms = sum(b.squares(g) for b, g in zip(self.buffers, flat, strict=True)) ** 0.5
            factors = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        for buffer, g in zip(self.buffers, flat, strict=True):
            self._step(buffer, control, g if factors is None else g * factors[buffer.owner][:, None])

    def _step(self, buffer: _Buffer, control: Tensor, grads: Tensor) -> None:
        rate = control[: self.trials][buffer.owner][:, None]
        buffer.first.lerp_(grads, 1 - self.betas[0])
        buffer.second.mul_(self.betas[1]).addcmul_(grads, grads, value=1 - self.betas[1])
        root = buffer.second.sqrt() / control[self.trials + 1] + self.eps
        buffer.values.mul_(1 - rate * buffer.decay)
        buffer.values.sub_(rate / control[self.trials] * buffer.first / root)
        if buffer.narrow is not None:
            buffer.narrow.copy_(buffer.values)

    def snapshot(self) -> list[Tensor]:
        """Copies of all that a step changes."""
        return [t.clone() for b in self.buffers for t in (b.values, b.first, b.second)]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Undo the steps since ``saved`` was taken."""
        for t, old in zip((t for b in self.buffers for t in (b.values, b.first, b.second)), saved, strict=True):
            t.copy_(old)
        for buffer in self.buffers:
            if buffer.narrow is not None:
                buffer.narrow.copy_(buffer.values)


class _Buffer:
    """Weights and moments ``[blocks, BLOCK]`` of some parameters of all trials, which become views of the weights."""

    def __init__(self, parameters: list[nn.Parameter], trials: int, decays: list[float]) -> None:
        self.trials = trials
        self.shapes = [p.shape for p in parameters]
        self.blocks = [math.ceil(p.numel() // trials / BLOCK) for p in parameters]
        """Of each parameter, in each trial."""
        device, count = parameters[0].device, trials * sum(self.blocks)
        self.values, self.first, self.second = (torch.zeros(count, BLOCK, device=device) for _ in range(3))
        plain = [not getattr(p, "no_weight_decay", False) for p in parameters]
        each = torch.arange(trials)
        self.owner = torch.cat([each.repeat_interleave(n) for n in self.blocks]).to(device)
        rates = [torch.tensor(decays) * free for free in plain]
        self.decay = torch.cat([r.repeat_interleave(n) for r, n in zip(rates, self.blocks, strict=True)]).to(device)
        self.decay = self.decay[:, None]
        self.narrow: Tensor | None = None
        self.of_trial = self.owner == each.to(device)[:, None]
        self.grads = torch.zeros_like(self.values) if len(parameters) > 1 or self._padded(parameters[0].shape) else None
        for p, view in zip(parameters, self._views(self.values), strict=True):
            view.copy_(p.detach())
            p.data = view

    def _padded(self, shape: torch.Size) -> int:
        """Numbers of the last block of a trial that stand for nothing."""
        return -(shape.numel() // self.trials) % BLOCK

    def _views(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer.split([self.trials * n for n in self.blocks])
        return [
            part.view(self.trials, -1)[:, : shape.numel() // self.trials].view(shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def gather(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients as the buffer lies; that of a parameter alone as it is."""
        if self.grads is None:
            return torch.zeros_like(self.values) if grads[0] is None else grads[0].reshape(-1, BLOCK)
        if torch.compiler.is_compiling():  # one kernel, whatever their strides; each by itself pads and copies longer
            rows = [
                self.values.new_zeros(self.trials * n * BLOCK)
                if g is None
                else F.pad(g.reshape(self.trials, -1), (0, self._padded(g.shape))).flatten()
                for g, n in zip(grads, self.blocks, strict=True)
            ]
            return torch.cat(rows).view(-1, BLOCK)
        pairs = [(view, g) for view, g in zip(self._views(self.grads), grads, strict=True) if g is not None]
        torch._foreach_copy_([view for view, _ in pairs], [g for _, g in pairs])
        return self.grads

    def squares(self, grads: Tensor) -> Tensor:
        """Sum of squares of each trial ``[S]``: chosen, as a trial that diverged must not reach the others."""
        return torch.where(self.of_trial, (grads * grads).sum(1), 0.0).sum(1)

"""AdamW over one flat buffer: float32 master weights, moments and gradients of all trials, a rate for each trial.

The parameters of a model become views into the buffer, so that one step is a dozen operations whatever the number of
parameters, fit to be recorded in a CUDA graph or fused by a compiler. Each (parameter, trial) fills whole blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BLOCK = 256
"""Numbers in a block; a block belongs to one parameter of one trial."""


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
        device = self.parameters[0].device
        places: list[tuple[int, int, int]] = []
        owners: list[Tensor] = []
        rates: list[Tensor] = []
        begin = 0
        for p in self.parameters:
            numbers = p.numel() // trials
            blocks = math.ceil(numbers / BLOCK)
            places.append((begin, begin + trials * blocks, numbers))
            owners.append(torch.arange(trials).repeat_interleave(blocks))
            free = getattr(p, "no_weight_decay", False)
            rates.append((torch.zeros(trials) if free else torch.tensor(decays)).repeat_interleave(blocks))
            begin += trials * blocks
        self.values, self.grads, self.first, self.second = (torch.zeros(begin, BLOCK, device=device) for _ in range(4))
        self.owner = torch.cat(owners).to(device)
        self.decay = torch.cat(rates).to(device)[:, None]
        self.of_trial = self.owner == torch.arange(trials, device=device)[:, None]
        self.grad_views: list[Tensor] = []
        for p, place in zip(self.parameters, places, strict=True):
            view = self._view(self.values, place, p.shape)
            view.copy_(p.detach())
            p.data = view
            self.grad_views.append(self._view(self.grads, place, p.shape))

    def _view(self, buffer: Tensor, place: tuple[int, int, int], shape: torch.Size) -> Tensor:
        begin, end, numbers = place
        return buffer[begin:end].view(self.trials, -1)[:, :numbers].view(shape)

    def take(self, grads: tuple[Tensor | None, ...]) -> None:
        """Copy gradients into the buffer; a parameter that got none keeps its zeros."""
        pairs = [(view, g) for view, g in zip(self.grad_views, grads, strict=True) if g is not None]
        torch._foreach_copy_([view for view, _ in pairs], [g for _, g in pairs])

    def controls(self, rates: Tensor) -> Tensor:
        """What :meth:`step` is told at each step, ``[steps, S + 2]``, from learning rates ``[steps, S]``."""
        steps = torch.arange(1, len(rates) + 1, dtype=torch.float64)
        corrections = torch.stack([1 - self.betas[0] ** steps, (1 - self.betas[1] ** steps).sqrt()], 1)
        return torch.cat([rates.double(), corrections], 1).float().to(self.values.device)

    def step(self, control: Tensor) -> None:
        """One update; ``control`` is a row of :meth:`controls`."""
        rate = control[: self.trials][self.owner][:, None]
        grads = self.grads
        if self.clip is not None:
            # Chosen, not multiplied by 0 or 1: a trial that diverged must not reach the others.
            norms = torch.where(self.of_trial, (grads * grads).sum(1), 0.0).sum(1).sqrt()
            grads = grads * (self.clip / (norms + 1e-6)).clamp(max=1.0)[self.owner][:, None]
        self.first.lerp_(grads, 1 - self.betas[0])
        self.second.mul_(self.betas[1]).addcmul_(grads, grads, value=1 - self.betas[1])
        root = self.second.sqrt() / control[self.trials + 1] + self.eps
        self.values.mul_(1 - rate * self.decay)
        self.values.sub_(rate / control[self.trials] * self.first / root)

    def snapshot(self) -> tuple[Tensor, ...]:
        """Copies of all that a step changes."""
        return tuple(t.clone() for t in (self.values, self.first, self.second))

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Undo the steps since ``saved`` was taken."""
        for t, old in zip((self.values, self.first, self.second), saved, strict=True):
            t.copy_(old)

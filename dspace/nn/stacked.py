"""Several models of equal structure as one: their weights stacked, their sequences in one batch.

A small model cannot fill a GPU; eight of them can. ``stack`` makes one model whose every parameter has a leading axis
``S`` (one slice a trial) and whose batch holds the trials' sequences one trial after the other, ``[S * B, T]``. Matmuls
become batched matmuls; the variant's op sees ``S`` times the sequences, or ``S`` times the heads where heads have
parameters of their own, so that no kernel needs to know of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.nn.functions import by_own, per_row
from dspace.nn.model import Model, TiedEmbedding
from dspace.nn.parameters import copy_of


class StackedLinear(nn.Linear):
    """``[S, out, in]`` on ``[S * B, ..., in]``."""

    def forward(self, x: Tensor) -> Tensor:
        y = by_own(x.reshape(len(self.weight), -1, x.shape[-1]), self.weight)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(*x.shape[:-1], self.out_features)


class StackedEmbedding(TiedEmbedding):
    """``[S, entries, size]`` on tokens ``[S * B, T]``."""

    def rows(self, tokens: Tensor) -> Tensor:
        trials, entries, _ = self.weight.shape
        return tokens + per_row(torch.arange(trials, device=tokens.device) * entries, len(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(self.rows(tokens), self.weight.flatten(0, 1))


class StackedLayerNorm(nn.LayerNorm):
    """``[S, size]`` on ``[S * B, T, size]``."""

    def forward(self, x: Tensor) -> Tensor:
        plain = F.layer_norm(x, (x.shape[-1],), None, None, self.eps)
        return plain * per_row(self.weight, len(x)) + per_row(self.bias, len(x))


_STACKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StackedLinear,
    TiedEmbedding: StackedEmbedding,
    nn.LayerNorm: StackedLayerNorm,
}


def stack(models: Sequence[Model]) -> Model:
    """One model out of several of equal structure; they are not changed, and share nothing with it.

    Raises UserError for models whose parameters differ in names or shapes.
    """
    first = models[0]
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in models]
    if any(s != shapes[0] for s in shapes) or first.positions is not None:
        raise UserError(
            "these models cannot be stacked: their parameters differ in name or shape, or they have absolute positions\n"
            "  cure: train them one by one"
        )
    made = copy_of(first)
    if len(models) == 1:
        return made
    sources = [dict(m.named_modules()) for m in models]
    for path, module in made.named_modules():
        if hasattr(module, "trials"):
            module.trials = len(models)
        for name, parameter in list(module.named_parameters(recurse=False)):
            rows = torch.stack([s[path].get_parameter(name).detach() for s in sources])
            stacked = nn.Parameter(rows, requires_grad=parameter.requires_grad)
            if getattr(parameter, "no_weight_decay", False):
                stacked.no_weight_decay = True  # type: ignore[attr-defined]
            module.register_parameter(name, stacked)
        if type(module) in _STACKED:
            module.__class__ = _STACKED[type(module)]
    return made


def unstack(stacked: Model, models: Sequence[Model]) -> None:
    """Copy each trial's weights back into the models that were stacked."""
    parameters = dict(stacked.named_parameters())
    with torch.no_grad():
        for trial, model in enumerate(models):
            for name, own in model.named_parameters():
                own.copy_(parameters[name][trial] if len(models) > 1 else parameters[name])


def worth_stacking(rows: int, length: int, numbers: int, most: int = 16) -> int:
    """How many trials fill a GPU that one of them would leave idle.

    ``rows`` sequences of ``length`` tokens through layers of ``numbers`` numbers of state each: below about 2**27
    updates of a number a layer, an H100 waits for launches and latency more than it computes.
    """
    return max(1, min(most, (1 << 27) // max(rows * length * numbers, 1)))

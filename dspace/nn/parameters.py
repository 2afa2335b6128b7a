"""Learned numbers per head: parameters of the spec inside their domains, and where the atoms start."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.nn.operator import ParameterInfo

Decay = Literal["uniform", "small"] | tuple[float, float] | float
"""Start of ``A = exp(A_log)``: ``uniform`` draws A from (0, 16); ``small`` is linspace(0.01, 0.16, heads), the small
forgetting used for MQAR; a pair ``(low, high)`` is that linspace; one number N is the horizon in tokens: with the
starting ``dt`` of each head, ``dt * A = 1 / N``."""

_DEFAULT_INIT = {"real": 0.0, "positive": 1.0, "nonnegative": 1.0, "negative": -1.0, "nonpositive": -1.0, "unit": 0.5}


M = TypeVar("M", bound=nn.Module)
NO_DECAY = "no_weight_decay"
"""Attribute of a parameter that weight decay leaves alone."""


def copy_of(model: M) -> M:
    """A deep copy of ``model`` that keeps the marks ``no_weight_decay``, which PyTorch's copy of a parameter forgets."""
    made = copy.deepcopy(model)
    keep_marks(model, made)
    return made


def keep_marks(source: nn.Module, target: nn.Module) -> None:
    """Mark the parameters of ``target`` as those of the same name of ``source`` are."""
    own = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if name in own and getattr(parameter, NO_DECAY, False) != getattr(own[name], NO_DECAY, False):
            setattr(own[name], NO_DECAY, getattr(parameter, NO_DECAY, False))


class Constrained(nn.Module):
    """A parameter ``[heads, *axes]`` that cannot leave its domain.

    It is stored as an unconstrained number ``raw``: ``positive`` and ``nonnegative`` are ``exp(raw)``,
    ``negative`` and ``nonpositive`` are ``-exp(raw)``, ``unit`` is ``sigmoid(raw)``.
    """

    def __init__(
        self, info: ParameterInfo, heads: int, sizes: tuple[int, ...], start: float | None, learned: bool
    ) -> None:
        super().__init__()
        self.domain = info.domain
        value = start if start is not None else info.init
        value = _DEFAULT_INIT[info.domain] if value is None else float(value)
        self.raw = nn.Parameter(torch.full((heads, *sizes), self._inverse(info.name, value)), requires_grad=learned)
        self.raw.no_weight_decay = True  # type: ignore[attr-defined]

    def _inverse(self, name: str, value: float) -> float:
        tiny = 1e-30
        if self.domain in ("positive", "nonnegative") and value >= (0 if self.domain == "nonnegative" else tiny):
            return math.log(max(value, tiny))
        if self.domain in ("negative", "nonpositive") and -value >= (0 if self.domain == "nonpositive" else tiny):
            return math.log(max(-value, tiny))
        if self.domain == "unit" and 0 <= value <= 1:
            inside = min(max(value, 1e-7), 1 - 1e-7)
            return math.log(inside / (1 - inside))
        if self.domain == "real":
            return value
        raise UserError(f"parameter {name} = {value} is not {self.domain}\n  cure: start it inside its domain")

    def forward(self) -> Tensor:
        """The value, inside its domain."""
        if self.domain in ("positive", "nonnegative"):
            return self.raw.exp()
        if self.domain in ("negative", "nonpositive"):
            return -self.raw.exp()
        return self.raw.sigmoid() if self.domain == "unit" else self.raw


def never_negative(raw: Tensor) -> Tensor:
    """``max(raw, 0)`` with the gradient of ``raw`` everywhere: a gain that can leave 0, and come back to it."""
    return raw + (raw.clamp_min(0) - raw).detach()


def per_head_start(names: Sequence[str], heads: int, decay: Decay, given: Mapping[str, float]) -> dict[str, Tensor]:
    """Starting value ``[heads]`` of each atom in ``names``; ``given`` fixes some to one number for all heads."""
    starts: dict[str, Tensor] = {}
    if "dt_bias" in names:
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(low + (high - low) * torch.rand(heads))
        starts["dt_bias"] = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if "head_scale" in names:
        starts["head_scale"] = torch.full((heads,), math.log(math.e - 1))  # softplus of it is 1
    if "head_gain" in names:
        starts["head_gain"] = torch.zeros(heads)
    if "A_log" in names:
        starts["A_log"] = _rates(heads, decay, starts.get("dt_bias")).log()
    starts |= {name: torch.full((heads,), float(given[name])) for name in names if name in given}
    return {name: starts[name] for name in names}


def _rates(heads: int, decay: Decay, dt_bias: Tensor | None) -> Tensor:
    match decay:
        case "uniform":
            return torch.rand(heads).mul(16).clamp_min(1e-2)
        case "small":
            return torch.linspace(0.01, 0.16, heads)
        case (low, high) if 0 < low <= high:
            return torch.linspace(low, high, heads)
        case float() | int() if decay > 0:
            return 1 / (decay * (F.softplus(dt_bias) if dt_bias is not None else torch.ones(heads)))
    raise UserError(
        f"decay = {decay!r} is not understood\n"
        "  cure: 'uniform', 'small', a pair (low, high) with 0 < low <= high, or a horizon in tokens > 0"
    )

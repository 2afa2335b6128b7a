"""What is told of a trial in one step: parameters, attributes, state and values together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import TrialState

Waiting = tuple[dict[str, Any], dict[str, Any]]
"""A trial to be enqueued: parameters that are fixed, and user attributes."""


@dataclass
class Change:
    """What is told of a running (or, to take it, waiting) trial at once."""

    user: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    """Name -> the value as Optuna stores it, and its distribution."""
    state: TrialState | None = None
    values: list[float] | None = None

    def __bool__(self) -> bool:
        return bool(self.user or self.system or self.params or self.state is not None)

    def dump(self) -> dict[str, Any]:
        """As JSON values, for the way to a proxy."""
        return {
            "user": self.user,
            "system": self.system,
            "params": {name: [value, distribution_to_json(kind)] for name, (value, kind) in self.params.items()},
            "state": None if self.state is None else self.state.name,
            "values": self.values,
        }

    @classmethod
    def load(cls, told: dict[str, Any]) -> Change:
        return cls(
            told["user"],
            told["system"],
            {name: (value, json_to_distribution(kind)) for name, (value, kind) in told["params"].items()},
            None if told["state"] is None else TrialState[told["state"]],
            told["values"],
        )

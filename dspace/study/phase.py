"""A phase of a study (its search, or one of its comparisons), and what can be read off the trials that it has.

Nothing here changes a storage: the ledger and the queue, which do, count by the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspace.study.schema import METRICS, Direction, StudyFile
from dspace.study.space import grid


@dataclass(frozen=True)
class Phase:
    """The search itself (``comparison`` is None) or one comparison: each is one Optuna study of the storage."""

    study: StudyFile
    comparison: str | None = None

    @property
    def name(self) -> str:
        return self.study.name if self.comparison is None else f"{self.study.name}/{self.comparison}"

    @property
    def directions(self) -> list[Direction]:
        if self.comparison is None:
            return list(self.study.directions)
        return [METRICS[self.study.compare[self.comparison].metric][0]]


def root_number(attributes: Mapping[str, Any], number: int) -> int:
    """The number of the first attempt: retries keep its seed."""
    return int(attributes.get("root", number))


def retries(trials: list[Any]) -> set[int]:
    """Numbers of the trials that another trial repeats."""
    return {t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs}


def used(trials: list[Any]) -> int:
    """How many trials of the budget are spent or being spent: a trial and its retry count once."""
    repeated = retries(trials)
    return sum(t.state.name != "WAITING" and t.number not in repeated for t in trials)


def spent(study: StudyFile, trials: list[Any]) -> int:
    """Trials that count towards the budget: those of a point that was trained before cost nothing, and up to as many
    of them as the budget has trials are not counted (beyond, the space is exhausted)."""
    return used(trials) - free(study, trials)


def free(study: StudyFile, trials: list[Any]) -> int:
    """Trials that repeated a point and cost nothing."""
    return min(sum("duplicate_of" in t.user_attrs for t in trials), study.budget.trials)


def waiting(trials: list[Any]) -> list[Any]:
    return [t for t in trials if t.state.name == "WAITING"]


def budget_of(study: StudyFile) -> int:
    """Trials of the search: the budget, and of a grid no more than it has points."""
    return min(study.budget.trials, len(grid(study))) if study.sampler.kind == "grid" else study.budget.trials


def owed(phase: Phase, trials: list[Any]) -> int:
    """How many trials are still to be started."""
    if phase.comparison is not None:
        return len(waiting(trials))
    if is_stale(phase.study, trials):
        return 0
    left = max(budget_of(phase.study) - spent(phase.study, trials), 0)
    return min(left, len(waiting(trials))) if phase.study.sampler.kind == "grid" else left


def is_stale(study: StudyFile, trials: list[Any]) -> bool:
    """Whether the last ``budget.stale_trials`` completed trials have added nothing to the front."""
    limit = study.budget.stale_trials
    if limit is None:
        return False
    done = sorted((t for t in trials if t.state.name == "COMPLETE"), key=lambda t: t.datetime_complete)
    if len(done) <= limit:
        return False
    signs = [1 if d == "maximize" else -1 for d in study.directions]
    front: list[list[float]] = []
    newest = 0
    for i, t in enumerate(done):
        point = [s * v for s, v in zip(signs, t.values, strict=True)]
        if any(all(a >= b for a, b in zip(other, point, strict=True)) for other in front):
            continue
        front = [o for o in front if not all(b >= a for a, b in zip(o, point, strict=True))] + [point]
        newest = i
    return len(done) - 1 - newest >= limit


def params_of(trial: Any) -> dict[str, Any]:
    """The value on every axis of a trial: as the worker told them, where the sampler was not asked for all."""
    return dict(trial.user_attrs.get("params") or trial.params)


def best_of(trials: list[Any], metric: str, fixed: Mapping[str, str] | None = None) -> Any | None:
    """The completed trial with the best ``metric`` among those with these choices; ties go to less state."""
    sign = 1 if METRICS[metric][0] == "maximize" else -1
    found = [
        t
        for t in trials
        if t.state.name == "COMPLETE"
        and metric in t.user_attrs.get("metrics", {})
        and not t.user_attrs.get("infeasible")
        and all(params_of(t).get(k) == v for k, v in (fixed or {}).items())
    ]

    def rank(t: Any) -> tuple[float, float, int]:
        metrics = t.user_attrs["metrics"]
        return (sign * metrics[metric], -metrics.get("state_bytes", 0), -t.number)

    return max(found, key=rank, default=None)

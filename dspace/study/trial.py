"""What an objective is given and what it returns: the only contract between engine and training.

An objective is any function ``(job: Job) -> Outcome``. It calls :meth:`Job.report` now and then, which records
the curve, prunes and stops; it knows nothing of Optuna.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dspace.study.schema import METRICS, PruneTable, Scalar, StudyFile
from dspace.study.space import Composer, Params, Point


class Pruned(Exception):
    """The trial is not worth going on with; the text says why."""


class Stopped(Exception):
    """The worker was asked to stop: the trial will be run again later, from the same seed."""


@dataclass
class Outcome:
    """``metrics`` on held-out data that the search sees, ``test`` on data that it never sees."""

    metrics: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    """JSON values kept with the trial: hashes, versions, recall by age, ..."""
    files: dict[str, Path] = field(default_factory=dict)
    """Artifacts by name: they are copied into the study's store."""


Objective = Callable[["Job"], Outcome]


def derive_seed(*parts: object) -> int:
    """A seed below 2**31 that depends on every part and on nothing else."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass
class Job:
    """One trial to run."""

    study: StudyFile
    composer: Composer
    params: Params
    number: int
    seed: int
    scratch: Path
    """An empty folder of this trial's own, removed afterwards."""
    data: str = ""
    """Names another draw of the study's data; empty for the one of the search."""
    on_report: Callable[[int, int, dict[str, float]], None] = lambda step, total, metrics: None
    should_stop: Callable[[], bool] = lambda: False

    @cached_property
    def point(self) -> Point:
        return self.composer.compose(self.params)

    def check(self) -> None:
        """Cheap: call it every step. Raises Stopped when the worker must stop."""
        if self.should_stop():
            raise Stopped

    def report(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Record a point of the curve. Raises Pruned or Stopped."""
        self.check()
        self.on_report(step, total, metrics)


def should_prune(
    rule: PruneTable, curve: list[dict[str, float]], total: int, others: list[list[dict[str, float]]]
) -> str:
    """The reason to stop a trial with this curve, or empty: its best so far is worse than most others' at this step.

    ``curve`` and each of ``others`` are lists of reports (``step`` and metrics); a curve that ended before this
    step (pruned itself) has no say.
    """
    step = curve[-1]["step"]
    if step < rule.after * total or step > rule.before * total or step >= total:
        return ""
    quantile = rule.quantile
    if rule.kind == "halving":
        before = curve[-2]["step"] if len(curve) > 1 else 0
        rungs = [total / rule.factor**i for i in range(1, 16)]
        if not any(before < rung <= step for rung in rungs):
            return ""  # between two rungs
        quantile = 1 - 1 / rule.factor
    sign = 1.0 if METRICS[rule.on][0] == "maximize" else -1.0
    seen = sorted(sign * row[rule.on] for other in others for row in other if row["step"] == step and rule.on in row)
    mine = [sign * row[rule.on] for row in curve if rule.on in row]
    if len(seen) < rule.min_trials or not mine:
        return ""
    bar = seen[min(int(quantile * len(seen)), len(seen) - 1)]
    if max(mine) >= bar:
        return ""
    return (
        f"{rule.on} {abs(max(mine)):.3f} at step {int(step)}, worse than the bar {abs(bar):.3f} of {len(seen)} trials"
    )


def violations(study: StudyFile, metrics: dict[str, float]) -> dict[str, float]:
    """How far each bounded metric is outside its bound: feasible where all are at most 0."""
    found: dict[str, float] = {}
    for name, limit in study.constraints.items():
        value = float(metrics[name])
        if limit.most is not None:
            found[f"{name} <= {limit.most:g}"] = value - limit.most
        if limit.least is not None:
            found[f"{name} >= {limit.least:g}"] = limit.least - value
    return found


def values_of(study: StudyFile, metrics: dict[str, float]) -> list[float]:
    """The objectives' values in the order of the study file. Raises KeyError for one that was not measured."""
    return [float(metrics[name]) for name in study.objectives]


Attributes = dict[str, Any]
Values = dict[str, Scalar]

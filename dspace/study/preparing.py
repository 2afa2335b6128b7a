"""From a claimed trial to a job: its point, its seed, what it costs, and whether the same was trained before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspace.study.cost import refusal
from dspace.study.phase import Phase, root_number
from dspace.study.space import Composer, seed_of
from dspace.study.telling import Curve, Teller
from dspace.study.trial import Job, Outcome, Pruned, derive_seed, should_prune

OWN = {"worker", "host", "seed", "test", "metrics", "beat", "progress", "slot", "cover", "warm", "attempt"} | {
    "root",
    "retry_of",
    "failure",
    "lost",
    "params",
    "cost",
    "grid",
}
"""Attributes that say how a trial came about, not what was found: a trial of the same point does not take them over."""


def known(trial: Any) -> Any:
    """What this process knows of its own trial: its attributes cost no round trip to the storage."""
    return getattr(trial, "_cached_frozen_trial", trial)


class Preparation:
    """Makes the jobs of one worker. ``composes``: whether its objective builds the point that parameters name."""

    def __init__(
        self,
        phase: Phase,
        optuna_study: Any,
        composer: Composer,
        teller: Teller,
        composes: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        self.phase, self.study, self.optuna = phase, phase.study, optuna_study
        self.composer, self.teller = composer, teller
        self.composes, self.should_stop = composes, should_stop

    def __call__(self, trial: Any, scratch: Path) -> Outcome | Job:
        """The job of a trial, or the outcome of a completed trial that trained exactly the same."""
        scratch.mkdir(exist_ok=True)
        attributes = known(trial).user_attrs
        if self.phase.comparison is None:
            params = self.composer.suggest(trial)
            if self.study.space is not None:  # the sampler is not asked where one choice is left
                trial.set_user_attr("params", params)
            chosen = seed_of(self.study, params)
            seed = (
                derive_seed(self.study.seed, root_number(attributes, trial.number))
                if chosen is None
                else derive_seed(self.study.seed, "chosen", chosen)
            )
        else:
            comparison = self.study.compare[self.phase.comparison]
            arm = trial.suggest_categorical("arm", comparison.names)
            repeat = trial.suggest_int("repeat", 0, comparison.seeds - 1)
            params = attributes["params"]
            # The same seed for the same repeat of every arm: equal data and equal draws as far as shapes allow.
            seed = derive_seed(self.study.seed, self.phase.comparison, repeat)
            trial.set_user_attr("fixed", {"arm": arm, "repeat": repeat})
        trial.set_user_attr("seed", seed)
        job = Job(self.study, self.composer, params, trial.number, seed, scratch)
        if self.phase.comparison is not None and self.study.compare[self.phase.comparison].fresh_data:
            job.data = self.phase.comparison

        curve: Curve = []

        def on_report(step: int, total: int, metrics: dict[str, float]) -> None:
            curve.append({"step": step, **{k: round(float(v), 5) for k, v in metrics.items()}})
            self.teller.progress(trial, curve, step / total)
            if self.study.prune is not None and self.phase.comparison is None:
                reason = should_prune(self.study.prune, curve, total, self._finished_curves(trial.number))
                if reason:
                    raise Pruned(reason)

        job.on_report, job.should_stop = on_report, self.should_stop
        if self.composes:
            self._refuse_cost(trial, job)
            trial.set_user_attr("point_hash", job.point.hash)
            self.teller.flush(trial)  # first told, then asked: of two workers at the same point one sees the other
            twin = self._same_point(trial.number, job.point.hash) if self.phase.comparison is None else None
            if twin is not None:
                return self._outcome_of(trial, twin)
        self.teller.begin(trial, curve)
        return job

    def _refuse_cost(self, trial: Any, job: Job) -> None:
        """Record what the point would cost. Raises Pruned where that is more than the study allows."""
        cost = job.composer.cost(job.point)
        if cost is None or self.study.cost is None:
            return
        trial.set_user_attr("cost", {"gpu": cost.gpu, "gpu_ms": cost.gpu_ms, "limit": cost.limit})
        reason = refusal(self.study.cost, cost)
        if reason and self.phase.comparison is None:
            raise Pruned(reason)

    def _outcome_of(self, trial: Any, twin: Any) -> Outcome:
        """What the trial of the same point gave, or gives or gave up: it is not run again. Raises Pruned for the latter."""
        trial.set_user_attr("duplicate_of", twin.number)
        if twin.state.name != "COMPLETE":
            what = "is running" if twin.state.name == "RUNNING" else "was stopped"
            raise Pruned(f"the same point {what} as trial {twin.number}")
        kept = {k: v for k, v in twin.user_attrs.items() if k not in OWN}
        metrics, test = twin.user_attrs["metrics"], twin.user_attrs.get("test", {})
        return Outcome(metrics, test, {**kept, "duplicate_of": twin.number})

    def _finished_curves(self, number: int) -> list[Curve]:
        trials = self.optuna.get_trials(deepcopy=False)
        return [
            t.user_attrs["curve"]
            for t in trials
            if t.state.name in ("COMPLETE", "PRUNED") and t.number != number and t.user_attrs.get("curve")
        ]

    def _same_point(self, number: int, point_hash: str) -> Any | None:
        """A trial that trained exactly this, or began to before: the complete one if there is one."""
        found = [
            t
            for t in self.optuna.get_trials(deepcopy=False)
            if t.number != number
            and t.user_attrs.get("point_hash") == point_hash
            and "duplicate_of" not in t.user_attrs
            and (t.state.name in ("COMPLETE", "PRUNED") or (t.state.name == "RUNNING" and t.number < number))
        ]
        return min(found, key=lambda t: (t.state.name != "COMPLETE", t.number), default=None)

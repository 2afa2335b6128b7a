"""What is told of a trial: its curve while it runs, and its end, complete, pruned or failed."""

from __future__ import annotations

import math
import time
from typing import Any

from dspace.study.artifacts import store_of
from dspace.study.phase import Phase
from dspace.study.storage import Home
from dspace.study.trial import Outcome, values_of, violations

Curve = list[dict[str, float]]
"""A trial's reports: the step and the metrics."""

TELL_SECONDS = 0.5
"""Least time between two notes of a running trial's curve."""


class Teller:
    """Tells the storage of the trials of one worker."""

    def __init__(self, home: Home, phase: Phase, storage: Any, optuna_study: Any) -> None:
        self.home, self.phase, self.study = home, phase, phase.study
        self.storage, self.optuna = storage, optuna_study
        self.curves: dict[int, Curve] = {}
        self.told: dict[int, float] = {}

    def begin(self, trial: Any, curve: Curve) -> None:
        """The trial is about to run and to fill ``curve``: what was told of it so far is there for others."""
        self.curves[trial.number], self.told[trial.number] = curve, time.monotonic()
        self.flush(trial)

    def flush(self, trial: Any) -> None:
        """Let others know what was told so far: to a server a trial's attributes go together."""
        if self.home.on_server:
            self.storage.flush(trial._trial_id)

    def progress(self, trial: Any, curve: Curve, share: float) -> None:
        """Tell the curve to who looks on, now and then; the whole curve is kept at the end."""
        if time.monotonic() - self.told[trial.number] > TELL_SECONDS:
            self.told[trial.number] = time.monotonic()
            trial.set_user_attr("curve", curve)
            trial.set_user_attr("progress", round(share, 4))
            self.flush(trial)

    def complete(self, trial: Any, outcome: Outcome) -> None:
        """Store attributes and artifacts, then the values, by which the trial counts as complete."""
        self._keep(trial, outcome)
        self._tell(trial, outcome)

    def prune(self, trial: Any, reason: str) -> None:
        import optuna

        self._keep_curve(trial)
        trial.set_user_attr("pruned", reason)
        self._finish(trial, optuna.trial.TrialState.PRUNED)

    def fail(self, trial: Any, reason: str) -> None:
        import optuna

        trial.set_user_attr("failure", reason[:2000])
        self._finish(trial, optuna.trial.TrialState.FAIL)

    def _keep(self, trial: Any, outcome: Outcome) -> None:
        """Attributes and artifacts."""
        from optuna.artifacts import upload_artifact

        if outcome.files:
            store = store_of(self.home, self.study)
            kept = {}
            for name, path in outcome.files.items():
                kept[name] = upload_artifact(
                    artifact_store=store, file_path=str(path), study_or_trial=trial, storage=self.storage
                )
            outcome.attributes["artifacts"] = kept
        self._keep_curve(trial)
        for key, value in outcome.attributes.items():
            trial.set_user_attr(key, value)
        if outcome.test:
            trial.set_user_attr("test", outcome.test)
        trial.set_user_attr("metrics", outcome.metrics)

    def _keep_curve(self, trial: Any) -> None:
        curve = self.curves.pop(trial.number, [])
        if curve:
            trial.set_user_attr("curve", curve)

    def _tell(self, trial: Any, outcome: Outcome) -> None:
        import optuna

        if self.phase.comparison is None:
            values = values_of(self.study, outcome.metrics)
        else:
            values = [float(outcome.metrics[self.study.compare[self.phase.comparison].metric])]
        if not all(math.isfinite(v) for v in values):
            trial.set_user_attr("pruned", "an objective is not a finite number: the training diverged")
            self._finish(trial, optuna.trial.TrialState.PRUNED)
            return
        for name, violation in (
            violations(self.study, outcome.metrics) if self.phase.comparison is None else {}
        ).items():
            if violation > 0:
                trial.set_user_attr("infeasible", name)
            if hasattr(trial, "set_constraint"):  # Optuna 5
                trial.set_constraint(name, violation)
        self._finish(trial, optuna.trial.TrialState.COMPLETE, values)

    def _finish(self, trial: Any, state: Any, values: list[float] | None = None) -> None:
        """As ``Study.tell`` for values already checked, without reading the trial back twice from a server."""
        if not self.home.on_server:
            self.optuna.tell(trial, values, state=None if values is not None else state)
            return
        if self.study.sampler.kind not in ("random", "grid"):
            frozen = self.storage.get_trial(trial._trial_id)
            self.optuna.sampler.after_trial(self.optuna, frozen, state, values)
        self.storage.set_trial_state_values(trial._trial_id, state, values)

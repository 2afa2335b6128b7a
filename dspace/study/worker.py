"""One worker process: claims trials, runs the objective, tells the results, until nothing is left to do.

Started by the engine as ``python -m dspace.study.worker``; ends with 0 (nothing left), 75 (asked to stop) or the
exit code of an error, whose text is on its standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from dspace.errors import DspaceError, UserError
from dspace.study.cost import refusal
from dspace.study.ledger import Phase, claim, claim_trial, give_back, open_study, root_number
from dspace.study.reading import load
from dspace.study.space import Composer
from dspace.study.storage import Home, connect, explain, worker_lock
from dspace.study.trial import Job, Objective, Outcome, Pruned, Stopped, derive_seed, should_prune, values_of

STOPPED = 75
MAX_FAILURES = 4
"""Trials that may fail one after another before the worker gives up."""


class TrialsFailed(DspaceError):
    """Trial after trial fails: something is wrong that running more of them will not mend."""

    exit_code = 5


DEFAULT_OBJECTIVE = "dspace.study.objective:train_point"


def find_objective(name: str) -> Objective:
    """``module:function`` -> the function."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"there is no objective {name!r}: {error}\n  cure: give module:function") from None


class Worker:
    """The loop of one worker and the state that its signal handlers touch."""

    def __init__(self, home: Home, phase: Phase, worker: str, objective: Objective, root: Path, jobs: int) -> None:
        self.home, self.study, self.phase, self.id = home, phase.study, phase, worker
        self.objective = objective
        self.storage = connect(home)
        self.optuna = open_study(phase, self.storage, jobs)
        self.composer = Composer(phase.study, root)
        self.parent = os.getppid()
        self.stopping = False
        self.failures = 0
        self.last_failure = ""

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def should_stop(self) -> bool:
        return self.stopping or os.getppid() != self.parent  # the engine is gone: nobody would stop this worker

    def run(self, deadline: float) -> int:
        """Work until the budget is spent (0) or the worker must stop (75)."""
        while True:
            if self.should_stop():
                return STOPPED
            if time.time() > deadline:
                return 0
            trial = claim_trial(self.home, self.phase, self.optuna, self.id)
            if trial is None:
                return 0
            self.run_trial(trial)
            if self.failures >= MAX_FAILURES:
                raise TrialsFailed(
                    f"{self.failures} trials in a row failed; the last: {self.last_failure}\n"
                    f"  cure: mend the cause and give the same command again ({self.id} has the traceback)"
                )

    def run_trial(self, trial: Any) -> None:
        import optuna

        scratch = Path(tempfile.mkdtemp(prefix="dspace-trial-"))
        try:
            outcome = self.attempt(trial, scratch)
            self.keep(trial, outcome, scratch)
            self.tell(trial, outcome)
            self.failures = 0
        except Pruned as reason:
            trial.set_user_attr("pruned", str(reason))
            self.optuna.tell(trial, state=optuna.trial.TrialState.PRUNED)
            self.failures = 0
        except Stopped:
            self.return_trial(trial, "stopped by the user")
        except OSError as error:
            self.return_trial_if_possible(trial, f"the storage refused: {error}")
            raise explain(error, self.home) from None
        except Exception as error:  # the objective is anybody's code
            self.fail(trial, error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def attempt(self, trial: Any, scratch: Path) -> Outcome:
        attributes = trial.user_attrs
        if self.phase.comparison is None:
            params = self.composer.suggest(trial)
            if self.study.space is not None:  # the sampler is not asked where one choice is left
                trial.set_user_attr("params", params)
            seed = derive_seed(self.study.seed, root_number(attributes, trial.number))
        else:
            comparison = self.study.compare[self.phase.comparison]
            arm = trial.suggest_categorical("arm", list(comparison.arms))
            repeat = trial.suggest_int("repeat", 0, comparison.seeds - 1)
            params = attributes["params"]
            # The same seed for the same repeat of every arm: equal data and equal draws as far as shapes allow.
            seed = derive_seed(self.study.seed, self.phase.comparison, repeat)
            trial.set_user_attr("fixed", {"arm": arm, "repeat": repeat})
        trial.set_user_attr("seed", seed)
        job = Job(self.study, self.composer, params, trial.number, seed, scratch)
        curve: list[dict[str, float]] = []

        def on_report(step: int, total: int, metrics: dict[str, float]) -> None:
            curve.append({"step": step, **{k: round(float(v), 5) for k, v in metrics.items()}})
            trial.set_user_attr("curve", curve)
            trial.set_user_attr("progress", round(step / total, 4))
            if self.study.prune is not None and self.phase.comparison is None:
                reason = should_prune(self.study.prune, curve, total, self.finished_curves(trial.number))
                if reason:
                    raise Pruned(reason)

        job.on_report, job.should_stop = on_report, self.should_stop
        if getattr(self.objective, "composes", False):
            self.refuse_cost(trial, job)
            trial.set_user_attr("point_hash", job.point.hash)
            twin = self.same_point(trial.number, job.point.hash) if self.phase.comparison is None else None
            if twin is not None:
                return self.outcome_of(trial, twin)
        return self.objective(job)

    def refuse_cost(self, trial: Any, job: Job) -> None:
        """Record what the point would cost. Raises Pruned where that is more than the study allows."""
        cost = job.composer.cost(job.point)
        if cost is None or self.study.cost is None:
            return
        trial.set_user_attr("cost", {"gpu": cost.gpu, "gpu_ms": cost.gpu_ms, "limit": cost.limit})
        reason = refusal(self.study.cost, cost)
        if reason and self.phase.comparison is None:
            raise Pruned(reason)

    def outcome_of(self, trial: Any, twin: Any) -> Outcome:
        """What the trial of the same point gave, or gives or gave up: it is not run again. Raises Pruned for the latter."""
        trial.set_user_attr("duplicate_of", twin.number)
        if twin.state.name != "COMPLETE":
            what = "is running" if twin.state.name == "RUNNING" else "was stopped"
            raise Pruned(f"the same point {what} as trial {twin.number}")
        own = ("worker", "host", "seed", "test", "metrics", "params", "cost", "retry_of", "root", "attempt")
        kept = {k: v for k, v in twin.user_attrs.items() if k not in own}
        metrics, test = twin.user_attrs["metrics"], twin.user_attrs.get("test", {})
        return Outcome(metrics, test, {**kept, "duplicate_of": twin.number})

    def finished_curves(self, number: int) -> list[list[dict[str, float]]]:
        trials = self.optuna.get_trials(deepcopy=False)
        return [
            t.user_attrs["curve"]
            for t in trials
            if t.state.name in ("COMPLETE", "PRUNED") and t.number != number and t.user_attrs.get("curve")
        ]

    def same_point(self, number: int, point_hash: str) -> Any | None:
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

    def keep(self, trial: Any, outcome: Outcome, scratch: Path) -> None:
        """Store attributes and artifacts before the trial counts as complete."""
        from optuna.artifacts import FileSystemArtifactStore, upload_artifact

        if outcome.files:
            store = FileSystemArtifactStore(str(self.home.artifacts))
            kept = {}
            for name, path in outcome.files.items():
                kept[name] = upload_artifact(
                    artifact_store=store, file_path=str(path), study_or_trial=trial, storage=self.storage
                )
            outcome.attributes["artifacts"] = kept
        for key, value in outcome.attributes.items():
            trial.set_user_attr(key, value)
        if outcome.test:
            trial.set_user_attr("test", outcome.test)
        trial.set_user_attr("metrics", outcome.metrics)

    def tell(self, trial: Any, outcome: Outcome) -> None:
        import optuna

        if self.phase.comparison is None:
            values = values_of(self.study, outcome.metrics)
        else:
            values = [float(outcome.metrics[self.study.compare[self.phase.comparison].metric])]
        if not all(math.isfinite(v) for v in values):
            trial.set_user_attr("pruned", "an objective is not a finite number: the training diverged")
            self.optuna.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
        self.optuna.tell(trial, values)

    def return_trial(self, trial: Any, reason: str) -> None:
        with claim(self.home):
            frozen = self.storage.get_trial(trial._trial_id)
            give_back(self.home, self.optuna, frozen, reason, died=False)

    def return_trial_if_possible(self, trial: Any, reason: str) -> None:
        """On a full disk not even this may work: then the next run finds the trial without its worker."""
        with contextlib.suppress(OSError, DspaceError):
            self.return_trial(trial, reason)

    def fail(self, trial: Any, error: Exception) -> None:
        import optuna

        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        self.failures += 1
        self.last_failure = text
        trial.set_user_attr("failure", text[:2000])
        self.optuna.tell(trial, state=optuna.trial.TrialState.FAIL)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="dspace.study.worker", description=__doc__)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--url")
    parser.add_argument("--id", required=True)
    parser.add_argument("--root", default=".")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=math.inf)
    parser.add_argument("--comparison")
    parser.add_argument("--objective", default=DEFAULT_OBJECTIVE)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the engine, which asks its workers to stop
    home = Home(Path(args.dir), args.url)
    try:
        with worker_lock(home, args.id):
            phase = Phase(load(home.definition), args.comparison)
            worker = Worker(home, phase, args.id, find_objective(args.objective), Path(args.root), args.jobs)
            signal.signal(signal.SIGTERM, worker.stop)
            return worker.run(args.deadline)
    except OSError as error:
        problem: DspaceError = explain(error, home)
    except DspaceError as error:
        problem = error
    print(f"error: {problem}", file=sys.stderr)
    return problem.exit_code


if __name__ == "__main__":
    sys.exit(main())

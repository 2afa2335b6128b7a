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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from dspace.errors import DspaceError, UserError
from dspace.study import ledger, queue, remote
from dspace.study.artifacts import store_of
from dspace.study.cost import refusal
from dspace.study.ledger import Phase, claim, claim_trial, give_back, open_study, root_number
from dspace.study.reading import load
from dspace.study.space import Composer, seed_of
from dspace.study.storage import Home, StorageError, connect, explain, prepare, worker_lock
from dspace.study.trial import (
    Job,
    Objective,
    Outcome,
    Pruned,
    Stopped,
    derive_seed,
    should_prune,
    values_of,
    violations,
)

STOPPED = 75
MAX_FAILURES = 4
"""Trials that may fail one after another before the worker gives up."""
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
TELL_SECONDS = 0.5
"""Least time between two notes of a running trial's curve."""
IDLE_SECONDS = 0.1
PATIENCE_WITH_ENGINE = 60.0
"""Seconds without anything to do after which a worker takes it that no engine is there."""


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


def known(trial: Any) -> Any:
    """What this process knows of its own trial: its attributes cost no round trip to the storage."""
    return getattr(trial, "_cached_frozen_trial", trial)


class Worker:
    """The loop of one worker and the state that its signal handlers touch."""

    def __init__(
        self, home: Home, phase: Phase, worker: str, objective: Objective, root: str | None, jobs: int
    ) -> None:
        self.home, self.study, self.phase, self.id = home, phase.study, phase, worker
        self.objective = objective
        self.storage = connect(home, phase.study.workers.patience)
        if home.on_server:
            self.storage.gathers = True  # type: ignore[attr-defined]
        self.optuna = open_study(phase, self.storage, jobs)
        self.composer = Composer(phase.study, Path(root or self.optuna.user_attrs.get("root", ".")))
        self.parent: int | None = os.getppid()
        self.stopping = False
        self.failures = 0
        self.idle = 0.0
        self.curves: dict[int, list[dict[str, float]]] = {}
        self.running: list[Any] = []
        self.last_failure = ""

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def should_stop(self) -> bool:
        if self.parent is not None and os.getppid() != self.parent:
            return True  # the engine is gone: nobody would stop this worker
        return self.stopping

    def run(self, deadline: float) -> int:
        """Work until the budget is spent (0) or the worker must stop (75)."""
        while True:
            if self.should_stop():
                return STOPPED
            if time.time() > deadline:
                return 0
            trial = claim_trial(self.home, self.phase, self.optuna, self.id)
            if trial is None:
                if self.nothing_comes():
                    return 0
                continue
            self.idle = 0.0
            self.run_trial(trial)
            if self.failures >= MAX_FAILURES:
                raise TrialsFailed(
                    f"{self.failures} trials in a row failed; the last: {self.last_failure}\n"
                    f"  cure: mend the cause and give the same command again ({self.id} has the traceback)"
                )

    def nothing_comes(self) -> bool:
        """Whether there will be no more to do. On a server the engine makes the trials, a little ahead of the workers."""
        if not self.home.on_server or self.idle > PATIENCE_WITH_ENGINE:
            return True
        if round(self.idle / IDLE_SECONDS) % 4 == 0 and queue.is_settled(self.phase, self.optuna):
            return True  # the whole study is read for that: not every time
        time.sleep(IDLE_SECONDS)
        self.idle += IDLE_SECONDS
        return False

    def run_trial(self, trial: Any) -> None:
        """Run a trial, and those that can share its steps."""
        self.running = [trial]
        scratch = Path(tempfile.mkdtemp(prefix="dspace-trial-"))
        beating = remote.heartbeat(self.storage, self.running, self.study.workers.heartbeat)
        try:
            with beating if self.home.on_server else contextlib.nullcontext():
                self.run_together(trial, scratch)
        except Stopped:
            for left in list(self.running):
                self.return_trial(left, "stopped by the user")
        except StorageError:
            raise
        except OSError as error:
            for left in list(self.running):
                self.return_trial_if_possible(left, f"the storage refused: {error}")
            raise explain(error, self.home) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def run_together(self, trial: Any, scratch: Path) -> None:
        jobs: dict[int, Job] = {}

        def prepare(new: Any) -> Outcome | Job:
            made = self.prepare(new, scratch / str(new.number))
            if isinstance(made, Job):
                jobs[new.number] = made
            return made

        first = self.conclude(trial, lambda: prepare(trial))
        if not isinstance(first, Job):
            return
        many = getattr(self.objective, "many", None)
        most = self.objective.stack(first) - 1 if many is not None else 0  # type: ignore[attr-defined]
        others = ledger.claim_alike(self.home, self.phase, self.optuna, self.id, self.alike(trial, first), most)
        self.running += others
        for other in others:
            self.conclude(other, lambda other=other: prepare(other))  # type: ignore[misc]
        together = [t for t in (trial, *others) if t.number in jobs]
        results: list[Outcome | Exception] | None = None
        if many is not None and len(together) > 1:
            try:
                results = many([jobs[t.number] for t in together])
            except (Stopped, OSError):
                raise
            except Exception:  # out of memory, perhaps: one by one they may fit
                traceback.print_exc()
        for i, each in enumerate(together):
            if results is None:
                self.conclude(each, lambda each=each: self.objective(jobs[each.number]))  # type: ignore[misc]
            else:
                self.conclude(each, lambda i=i: results[i])  # type: ignore[misc]

    def conclude(self, trial: Any, act: Callable[[], Any]) -> Any:
        """Do ``act`` for a trial and tell its end: an outcome, pruned, or failed. A job is no end, and is returned."""
        import optuna

        try:
            outcome = act()
            if isinstance(outcome, Job):
                return outcome
            if isinstance(outcome, Exception):
                raise outcome
            self.keep(trial, outcome)
            self.tell(trial, outcome)
            self.failures = 0
        except Pruned as reason:
            self.keep_curve(trial)
            trial.set_user_attr("pruned", str(reason))
            self.finish(trial, optuna.trial.TrialState.PRUNED)
            self.failures = 0
        except (Stopped, StorageError, OSError):
            raise
        except optuna.exceptions.UpdateFinishedTrialError:
            # It was taken for lost (no sign of life came through for too long) and is another worker's now.
            print(f"trial {trial.number} was given to another worker meanwhile", file=sys.stderr, flush=True)
        except Exception as error:  # the objective is anybody's code
            self.fail(trial, error)
        self.running[:] = [t for t in self.running if t.number != trial.number]
        return None

    def alike(self, trial: Any, job: Job) -> Callable[[Any], bool]:
        """Which waiting trials can share the steps of ``trial``: those that differ in rates and seeds only."""
        if self.phase.comparison is not None:
            arm = known(trial).user_attrs.get("arm")
            return lambda other: other.user_attrs.get("arm") == arm
        free = self.study.free_axes
        mine = {k: v for k, v in job.params.items() if k not in free}

        def same(other: Any) -> bool:
            fixed = other.system_attrs.get("fixed_params", {})
            return fixed.keys() == job.params.keys() and {k: v for k, v in fixed.items() if k not in free} == mine

        return same

    def prepare(self, trial: Any, scratch: Path) -> Outcome | Job:
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
        curve: list[dict[str, float]] = []
        self.curves[trial.number], told = curve, time.monotonic()

        def on_report(step: int, total: int, metrics: dict[str, float]) -> None:
            nonlocal told
            curve.append({"step": step, **{k: round(float(v), 5) for k, v in metrics.items()}})
            if time.monotonic() - told > TELL_SECONDS:  # for who looks on; the whole curve is kept at the end
                told = time.monotonic()
                trial.set_user_attr("curve", curve)
                trial.set_user_attr("progress", round(step / total, 4))
                self.flush(trial)
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
        self.flush(trial)
        return job

    def flush(self, trial: Any) -> None:
        """Let others know what was told so far: to a server a trial's attributes go together."""
        if self.home.on_server:
            self.storage.flush(trial._trial_id)  # type: ignore[attr-defined]

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
        kept = {k: v for k, v in twin.user_attrs.items() if k not in OWN}
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

    def keep(self, trial: Any, outcome: Outcome) -> None:
        """Store attributes and artifacts before the trial counts as complete."""
        from optuna.artifacts import upload_artifact

        if outcome.files:
            store = store_of(self.home, self.study)
            kept = {}
            for name, path in outcome.files.items():
                kept[name] = upload_artifact(
                    artifact_store=store, file_path=str(path), study_or_trial=trial, storage=self.storage
                )
            outcome.attributes["artifacts"] = kept
        self.keep_curve(trial)
        for key, value in outcome.attributes.items():
            trial.set_user_attr(key, value)
        if outcome.test:
            trial.set_user_attr("test", outcome.test)
        trial.set_user_attr("metrics", outcome.metrics)

    def keep_curve(self, trial: Any) -> None:
        curve = self.curves.pop(trial.number, [])
        if curve:
            trial.set_user_attr("curve", curve)

    def tell(self, trial: Any, outcome: Outcome) -> None:
        import optuna

        if self.phase.comparison is None:
            values = values_of(self.study, outcome.metrics)
        else:
            values = [float(outcome.metrics[self.study.compare[self.phase.comparison].metric])]
        if not all(math.isfinite(v) for v in values):
            trial.set_user_attr("pruned", "an objective is not a finite number: the training diverged")
            self.finish(trial, optuna.trial.TrialState.PRUNED)
            return
        for name, violation in (
            violations(self.study, outcome.metrics) if self.phase.comparison is None else {}
        ).items():
            if violation > 0:
                trial.set_user_attr("infeasible", name)
            if hasattr(trial, "set_constraint"):  # Optuna 5
                trial.set_constraint(name, violation)
        self.finish(trial, optuna.trial.TrialState.COMPLETE, values)

    def finish(self, trial: Any, state: Any, values: list[float] | None = None) -> None:
        """As ``Study.tell`` for values already checked, without reading the trial back twice from a server."""
        if not self.home.on_server:
            self.optuna.tell(trial, values, state=None if values is not None else state)
            return
        if self.study.sampler.kind not in ("random", "grid"):
            frozen = self.storage.get_trial(trial._trial_id)
            self.optuna.sampler.after_trial(self.optuna, frozen, state, values)
        self.storage.set_trial_state_values(trial._trial_id, state, values)

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
        self.finish(trial, optuna.trial.TrialState.FAIL)


def fetch_definition(home: Home) -> None:
    """On a machine that does not see the engine's folder, make one from what the storage holds."""
    if home.definition.is_file() or not home.on_server:
        return
    prepare(home)
    files = {s.study_name: s.user_attrs.get("file") for s in connect(home, 60.0).get_all_studies()}
    text = files.get(home.folder.name)
    if not text:
        raise UserError(f"{remote.hidden(home.url or '')} holds no study {home.folder.name!r}\n  cure: see --dir")
    home.definition.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="dspace.study.worker", description=__doc__)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--url")
    parser.add_argument("--id", required=True)
    parser.add_argument("--root")
    parser.add_argument("--alone", action="store_true", help="no engine started this worker: outlive the parent")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=math.inf)
    parser.add_argument("--comparison")
    parser.add_argument("--objective", default=DEFAULT_OBJECTIVE)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the engine, which asks its workers to stop
    home = Home(Path(args.dir), args.url)
    try:
        fetch_definition(home)
        with worker_lock(home, args.id):
            phase = Phase(load(home.definition), args.comparison)
            worker = Worker(home, phase, args.id, find_objective(args.objective), args.root, args.jobs)
            worker.parent = None if args.alone else worker.parent
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

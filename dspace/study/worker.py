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

from dspace.errors import DspaceError, StorageError, UserError
from dspace.study import ledger, queue, remote
from dspace.study.away import hidden
from dspace.study.ledger import claim, claim_trial, give_back, open_study
from dspace.study.phase import Phase
from dspace.study.preparing import Preparation, known
from dspace.study.reading import load
from dspace.study.space import Composer
from dspace.study.storage import Home, connect, explain, prepare, worker_lock
from dspace.study.telling import Teller
from dspace.study.trial import Job, Objective, Outcome, Pruned, Stopped

STOPPED = 75
MAX_FAILURES = 4
"""Trials that may fail one after another before the worker gives up."""
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
        self.teller = Teller(home, phase, self.storage, self.optuna)
        composes = getattr(objective, "composes", False)
        self.prepare = Preparation(phase, self.optuna, self.composer, self.teller, composes, self.should_stop)
        self.parent: int | None = os.getppid()
        self.stopping = False
        self.failures = 0
        self.idle = 0.0
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
            try:
                outcome = act()
                if isinstance(outcome, Job):
                    return outcome
                if isinstance(outcome, Exception):
                    raise outcome
                self.teller.complete(trial, outcome)
                self.failures = 0
            except Pruned as reason:
                self.teller.prune(trial, str(reason))
                self.failures = 0
            except (Stopped, StorageError, OSError, optuna.exceptions.UpdateFinishedTrialError):
                raise
            except Exception as error:  # the objective is anybody's code
                self.fail(trial, error)
        except optuna.exceptions.UpdateFinishedTrialError:
            # It was taken for lost (no sign of life came through for too long) and is another worker's now.
            print(f"trial {trial.number} was given to another worker meanwhile", file=sys.stderr, flush=True)
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

    def return_trial(self, trial: Any, reason: str) -> None:
        with claim(self.home):
            frozen = self.storage.get_trial(trial._trial_id)
            give_back(self.home, self.optuna, frozen, reason, died=False)

    def return_trial_if_possible(self, trial: Any, reason: str) -> None:
        """On a full disk not even this may work: then the next run finds the trial without its worker."""
        with contextlib.suppress(OSError, DspaceError):
            self.return_trial(trial, reason)

    def fail(self, trial: Any, error: Exception) -> None:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        self.failures += 1
        self.last_failure = text
        self.teller.fail(trial, text)


def fetch_definition(home: Home) -> None:
    """On a machine that does not see the engine's folder, make one from what the storage holds."""
    if home.definition.is_file() or not home.on_server:
        return
    prepare(home)
    files = {s.study_name: s.user_attrs.get("file") for s in connect(home, 60.0).get_all_studies()}
    text = files.get(home.folder.name)
    if not text:
        raise UserError(f"{hidden(home.url or '')} holds no study {home.folder.name!r}\n  cure: see --dir")
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _work(args)
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not from Python
                signal.signal(number, handler)


def _work(args: argparse.Namespace) -> int:
    if not args.alone:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the engine, which asks its workers to stop
    home = Home(Path(args.dir), args.url)
    try:
        fetch_definition(home)
        with worker_lock(home, args.id):
            phase = Phase(load(home.definition), args.comparison)
            worker = Worker(home, phase, args.id, find_objective(args.objective), args.root, args.jobs)
            signal.signal(signal.SIGTERM, worker.stop)
            if args.alone:
                worker.parent = None
                signal.signal(signal.SIGINT, worker.stop)
            return worker.run(args.deadline)
    except OSError as error:
        problem: DspaceError = explain(error, home)
    except DspaceError as error:
        problem = error
    print(f"error: {problem}", file=sys.stderr)
    return problem.exit_code


if __name__ == "__main__":
    sys.exit(main())

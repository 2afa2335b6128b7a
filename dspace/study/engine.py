"""Runs a study: heals what an earlier run left, starts worker processes, watches them, compares, sums up.

The engine computes nothing itself. Each worker is a process of its own with its share of the cores; a worker that
dies costs its running trial, which is repeated once.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspace.errors import DspaceError, StorageError, UserError
from dspace.study import enqueue, ledger, queue, remote
from dspace.study.ledger import Healed
from dspace.study.phase import Phase, owed, waiting
from dspace.study.placement import Handle, Here, Placement, Ray, Slurm, worker_command
from dspace.study.progress import Progress
from dspace.study.reading import find, load
from dspace.study.schema import StudyFile
from dspace.study.space import Composer
from dspace.study.storage import Home, connect, home_of, prepare, storage_errors
from dspace.study.worker import DEFAULT_OBJECTIVE, STOPPED

if TYPE_CHECKING:
    from dspace.study.change import Waiting

POLL_SECONDS = 0.25


@dataclass
class Summary:
    """What a run ended with: counts of trials by state (search and comparisons together)."""

    name: str
    folder: Path
    counts: dict[str, int] = field(default_factory=dict)
    healed: list[Healed] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def run(
    source: str | Path,
    jobs: int = 1,
    *,
    folder: str | Path | None = None,
    storage: str | None = None,
    objective: str = DEFAULT_OBJECTIVE,
    trials: int | None = None,
    quiet: bool = False,
    ray: str | None = None,
    slurm: str | None = None,
) -> Summary:
    """Run a study file to the end of its budget, or go on with it where it stopped.

    ``folder`` is ``runs/NAME`` unless given, ``storage`` an SQLAlchemy URL or ``grpc://HOST:PORT`` in place of the
    folder's journal (or of what the study file says), ``objective`` a ``module:function`` (see
    :mod:`dspace.study.trial`), ``trials`` another budget. ``ray`` is the address of a Ray cluster that places the
    workers, ``slurm`` submitit's name of a cluster (``"slurm"`` or ``"local"``).
    Raises StudyError, UserError and StorageError; after Ctrl-C the summary says ``interrupted``.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least one worker is needed\n  cure: --jobs 1")
    path = find(source)
    study = load(path, path.resolve().parent)
    storage = storage or study.storage
    remote.check_url(storage, jobs)
    if (ray or slurm) and not Home(Path(), storage).on_server:
        raise UserError(
            "workers on other machines need a storage on a server: no lock of this machine binds them\n"
            "  cure: --storage grpc://HOST:PORT (or postgresql://...), see docs/workers.md; or leave --ray and --slurm out"
        )
    if ray and slurm:
        raise UserError("workers are placed by Ray or by Slurm, not by both\n  cure: give one of --ray and --slurm")
    if trials is not None:
        study = study.model_copy(update={"budget": study.budget.model_copy(update={"trials": trials})})
    home = home_of(study.name, folder, storage)
    prepare(home)
    placement: Placement = Here(jobs)
    if ray:
        placement = Ray(ray, study.workers)
    elif slurm:
        placement = Slurm(slurm, study.workers, home.workers)
    try:
        return Engine(home, study, path, jobs, objective, quiet, placement).run()
    finally:
        placement.close()


class Engine:
    """One run of one study."""

    def __init__(
        self,
        home: Home,
        study: StudyFile,
        path: Path,
        jobs: int,
        objective: str,
        quiet: bool,
        placement: Placement | None = None,
    ) -> None:
        self.home, self.study, self.path, self.jobs = home, study, path, jobs
        self.placement = placement or Here(jobs)
        self.watch = remote.Watch(study.workers.grace)
        self.healed_at = 0.0
        self.first: list[Waiting] = []
        self.objective, self.quiet = objective, quiet
        self.root = path.resolve().parent
        self.started = time.time()
        self.workers: dict[str, Handle] = {}
        self.launched = 0
        self.respawns = 0
        self.summary = Summary(study.name, home.folder)

    def run(self) -> Summary:
        search = Phase(self.study)
        comparisons = [Phase(self.study, name) for name in self.study.compare]
        composer = Composer(self.study, self.root)
        if self.objective == DEFAULT_OBJECTIVE:
            composer.check()
        self.first = enqueue.first_points(self.study, enqueue.warm_points(self.study, self.root), composer.walk)
        ledger.remove_stale_lock(self.home)
        self.storage = connect(self.home, self.study.workers.patience)
        try:
            with storage_errors(self.home):
                optuna_study = ledger.open_study(search, self.storage, self.jobs)
                ledger.refuse_changes(self.home, search, self.storage, optuna_study)
                self.write_definition(optuna_study)
                self.heal([search, *comparisons])
                if not self.home.on_server:  # there the queue holds them
                    enqueue.enqueue_cover(self.home, search, optuna_study, self.first)
                self.run_phase(search, optuna_study)
                for phase in comparisons:
                    missing = enqueue.enqueue_comparison(self.home, phase, self.storage, optuna_study)
                    if missing:
                        self.summary.notes.append(
                            f"comparison {phase.comparison!r}: the search completed no trial of {', '.join(missing)}"
                        )
                    self.run_phase(phase, ledger.open_study(phase, self.storage))
        except KeyboardInterrupt:
            self.summary.interrupted = True
            self.stop_workers()
        except BaseException:
            self.stop_workers()
            raise
        self.count([search, *comparisons])
        self.summary.seconds = time.time() - self.started
        return self.summary

    def write_definition(self, optuna_study: Any) -> None:
        """Keep the file as it is run, and where its relative paths start."""
        text = self.path.read_text(encoding="utf-8")
        trials = self.study.budget.trials
        if load(self.path).budget.trials != trials:  # --trials: workers read the copy, so the copy must say so
            text = re.sub(r"(?m)^(\s*trials\s*=\s*)\d[\d_]*", rf"\g<1>{trials}", text, count=1)
        temporary = self.home.definition.with_suffix(".new")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.home.definition)
        if load(self.home.definition).budget.trials != trials:
            raise UserError("--trials needs a `trials = ...` in [budget]\n  cure: write it into the study file")
        queue.remember(optuna_study, text)
        optuna_study.set_user_attr("root", str(self.root))
        optuna_study.set_user_attr("jobs", self.jobs)

    def heal(self, phases: list[Phase]) -> None:
        healed = ledger.heal(self.home, phases, self.storage, self.watch)
        self.healed_at = time.time()
        self.summary.healed += healed
        for trial in healed:
            fate = "runs again" if trial.retried else "failed twice: given up"
            self.say(f"trial {trial.number} of {trial.study} had lost its worker: {fate}")

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    # -- one phase ---------------------------------------------------------------------------------------

    def run_phase(self, phase: Phase, optuna_study: Any) -> None:
        if not self.owed(phase, optuna_study):
            return
        minutes = self.study.budget.minutes if phase.comparison is None else None
        deadline = self.started + 60 * minutes if minutes else float("inf")
        with Progress(phase, self.jobs, deadline, quiet=self.quiet) as progress:
            self.supply(phase, optuna_study, optuna_study.get_trials(deepcopy=False))
            for _ in range(min(self.jobs, self.owed(phase, optuna_study))):
                self.launch(phase, deadline)
            while self.workers or self.awaited(phase, optuna_study, deadline):
                time.sleep(POLL_SECONDS)
                trials = optuna_study.get_trials(deepcopy=False)
                self.supply(phase, optuna_study, trials)
                progress.update(trials)
                self.reap(phase, optuna_study, deadline)
            progress.update(optuna_study.get_trials(deepcopy=False))

    def supply(self, phase: Phase, optuna_study: Any, trials: list[Any]) -> None:
        """On a server the engine makes the trials, and looks after those whose workers it cannot see."""
        if not self.home.on_server:
            return
        queue.top_up(phase, optuna_study, max(4 * self.jobs, 16), self.first, trials)
        if time.time() - self.healed_at > min(self.study.workers.heartbeat, self.study.workers.grace / 2):
            self.heal([phase])

    def awaited(self, phase: Phase, optuna_study: Any, deadline: float) -> bool:
        """Whether trials of workers that this engine did not start, or lost ones, are still to be waited for."""
        if not self.home.on_server or time.time() > deadline or self.respawns > self.most_respawns:
            return False
        trials = optuna_study.get_trials(deepcopy=False)
        if waiting(trials):
            self.launch(phase, deadline)
        return queue.pending(phase, trials) > 0

    @property
    def most_respawns(self) -> int:
        return 2 * self.jobs + 2

    def owed(self, phase: Phase, optuna_study: Any) -> int:
        trials = optuna_study.get_trials(deepcopy=False)
        if self.home.on_server:
            return queue.pending(phase, trials)
        return owed(phase, trials)

    def launch(self, phase: Phase, deadline: float) -> None:
        self.launched += 1
        worker = f"{os.uname().nodename}-{os.getpid()}-{self.launched}"
        # The package must be found from wherever the engine found it, also when it is not installed.
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in paths if p))}
        folder = self.home.folder if isinstance(self.placement, Here) else self.home.folder.resolve()
        arguments = ["--dir", str(folder), "--id", worker]
        arguments += ["--jobs", str(self.jobs), "--objective", self.objective, "--root", str(self.root)]
        arguments += ["--deadline", repr(deadline)] if deadline != float("inf") else []
        arguments += ["--comparison", phase.comparison] if phase.comparison is not None else []
        arguments += ["--url", self.home.url] if self.home.url is not None else []
        log = self.home.workers / f"{worker}.log"
        self.workers[worker] = self.placement.start(worker_command(arguments), environment, log)

    def reap(self, phase: Phase, optuna_study: Any, deadline: float) -> None:
        """See to workers that have ended: all is done, an error of the user's, or a death to mend."""
        for worker, handle in list(self.workers.items()):
            code = handle.poll()
            if code is None:
                continue
            del self.workers[worker]
            if code in (0, STOPPED):
                continue
            said = _last_error(handle.last_words())
            if code > 0 and code != 1:
                self.stop_workers()
                raise _error_of(said, code)
            self.heal([phase])
            cause = f"signal {-code}" if code < 0 else f"code {code}"
            cause += f": {said}" if said else ""
            self.respawns += 1
            if self.respawns > self.most_respawns:
                self.stop_workers()
                raise DspaceError(f"workers keep dying, the last by {cause}\n  cure: see {self.home.workers}")
            self.say(f"worker {worker} died by {cause}; another takes its place")
            if self.owed(phase, optuna_study) and time.time() < deadline:
                self.launch(phase, deadline)
        if not self.workers and self.owed(phase, optuna_study) and time.time() < deadline and self.respawns:
            self.respawns += 1
            if self.respawns <= self.most_respawns:
                self.launch(phase, deadline)

    def stop_workers(self, patience: float = 30.0) -> None:
        """Ask the workers to stop; kill those that do not. A second Ctrl-C kills at once."""
        for handle in self.workers.values():
            handle.ask_to_stop()
        end = time.time() + patience
        try:
            while time.time() < end and any(h.poll() is None for h in self.workers.values()):
                time.sleep(0.05)
        except KeyboardInterrupt:
            pass
        for handle in self.workers.values():
            handle.kill()
        self.workers.clear()

    def count(self, phases: list[Phase]) -> None:
        known = {s.study_name for s in self.storage.get_all_studies()}
        counts: dict[str, int] = {}
        for phase in phases:
            if phase.name in known:
                for trial in ledger.open_study(phase, self.storage).get_trials(deepcopy=False):
                    counts[trial.state.name.lower()] = counts.get(trial.state.name.lower(), 0) + 1
        self.summary.counts = counts


def _last_error(text: str) -> str:
    _, found, last = text.rpartition("error: ")
    return (last if found else text[-800:]).strip()


def _error_of(text: str, code: int) -> DspaceError:
    kinds: dict[int, type[DspaceError]] = {2: UserError, 4: StorageError}
    error = kinds.get(code, DspaceError)(text or f"a worker ended with code {code}")
    error.exit_code = code
    return error


def heal(name: str | Path, *, folder: str | Path | None = None, storage: str | None = None, cut: bool = False) -> Any:
    """Mend a study by hand: ``cut`` a damaged journal (a copy is kept), mark dead workers' trials as failed.

    Returns (what was cut and where the copy is, or None; the trials healed).
    """
    from dspace.study.results import open_home
    from dspace.study.storage import cut_damage

    home = open_home(name, folder, storage)
    ledger.remove_stale_lock(home)
    done = cut_damage(home) if cut else None
    study = load(home.definition)
    phases = [Phase(study), *(Phase(study, c) for c in study.compare)]
    return done, ledger.heal(home, phases, connect(home), remote.ByClock(study.workers.grace))

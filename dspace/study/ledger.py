"""Who runs which trial, and which died with their worker: all bookkeeping on Optuna's storage.

Every change is made under one lock (``claim``), so that the budget is met exactly and nothing is run twice.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspace.errors import StorageError
from dspace.study import queue
from dspace.study.phase import Phase, owed, retries, root_number, waiting
from dspace.study.storage import Home, is_alive, living_workers, storage_errors, worker_lock
from dspace.study.trial import derive_seed

if TYPE_CHECKING:
    import optuna

    from dspace.study.remote import Watch

FREE = {"budget", "title", "doc", "compare", "storage", "artifacts", "workers"}
"""Tables of the study file that may change while a study goes on."""

MAX_ATTEMPTS = 2
"""A trial whose worker died is tried once more."""


@contextlib.contextmanager
def claim(home: Home) -> Iterator[None]:
    """The lock under which trials are claimed, healed and enqueued."""
    with storage_errors(home), worker_lock(home, "claim"):
        yield


def open_study(phase: Phase, storage: Any, number_of_jobs: int = 1) -> optuna.Study:
    """Create or open the Optuna study of this phase with the sampler that the study file names."""
    import optuna

    sampler = make_sampler(phase, number_of_jobs)
    if phase.name in {s.study_name for s in storage.get_all_studies()}:
        return optuna.load_study(storage=storage, study_name=phase.name, sampler=sampler)
    return optuna.create_study(
        storage=storage, study_name=phase.name, directions=phase.directions, sampler=sampler, load_if_exists=True
    )


def make_sampler(phase: Phase, number_of_jobs: int = 1) -> Any:
    """A sampler reseeded for each trial from (study seed, trial number): workers never share random numbers."""
    import optuna

    table, seed = phase.study.sampler, phase.study.seed
    if phase.comparison is not None:
        return optuna.samplers.RandomSampler(seed=seed)

    def make(seed: int) -> optuna.samplers.BaseSampler:
        if table.kind == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=table.population)
        if table.kind == "qmc":
            return optuna.samplers.QMCSampler(
                seed=seed, scramble=True, warn_asynchronous_seeding=False, warn_independent_sampling=False
            )
        if table.kind in ("random", "grid"):  # of a grid every number is fixed
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `group` is called experimental
            # Conditional axes make groups; constant_liar keeps parallel workers apart.
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=table.startup_trials,
                multivariate=True,
                group=True,
                constant_liar=number_of_jobs > 1,
            )

    class Reseeded(optuna.samplers.BaseSampler):
        """Delegates to a sampler made anew for every trial."""

        def __init__(self) -> None:
            self.inner = make(derive_seed(seed, "sampler"))

        def before_trial(self, study: optuna.Study, trial: Any) -> None:
            if table.kind != "qmc":  # its points are one sequence: the position in it is kept in the storage
                self.inner = make(derive_seed(seed, "sampler", trial.number))
            self.inner.before_trial(study, trial)

        def after_trial(self, study: optuna.Study, trial: Any, state: Any, values: Any) -> None:
            self.inner.after_trial(study, trial, state, values)

        def infer_relative_search_space(self, study: optuna.Study, trial: Any) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: optuna.Study, trial: Any, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: optuna.Study, trial: Any, name: str, distribution: Any) -> Any:
            return self.inner.sample_independent(study, trial, name, distribution)

    return Reseeded()


def claim_trial(home: Home, phase: Phase, optuna_study: optuna.Study, worker: str) -> optuna.Trial | None:
    """Take the next trial, or None when the budget is spent. Marks it as this worker's."""
    if home.on_server:
        return queue.take(phase, optuna_study, worker)
    with claim(home):
        if not owed(phase, optuna_study.get_trials(deepcopy=False)):
            return None
        trial = optuna_study.ask()
        trial.set_user_attr("worker", worker)
        trial.set_user_attr("host", os.uname().nodename)
        return trial


def claim_alike(
    home: Home, phase: Phase, optuna_study: optuna.Study, worker: str, alike: Callable[[Any], bool], most: int
) -> list[optuna.Trial]:
    """Take up to ``most`` further waiting trials for which ``alike`` holds, to be trained beside one another."""
    import optuna

    taken: list[optuna.Trial] = []
    if home.on_server:
        while len(taken) < most and (trial := queue.take(phase, optuna_study, worker, alike)) is not None:
            taken.append(trial)
        return taken
    with claim(home):
        trials = optuna_study.get_trials(deepcopy=False)
        if phase.comparison is None:
            most = min(most, owed(phase, trials))
        for frozen in [t for t in waiting(trials) if alike(t)][: max(most, 0)]:
            if optuna_study._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.RUNNING):
                taken.append(optuna.Trial(optuna_study, frozen._trial_id))
                taken[-1].set_user_attr("worker", worker)
                taken[-1].set_user_attr("host", os.uname().nodename)
    return taken


def give_back(home: Home, optuna_study: optuna.Study, trial: Any, reason: str, died: bool) -> int | None:
    """Mark a running trial as failed and enqueue its repetition; returns the number of attempts so far.

    Returns None when it has been tried often enough. Under the lock the repetition is enqueued first: a stop in
    between is mended by the next call, which sees that it exists. On a server the trial is failed first, because one
    healer only can do that; a repetition that is missing then is made by :func:`heal`.
    """
    import optuna

    attempt = int(trial.user_attrs.get("attempt", 1))
    again = attempt < MAX_ATTEMPTS or not died
    storage, trial_id = optuna_study._storage, trial._trial_id
    if home.on_server:
        if queue.fail_lost(optuna_study, trial, reason) and again:
            _repeat(optuna_study, trial, died)
        return attempt if again else None
    if again and trial.number not in retries(optuna_study.get_trials(deepcopy=False)):
        _repeat(optuna_study, trial, died)
    storage.set_trial_user_attr(trial_id, "failure", reason)
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
        storage.set_trial_state_values(trial_id, optuna.trial.TrialState.FAIL)
    return attempt if again else None


def _repeat(optuna_study: optuna.Study, trial: Any, died: bool) -> None:
    """Enqueue a trial again: same parameters, same seed. Optuna's own marks of a retry are set too."""
    import optuna

    attributes = dict(trial.user_attrs)
    root = root_number(attributes, trial.number)
    kept = {k: attributes[k] for k in ("params", "arm", "repeat", "slot", "cover", "warm", "grid") if k in attributes}
    kept |= {
        "retry_of": trial.number,
        "root": root,
        "attempt": int(attributes.get("attempt", 1)) + int(died),
    }
    marks = {"failed_trial": root, "retry_history": [*trial.system_attrs.get("retry_history", []), trial.number]}
    fixed = dict(trial.params) or trial.system_attrs.get("fixed_params", {})
    optuna_study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING, system_attrs={"fixed_params": fixed, **marks}, user_attrs=kept
        )
    )


@dataclass(frozen=True)
class Healed:
    """A running trial that was found without its worker."""

    study: str
    number: int
    worker: str
    retried: bool


def heal(home: Home, phases: list[Phase], storage: Any, watch: Watch | None = None) -> list[Healed]:
    """Mark running trials of dead workers as failed and enqueue each once more. Completed trials are not touched.

    ``watch`` judges workers of other machines by their signs of life; without it they are let be.
    """
    found: list[Healed] = []
    with claim(home):
        alive = living_workers(home)
        known = {s.study_name for s in storage.get_all_studies()}
        for phase in phases:
            if phase.name not in known:
                continue
            optuna_study = open_study(phase, storage)
            trials = optuna_study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state.name != "RUNNING" or not _is_dead(home, trial, watch):
                    continue
                retried = give_back(home, optuna_study, trial, "its worker died", died=True)
                worker = trial.user_attrs.get("worker") or "?"
                found.append(Healed(phase.name, trial.number, worker, retried is not None))
            if home.on_server:
                _finish_healing(optuna_study)
        for lock in home.workers.glob("*.lock"):
            old = time.time() - lock.stat().st_mtime > 86_400  # a young one may be about to be taken
            if lock.stem != "claim" and lock.stem not in alive and old:
                lock.unlink(missing_ok=True)
    return found


def _is_dead(home: Home, trial: Any, watch: Watch | None) -> bool:
    worker = trial.user_attrs.get("worker")
    if not home.on_server:
        # A trial is named its worker's within the claim lock: one without a name died while holding it.
        return worker is None or not is_alive(home, worker)
    if (
        worker is not None
        and queue.host_of(worker) == os.uname().nodename
        and (home.workers / f"{worker}.lock").exists()
    ):
        return not is_alive(home, worker)
    return watch is not None and watch.is_lost(trial)


def _finish_healing(optuna_study: optuna.Study) -> None:
    """Make the repetitions that a healer was stopped before making."""
    for trial in queue.without_repetition(optuna_study.get_trials(deepcopy=False), MAX_ATTEMPTS):
        _repeat(optuna_study, trial, died=True)


def remove_stale_lock(home: Home) -> None:
    """Remove the journal's lock if a worker was killed while it held it: it would hold everybody up for long."""
    lock = home.journal.with_name(home.journal.name + ".lock")
    if home.url is None and lock.is_symlink():
        with claim(home):
            if not living_workers(home):
                lock.unlink(missing_ok=True)


def refuse_changes(home: Home, phase: Phase, storage: Any, optuna_study: optuna.Study) -> None:
    """A study that goes on must be the study that began: only what changes no result may change."""
    definition = phase.study.model_dump(mode="json", exclude=FREE)
    before = optuna_study.user_attrs.get("definition")
    if before is None:
        optuna_study.set_user_attr("definition", definition)
        return
    changed = sorted(k for k in definition if k in before and definition[k] != before[k])
    if changed:
        raise StorageError(
            f"{home.folder}: a study named {phase.study.name!r} began with another {' and '.join(changed)}\n"
            "  cure: give the study another name, or another --dir (its budget and comparisons alone may change)"
        )

"""The queue of a study whose storage is on a server: no lock binds machines, so that trials are taken by one atomic step.

Only the engine makes trials, each for one *slot* of the budget (or one arm and repeat of a comparison); workers take
waiting ones, which the storage gives to one worker only. A slot that is there twice, because an answer of the server
was lost or two engines ran, is run once.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dspace.study import remote
from dspace.study.enqueue import FirstPoint
from dspace.study.ledger import Phase, budget_of, free, is_stale, retries, waiting

if TYPE_CHECKING:
    import optuna

SPREAD = 8
"""Of how many trials at the head of the queue a worker takes one first."""


def key_of(trial: Any) -> Any:
    """What a trial is one attempt at: a slot of the budget, or an arm and repeat of a comparison."""
    attributes = trial.user_attrs
    return attributes.get("slot", (attributes.get("arm"), attributes.get("repeat")))


def is_attempt(trial: Any) -> bool:
    """Whether the trial is or was an attempt, as opposed to a superfluous copy."""
    return not trial.user_attrs.get("superfluous", False)


def missing_slots(phase: Phase, trials: list[Any]) -> list[int]:
    """Slots of the budget for which there is no trial yet."""
    if phase.comparison is not None:
        return []  # all of them are enqueued at once
    if is_stale(phase.study, trials):
        return []
    there = {t.user_attrs.get("slot") for t in trials}
    slots = budget_of(phase.study) + free(phase.study, trials)
    return [slot for slot in range(slots) if slot not in there]


def pending(phase: Phase, trials: list[Any]) -> int:
    """Slots that are not finished: not made, waiting, or running."""
    return len(missing_slots(phase, trials)) + len(
        {key_of(t) for t in trials if t.state.name in ("WAITING", "RUNNING")}
    )


def top_up(phase: Phase, optuna_study: optuna.Study, ahead: int, first: Sequence[FirstPoint] = ()) -> None:
    """See that ``ahead`` trials wait, those of ``first`` before others.

    A server that does not answer is asked again at the next call.
    """
    trials = optuna_study.get_trials(deepcopy=False)
    there = len(waiting(trials))
    if there > ahead // 2:
        return
    for slot in missing_slots(phase, trials)[: ahead - there]:
        attributes: dict[str, Any] = {"slot": slot}
        if slot < len(first):
            attributes |= first[slot][1]
        try:
            optuna_study.enqueue_trial(first[slot][0] if slot < len(first) else {}, user_attrs=attributes)
        except Exception as error:
            if not remote.is_away(error):
                raise
            return


def take(
    phase: Phase, optuna_study: optuna.Study, worker: str, alike: Callable[[Any], bool] = lambda trial: True
) -> optuna.Trial | None:
    """Take a waiting trial for which ``alike`` holds and mark it as this worker's, or None when none waits."""
    import optuna

    storage = optuna_study._storage
    trials = optuna_study.get_trials(deepcopy=False)
    queued = list(filter(alike, waiting(trials)))
    first = zlib.crc32(worker.encode()) % max(min(len(queued), SPREAD), 1)  # not all workers grasp at the same one
    for frozen in queued[first:] + queued[:first]:
        try:
            if not storage.set_trial_state_values(frozen._trial_id, state=optuna.trial.TrialState.RUNNING):
                continue
        except optuna.exceptions.UpdateFinishedTrialError:
            continue
        if _superfluous(frozen, trials):
            storage.set_trial_user_attr(frozen._trial_id, "superfluous", True)
            storage.set_trial_user_attr(frozen._trial_id, "failure", "its slot has another trial")
            storage.set_trial_state_values(frozen._trial_id, state=optuna.trial.TrialState.FAIL)
            continue
        optuna_study._thread_local.cached_all_trials = None
        trial = optuna.Trial(optuna_study, frozen._trial_id)
        trial.set_user_attr("worker", worker)  # its name holds its host; the first sign of life follows
        return trial
    return None


def _superfluous(mine: Any, trials: list[Any]) -> bool:
    return any(
        t.number < mine.number and key_of(t) == key_of(mine) and t.state.name != "FAIL" for t in trials if is_attempt(t)
    )


def host_of(worker: str) -> str:
    """The machine of a worker ``HOST-PID-NUMBER``."""
    return worker.rsplit("-", 2)[0]


def is_settled(phase: Phase, optuna_study: optuna.Study) -> bool:
    """Whether no trial is left to take, nor will be unless one is lost."""
    trials = optuna_study.get_trials(deepcopy=False)
    return not missing_slots(phase, trials) and not waiting(trials)


def fail_lost(optuna_study: optuna.Study, trial: Any, reason: str) -> bool:
    """Mark a lost running trial as failed; False when it has ended meanwhile, or another healer was first."""
    import optuna

    storage = optuna_study._storage
    try:
        for key in ("lost", "failure"):
            storage.set_trial_user_attr(trial._trial_id, key, reason)
        storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
    except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
        return False
    return True


def without_repetition(trials: list[Any], most: int) -> list[Any]:
    """Lost trials that were to be repeated and are not: whoever failed them stopped before."""
    repeated = retries(trials)
    return [
        t
        for t in trials
        if t.state.name == "FAIL"
        and "lost" in t.user_attrs
        and t.number not in repeated
        and int(t.user_attrs.get("attempt", 1)) < most
    ]


def remember(optuna_study: optuna.Study, file: str) -> None:
    """Keep the study file in the storage, for workers on machines that do not see its folder."""
    with contextlib.suppress(AttributeError):
        optuna_study.set_user_attr("file", file)

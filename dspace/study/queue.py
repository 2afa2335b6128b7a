"""The queue of a study whose storage is on a server: no lock binds machines, so that trials are taken by one atomic step.

Only the engine makes trials, each for one *slot* of the budget (or one arm and repeat of a comparison); workers take
waiting ones, which the storage gives to one worker only. A slot that is there twice, because an answer of the server
was lost or two engines ran, is run once.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dspace.study.away import is_away
from dspace.study.phase import Phase, budget_of, free, is_stale, retries, waiting

if TYPE_CHECKING:
    import optuna

    from dspace.study.change import Waiting

SPREAD = 8
"""Of how many trials at the head of the queue a worker takes one first, where the server does not choose."""
MAX_UNHEARD = 5
"""Answers that may be lost one after another, while others come through, before a worker gives up."""


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


def top_up(
    phase: Phase,
    optuna_study: optuna.Study,
    ahead: int,
    first: Sequence[Waiting] = (),
    trials: list[Any] | None = None,
) -> None:
    """See that ``ahead`` trials wait, those of ``first`` before others; ``trials`` are the study's, where just read.

    A server that does not answer is asked again at the next call.
    """
    trials = optuna_study.get_trials(deepcopy=False) if trials is None else trials
    there = len(waiting(trials))
    if there > ahead // 2:
        return
    points = dict(enumerate(first))
    missing = missing_slots(phase, trials)[: ahead - there]
    made = [
        ({}, {"slot": slot}) if slot not in points else (points[slot][0], {"slot": slot} | points[slot][1])
        for slot in missing
    ]
    storage: Any = optuna_study._storage
    try:
        try:
            storage.enqueue(optuna_study._study_id, made)
        except NotImplementedError:
            for fixed, attributes in made:
                optuna_study.enqueue_trial(fixed, user_attrs=attributes)
    except Exception as error:
        if not is_away(error):
            raise


def take(
    phase: Phase, optuna_study: optuna.Study, worker: str, alike: Callable[[Any], bool] | None = None
) -> optuna.Trial | None:
    """Take a waiting trial (one for which ``alike`` holds) and mark it as this worker's, or None when none waits."""
    import optuna

    storage: Any = optuna_study._storage
    while True:
        frozen = _next(optuna_study, worker) if alike is None else None
        if frozen is _NO_SUCH_STEP or alike is not None:
            frozen = _next_of_list(optuna_study, worker, alike or (lambda trial: True))
        if frozen is None:
            return None
        if not _is_first(frozen) and _superfluous(frozen, _seen_up_to(optuna_study, frozen.number)):
            storage.set_trial_user_attr(frozen._trial_id, "superfluous", True)
            storage.set_trial_user_attr(frozen._trial_id, "failure", "its slot has another trial")
            storage.set_trial_state_values(frozen._trial_id, state=optuna.trial.TrialState.FAIL)
            continue
        optuna_study._thread_local.cached_all_trials = None
        storage.hold(frozen)
        return optuna.Trial(optuna_study, frozen._trial_id)


_NO_SUCH_STEP = object()


def _next(optuna_study: optuna.Study, worker: str) -> Any:
    """The next waiting trial, taken by one step of the server (``_NO_SUCH_STEP`` where it has none); None if none waits."""
    storage: Any = optuna_study._storage
    for left in reversed(range(MAX_UNHEARD)):
        try:
            return storage.claim(optuna_study._study_id, {"worker": worker})
        except NotImplementedError:
            return _NO_SUCH_STEP
        except Exception as error:
            if not is_away(error) or not left:
                raise
        # The answer was lost. Once the server answers again, it knows whether it had given a trial.
        for t in optuna_study.get_trials(deepcopy=False):
            if t.state.name == "RUNNING" and t.user_attrs.get("worker") == worker:
                return t
    return None


def _next_of_list(optuna_study: optuna.Study, worker: str, alike: Callable[[Any], bool]) -> Any:
    """A waiting trial of those that the storage lists, taken by name; None if none is left."""
    import optuna

    from dspace.study.change import Change

    storage: Any = optuna_study._storage
    running = optuna.trial.TrialState.RUNNING
    queued = list(filter(alike, waiting(optuna_study.get_trials(deepcopy=False))))
    first = zlib.crc32(worker.encode()) % max(min(len(queued), SPREAD), 1)  # not all workers grasp at the same one
    for frozen in queued[first:] + queued[:first]:
        try:
            if storage.change(frozen._trial_id, Change(user={"worker": worker}, state=running)):
                taken = copy.deepcopy(frozen)
                taken.state = running
                taken.user_attrs["worker"] = worker
                return taken
        except optuna.exceptions.UpdateFinishedTrialError:
            continue
    return None


def _is_first(trial: Any) -> bool:
    """Whether a trial is the first of its slot by its number alone: most are, and the others need not be read.

    Slots are made in order (:func:`top_up`), so that a trial of slot ``n`` has at least ``n`` before it, one of each
    lower slot; where there are no more than ``n``, none is of its own.
    """
    return bool(trial.user_attrs.get("slot") == trial.number)


def _seen_up_to(optuna_study: optuna.Study, number: int) -> list[Any]:
    """The study's trials, not read again where those up to ``number`` were read before.

    That is enough to know of an earlier trial of the same slot: of those, only one that was lost can come to count no
    more, and then its repetition counts.
    """
    storage: Any = optuna_study._storage
    seen = storage.seen.get(optuna_study._study_id, [])
    return seen if seen and seen[-1].number >= number else optuna_study.get_trials(deepcopy=False)


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

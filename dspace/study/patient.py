"""A storage on a server, as a worker and the engine use it: calls wait for a server that is away, tellings are gathered.

Imported late: it needs Optuna.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from dspace.errors import StorageError
from dspace.study.away import hidden, is_away
from dspace.study.change import Change, Waiting


class Patience:
    """Repeats a call until the server answers, for at most ``seconds``."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self.inner, self.seconds = inner, seconds

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """``inner.name(*args)``; a change that an unheard answer had confirmed is not an error."""
        end, pause, unsure, read_again = time.monotonic() + self.seconds, 0.2, False, False
        while True:
            try:
                done = getattr(self.inner, name)(*args, **kwargs)
                return self._done(name, *args, **kwargs) if done is False and unsure else done
            except Exception as error:
                if unsure and type(error).__name__ == "UpdateFinishedTrialError" and self._done(name, *args, **kwargs):
                    return True
                if isinstance(error, KeyError) and name == "set_trial_param" and not read_again:
                    # A proxy that was started again knows no trial until somebody has read the study's.
                    read_again = True
                    for study in self("get_all_studies"):
                        self("get_all_trials", study._study_id, deepcopy=False)
                    continue
                if not is_away(error):
                    raise
                if time.monotonic() + pause > end:
                    raise StorageError(
                        f"the storage did not answer for {self.seconds:.0f} s: {hidden(str(error))[:300]}\n"
                        "  cure: start the server again and give the same command: it goes on where it stopped"
                    ) from None
                if not unsure:
                    print(f"the storage does not answer ({name}); waiting", file=sys.stderr, flush=True)
                unsure = True
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
            if hasattr(self.inner, "_setup"):  # a new channel: the old one waits ever longer before it tries again
                self.inner._setup()

    def _done(self, name: str, *args: Any, **kwargs: Any) -> bool:
        """Whether a trial is as this call, whose answer was lost, had asked."""
        if name == "change":
            trial_id, change = args
        elif name == "set_trial_state_values":
            bound = dict(zip(("trial_id", "state", "values"), args, strict=False)) | kwargs
            trial_id, change = bound["trial_id"], Change(state=bound["state"], values=bound.get("values"))
        else:
            return False
        trial = self.inner.get_trial(trial_id)
        if trial.state != change.state:
            return False
        if change.state == TrialState.RUNNING:  # whoever took it left a name
            return bool(change.user) and all(trial.user_attrs.get(k) == v for k, v in change.user.items())
        return change.values is None or list(trial.values or []) == list(change.values)


def _delegate(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self._patience(name, *args, **kwargs)


class Patient(BaseStorage):
    """Every call goes through :class:`Patience`.

    With ``gathers``, what is told of a trial that was taken here is held back until :meth:`flush` or its end, and then
    told in one step: the trial belongs to this process, nobody else waits for a part of it. Signs of life and reports
    that somebody looks at are told at once.
    """

    def __init__(self, inner: Any, patience: float) -> None:
        self._patience = Patience(inner, patience)
        self.gathers = False
        self.seen: dict[int, list[FrozenTrial]] = {}
        """Study -> its trials by number, as they were when last read."""
        self._held: dict[int, FrozenTrial] = {}
        self._told: dict[int, Change] = {}
        self._in_steps = not hasattr(inner, "change")

    # -- trials that belong to this process --------------------------------------------------------------

    def hold(self, trial: FrozenTrial) -> None:
        """From now on the trial is known here, and what is told of it is gathered (where ``gathers`` is set)."""
        if self.gathers:
            self._held[trial._trial_id] = trial
            self._told[trial._trial_id] = Change()

    def flush(self, trial_id: int) -> None:
        """Tell now what was gathered of a trial."""
        change = self._told.get(trial_id)
        if change:
            self._told[trial_id] = Change()  # what is refused once is not told again
            self.change(trial_id, change)

    def enqueue(self, study_id: int, waiting: Sequence[Waiting]) -> None:
        """As ``Database.enqueue``, once. Raises NotImplementedError where the server has no such step."""
        self._once("enqueue", study_id, waiting)

    def claim(self, study_id: int, user: dict[str, Any]) -> FrozenTrial | None:
        """As ``Database.claim``, once: whether an unheard answer had given a trial, only the caller can find out.

        Raises NotImplementedError where the server has no such step.
        """
        taken: FrozenTrial | None = self._once("claim", study_id, user)
        return taken

    def _once(self, name: str, *args: Any) -> Any:
        if self._in_steps:
            raise NotImplementedError
        try:
            return getattr(self._patience.inner, name)(*args)
        except NotImplementedError:
            self._in_steps = True
            raise

    def change(self, trial_id: int, change: Change) -> bool:
        """As ``Database.change``; in several steps where the server does not know it, the decisive one last."""
        if not self._in_steps:
            try:
                return bool(self._patience("change", trial_id, change))
            except NotImplementedError:
                self._in_steps = True
        state, call = change.state, self._patience
        if state == TrialState.RUNNING and not call("set_trial_state_values", trial_id, state):
            return False
        for name, (value, distribution) in change.params.items():
            call("set_trial_param", trial_id, name, value, distribution)
        for key, value in change.user.items():
            call("set_trial_user_attr", trial_id, key, value)
        for key, value in change.system.items():
            call("set_trial_system_attr", trial_id, key, value)
        if state is None or state == TrialState.RUNNING:
            return True
        return bool(call("set_trial_state_values", trial_id, state, change.values))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._held.get(trial_id) or self._patience("get_trial", trial_id)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        if trial_id not in self._held:
            self._patience("set_trial_param", trial_id, param_name, param_value_internal, distribution)
            return
        self._told[trial_id].params[param_name] = (param_value_internal, distribution)
        self._held[trial_id].params[param_name] = distribution.to_external_repr(param_value_internal)
        self._held[trial_id].distributions[param_name] = distribution

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if trial_id not in self._held:
            self._patience("set_trial_user_attr", trial_id, key, value)
            return
        json.dumps(value)  # what cannot be stored is refused where it is told
        self._told[trial_id].user[key] = self._held[trial_id].user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if trial_id not in self._held:
            self._patience("set_trial_system_attr", trial_id, key, value)
            return
        json.dumps(value)
        self._told[trial_id].system[key] = self._held[trial_id].system_attrs[key] = value

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        change = self._told.get(trial_id)
        if change is None:
            return bool(self._patience("set_trial_state_values", trial_id, state, values))
        self._told[trial_id] = Change()
        change.state, change.values = state, values
        try:
            done = self.change(trial_id, change)
        except UpdateFinishedTrialError:
            self._let_go(trial_id)
            raise
        self._let_go(trial_id)
        return done

    def _let_go(self, trial_id: int) -> None:
        self._held.pop(trial_id, None)
        self._told.pop(trial_id, None)

    # -- everything else ---------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        # Asked for once: whether an unheard answer had made one, only the caller can find out.
        return int(self._patience.inner.create_new_trial(study_id, template_trial))

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._patience("get_all_trials", study_id, deepcopy=deepcopy, states=states)
        if states is None:
            self.seen[study_id] = trials
        return trials

    create_new_study = _delegate("create_new_study")
    delete_study = _delegate("delete_study")
    set_study_user_attr = _delegate("set_study_user_attr")
    set_study_system_attr = _delegate("set_study_system_attr")
    get_study_id_from_name = _delegate("get_study_id_from_name")
    get_study_name_from_id = _delegate("get_study_name_from_id")
    get_study_directions = _delegate("get_study_directions")
    get_study_user_attrs = _delegate("get_study_user_attrs")
    get_study_system_attrs = _delegate("get_study_system_attrs")
    get_all_studies = _delegate("get_all_studies")
    set_trial_intermediate_value = _delegate("set_trial_intermediate_value")
    remove_session = _delegate("remove_session")

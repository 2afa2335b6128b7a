"""Optuna's database storage with the steps that its interface lacks: enqueue many trials, take the next one, tell
everything of one.

Each is one transaction where Optuna makes one per trial, attribute, parameter and state: of the time of a short trial
most was theirs. What is stored is what Optuna stores. Imported late: it needs Optuna and SQLAlchemy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from dspace.study.change import Change, Waiting


class Database(_CachedStorage):
    """A database with a cache of finished trials, shared by the threads of a proxy."""

    _backend: RDBStorage

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._distributions: dict[tuple[int, str], BaseDistribution] = {}

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        frozen = self._backend._create_new_trial(study_id, template_trial)
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            # Another thread may have read it meanwhile, and even its end: put over that (as Optuna does), it would
            # wait in this cache for ever, and the engine for it.
            if frozen.number not in study.trials:
                self._add_trials_to_cache(study_id, [frozen])
                study.unfinished_trial_ids.add(frozen._trial_id)
        return frozen._trial_id

    def enqueue(self, study_id: int, waiting: Sequence[Waiting]) -> None:
        """Make waiting trials, all or none, numbered in this order."""
        with _create_scoped_session(self._backend.scoped_session) as session:
            study = models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)  # numbers have no gaps
            trials = [models.TrialModel(study_id=study.study_id, state=TrialState.WAITING) for _ in waiting]
            session.add_all(trials)
            session.flush()
            trials.sort(key=lambda t: t.trial_id)
            for number, trial in enumerate(trials, start=trials[0].count_past_trials(session) if trials else 0):
                trial.number = number
            ids = [int(trial.trial_id) for trial in trials]
            attributes = {i: user for i, (_, user) in zip(ids, waiting, strict=True)}
            self._set_attributes(session, models.TrialUserAttributeModel, attributes)
            fixed = {i: {"fixed_params": params} for i, (params, _) in zip(ids, waiting, strict=True)}
            self._set_attributes(session, models.TrialSystemAttributeModel, fixed)

    def change(self, trial_id: int, change: Change) -> bool:
        """Store all of ``change`` or nothing. False where a trial that was to be taken does not wait.

        Raises KeyError for an unknown trial and UpdateFinishedTrialError for one that has ended.
        """
        try:
            with _create_scoped_session(self._backend.scoped_session) as session:
                trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                return self._change(session, trial, change)
        except IntegrityError:  # a parameter is there already: the answer to the same call was lost
            there = self._backend.get_trial(trial_id).params
            left = {name: told for name, told in change.params.items() if name not in there}
            if len(left) == len(change.params):
                raise
            return self.change(trial_id, replace(change, params=left))

    def claim(self, study_id: int, user: dict[str, Any]) -> FrozenTrial | None:
        """Take the waiting trial with the lowest number that nobody is taking, with ``user`` set; None if none waits."""
        with _create_scoped_session(self._backend.scoped_session) as session:
            trial = (
                session.query(models.TrialModel)
                .filter(models.TrialModel.study_id == study_id, models.TrialModel.state == TrialState.WAITING)
                .order_by(models.TrialModel.trial_id)
                .with_for_update(skip_locked=True)
                .limit(1)
                .one_or_none()
            )
            # A row that changed while the query waited is read as it is now, as PostgreSQL does; others might not.
            if trial is None or not self._change(session, trial, Change(user=user, state=TrialState.RUNNING)):
                return None
            taken = create_trial(
                state=TrialState.RUNNING,
                user_attrs={a.key: json.loads(a.value_json) for a in trial.user_attributes},
                system_attrs={a.key: json.loads(a.value_json) for a in trial.system_attributes},
            )
            taken.number, taken._trial_id = int(trial.number), int(trial.trial_id)
            return taken

    def _change(self, session: Any, trial: Any, change: Change) -> bool:
        backend = self._backend
        backend.check_trial_is_updatable(trial.trial_id, trial.state)
        if change.state == TrialState.RUNNING and trial.state != TrialState.WAITING:
            return False
        for name, (value, distribution) in change.params.items():
            self._check_distribution(session, trial.study_id, name, distribution)
            text = distribution_to_json(distribution)
            session.add(
                models.TrialParamModel(
                    trial_id=trial.trial_id, param_name=name, param_value=value, distribution_json=text
                )
            )
        self._set_attributes(session, models.TrialUserAttributeModel, {trial.trial_id: change.user})
        self._set_attributes(session, models.TrialSystemAttributeModel, {trial.trial_id: change.system})
        for objective, value in enumerate(change.values or ()):  # there are none of a trial that has not ended
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            session.add(
                models.TrialValueModel(trial_id=trial.trial_id, objective=objective, value=stored, value_type=kind)
            )
        if change.state is not None:
            trial.state = change.state
            if change.state == TrialState.RUNNING:
                trial.datetime_start = datetime.now()
            elif change.state.is_finished():
                trial.datetime_complete = datetime.now()
        return True

    def _check_distribution(self, session: Any, study_id: int, name: str, distribution: BaseDistribution) -> None:
        """Raise ValueError where other trials of the study have the parameter with an incompatible distribution."""
        if (study_id, name) not in self._distributions:
            first = (
                session.query(models.TrialParamModel)
                .join(models.TrialModel)
                .filter(models.TrialModel.study_id == study_id, models.TrialParamModel.param_name == name)
                .first()
            )
            if first is None:
                return
            self._distributions[study_id, name] = json_to_distribution(first.distribution_json)
        check_distribution_compatibility(self._distributions[study_id, name], distribution)

    def _set_attributes(self, session: Any, model: Any, told: Mapping[int, Mapping[str, Any]]) -> None:
        """Set attributes, by trial and key."""
        rows = [(i, key, value) for i, attributes in told.items() for key, value in attributes.items()]
        if self._backend.engine.name != "postgresql":
            for i, key, value in rows:
                self._backend._set_trial_attr_without_commit(session, model, i, key, value)
        elif rows:
            statement = insert(model).values(
                [{"trial_id": i, "key": key, "value_json": json.dumps(value)} for i, key, value in rows]
            )
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=[model.trial_id, model.key], set_={"value_json": statement.excluded.value_json}
                )
            )

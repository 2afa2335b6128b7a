"""The steps that a server takes at once, the proxy's cache, and answers that are lost on the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from dspace.study import ledger, queue, telling
from dspace.study.change import Change
from dspace.study.database import Database
from dspace.study.ledger import open_study
from dspace.study.patient import Patient
from dspace.study.phase import Phase, retries
from dspace.study.preparing import Preparation
from dspace.study.reading import load
from dspace.study.remote import open_database
from dspace.study.storage import Home, connect
from dspace.study.trial import Job, Outcome, Pruned
from dspace.study.worker import Worker, find_objective
from tests.study.servers import Postgres, Proxy

UNIT = FloatDistribution(0.0, 1.0)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(f"sqlite:///{tmp_path / 'trials.db'}")


def study_in(storage: Any) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name="s", directions=["maximize", "minimize"])


class Deaf:
    """Does what it is asked and loses the first answer to each kind of call in ``lost``."""

    def __init__(self, inner: Any, *lost: str) -> None:
        self.inner, self.lost = inner, list(lost)

    def _setup(self) -> None:
        """A new channel is as deaf."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.inner, name)(*args, **kwargs)
            if name in self.lost:
                self.lost.remove(name)
                raise ConnectionError(f"the answer to {name} was lost")
            return answer

        return call


def test_enqueued_at_once_as_one_by_one(database: Database) -> None:
    study = study_in(database)
    study.enqueue_trial({"x": 0.25}, user_attrs={"slot": 0})
    database.enqueue(study._study_id, [({"x": 0.5}, {"slot": 1, "warm": True}), ({}, {"slot": 2})])
    database.enqueue(study._study_id, [])
    first, second, third = study.get_trials()
    assert [t.number for t in (first, second, third)] == [0, 1, 2]
    assert {t.state for t in (first, second, third)} == {TrialState.WAITING}
    assert first.system_attrs == {"fixed_params": {"x": 0.25}} and second.system_attrs == {"fixed_params": {"x": 0.5}}
    assert second.user_attrs == {"slot": 1, "warm": True} and third.user_attrs == {"slot": 2}


def test_a_trial_is_claimed_once_and_told_at_once(database: Database) -> None:
    study = study_in(database)
    database.enqueue(study._study_id, [({"x": 0.5}, {"slot": 0})])
    taken = database.claim(study._study_id, {"worker": "a"})
    assert taken is not None and taken.number == 0 and taken.system_attrs == {"fixed_params": {"x": 0.5}}
    assert database.claim(study._study_id, {"worker": "b"}) is None
    again = Change(user={"worker": "b"}, state=TrialState.RUNNING)
    assert not database.change(taken._trial_id, again), "it does not wait any more"
    told = Change({"seed": 3}, {"mark": [1]}, {"x": (0.5, UNIT)}, TrialState.COMPLETE, [1.0, float("inf")])
    assert database.change(taken._trial_id, Change.load(told.dump()))
    trial = study.get_trials()[0]
    assert trial.state == TrialState.COMPLETE and trial.values == [1.0, float("inf")] and trial.params == {"x": 0.5}
    assert trial.user_attrs == {"slot": 0, "worker": "a", "seed": 3} and trial.system_attrs["mark"] == [1]
    assert trial.datetime_start is not None and trial.datetime_complete >= trial.datetime_start
    with pytest.raises(UpdateFinishedTrialError):
        database.change(taken._trial_id, told)
    with pytest.raises(KeyError):
        database.change(12345, told)


def test_a_change_that_is_refused_leaves_nothing(database: Database) -> None:
    study = study_in(database)
    database.enqueue(study._study_id, [({}, {"slot": i}) for i in range(2)])
    first, second = (database.claim(study._study_id, {"worker": "a"}) for _ in range(2))
    assert first is not None and second is not None
    database.change(first._trial_id, Change(params={"x": (0.5, UNIT)}))
    other = optuna.distributions.CategoricalDistribution(["a", "b"])
    with pytest.raises(ValueError, match="different distribution"):
        database.change(second._trial_id, Change({"seed": 1}, {}, {"x": (0, other)}, TrialState.COMPLETE, [1.0, 2.0]))
    trial = database.get_trial(second._trial_id)
    assert trial.state == TrialState.RUNNING and trial.user_attrs == {"slot": 1, "worker": "a"}


def test_the_cache_does_not_forget_the_end_of_a_trial(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread makes a trial; before it writes that into the cache, others run the trial and read its end."""
    study = study_in(database)
    make = database._backend._create_new_trial

    def make_slowly(*args: Any) -> Any:
        made = make(*args)
        study.get_trials()
        database.claim(study._study_id, {"worker": "a"})
        database.change(made._trial_id, Change(state=TrialState.COMPLETE, values=[1.0, 2.0]))
        study.get_trials()
        return made

    monkeypatch.setattr(database._backend, "_create_new_trial", make_slowly)
    study.enqueue_trial({}, user_attrs={"slot": 0})
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE]


def test_an_answer_that_was_lost_is_not_asked_for_twice(database: Database, toy: Path) -> None:
    storage = Patient(Deaf(database, "change", "claim"), patience=30.0)
    storage.gathers = True
    study = study_in(storage)
    queue.top_up(phase := Phase(load(toy)), study, 4)
    trial = queue.take(phase, study, "far-1-1")
    assert trial is not None and trial.number == 0, "the claim whose answer was lost is found again"
    trial.suggest_float("x", 0.0, 1.0)
    trial.set_user_attr("seed", 1)
    storage.flush(trial._trial_id)  # done, unheard, and told again
    storage._patience.inner.lost.append("change")
    assert storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0, 2.0])
    assert not storage._patience.inner.lost
    done, *others = study.get_trials()
    assert done.values == [1.0, 2.0] and done.user_attrs == {"slot": 0, "worker": "far-1-1", "seed": 1}
    assert {t.state for t in others} == {TrialState.WAITING}


def test_what_is_told_is_gathered_until_the_end(database: Database) -> None:
    storage = Patient(database, patience=0.0)
    storage.gathers = True
    study = study_in(storage)
    storage.enqueue(study._study_id, [({}, {"slot": 0})])
    frozen = storage.claim(study._study_id, {"worker": "a"})
    assert frozen is not None
    storage.hold(frozen)
    trial = optuna.Trial(study, frozen._trial_id)
    trial.set_user_attr("seed", 1)
    trial.set_constraint("small", -1.0)
    assert storage.get_trial_system_attrs(trial._trial_id)["constraints:small"] == -1.0
    assert "seed" not in database.get_trial(trial._trial_id).user_attrs
    storage.flush(trial._trial_id)
    assert database.get_trial(trial._trial_id).user_attrs["seed"] == 1
    with pytest.raises(TypeError):
        trial.set_user_attr("what", object())
    trial.set_user_attr("failure", "no JSON")
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    told = database.get_trial(trial._trial_id)
    assert told.user_attrs == {"slot": 0, "worker": "a", "seed": 1, "failure": "no JSON"}
    assert told.system_attrs["constraints:small"] == -1.0
    with pytest.raises(UpdateFinishedTrialError):
        trial.set_user_attr("late", 1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.mark.parametrize("way", ["database", "proxy", "another's proxy"])
def test_a_trial_takes_three_calls(
    way: str, postgres: Postgres, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed, begun, ended: what a trial costs beside its training. A proxy of Optuna itself takes more, and works."""
    text = toy.read_text().split("[compare.shapes]")[0].replace('[prune]\non = "accuracy"\n', "")
    name = f"toy{random.SystemRandom().randrange(10**9)}"
    toy.write_text(text.replace('name = "toy"', f'name = "{name}"') + '[sampler]\nkind = "random"\n')
    proxy = None if way == "database" else Proxy(postgres.url)
    try:
        home = Home(tmp_path / "runs", postgres.url if proxy is None else proxy.url)
        phase = Phase(load(toy))
        if way == "another's proxy":
            from dspace.study.proxy import Client

            def no_such_service(*args: Any, **kwargs: Any) -> None:
                raise NotImplementedError

            monkeypatch.setattr(Client, "_ask", no_such_service)
        study = open_study(phase, connect(home))
        queue.top_up(phase, study, 16)
        worker = Worker(home, phase, "far-1-1", find_objective("toys:bare"), str(tmp_path), 8)
        calls: Counter[str] = Counter()
        ask = worker.storage._patience.__class__.__call__
        once = Patient._once

        def count(self: Any, called: str, *args: Any, **kwargs: Any) -> Any:
            calls[called] += 1
            return ask(self, called, *args, **kwargs)

        def count_once(self: Any, called: str, *args: Any) -> Any:
            calls[called] += 1
            return once(self, called, *args)

        monkeypatch.setattr(type(worker.storage._patience), "__call__", count)
        monkeypatch.setattr(Patient, "_once", count_once)
        monkeypatch.setattr(telling, "TELL_SECONDS", float("inf"))  # else a slow machine tells of curves in between
        assert worker.run(float("inf")) == 0
        trials = study.get_trials()
    finally:
        if proxy is not None:
            proxy.close()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 8
    assert [t.user_attrs["slot"] for t in trials] == list(range(8)) and not retries(trials)
    for t in trials:
        assert {"x", "shape"} == t.params.keys() and {"seed", "curve", "metrics", "worker"} <= t.user_attrs.keys()
        assert t.values == [t.user_attrs["metrics"][n] for n in load(toy).objectives]
    if way != "another's proxy":
        assert calls["claim"] == 9 and calls["change"] == 16 and sum(calls.values()) <= 9 + 16 + 2


@pytest.mark.parametrize("ending", ["complete", "prune", "fail"])
def test_a_worker_outlives_the_loss_of_its_trial(
    ending: str, postgres: Postgres, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Taken for lost while it ran, the trial is another worker's: how it ends here is nobody's business."""
    name = f"toy{random.SystemRandom().randrange(10**9)}"
    toy.write_text(toy.read_text().replace('name = "toy"', f'name = "{name}"').replace("trials = 8", "trials = 2"))
    home, phase = Home(tmp_path / "runs", postgres.url), Phase(load(toy))
    study = open_study(phase, connect(home))
    queue.top_up(phase, study, 2)

    def objective(job: Job) -> Outcome:
        if job.number == 0:
            (mine,) = (t for t in study.get_trials(deepcopy=False) if t.number == 0)
            assert ledger.give_back(home, study, mine, "lost", died=True) == 1
            if ending == "prune":
                raise Pruned("not worth it")
            if ending == "fail":
                raise RuntimeError("broken")
        return Outcome({"stability": 1.0, "plasticity": 0.0, "accuracy": 1.0, "state_bytes": 1.0})

    worker = Worker(home, phase, "far-1-1", objective, str(tmp_path), 1)
    assert worker.run(float("inf")) == 0
    states = [(t.state.name, t.user_attrs.get("retry_of")) for t in study.get_trials()]
    assert states == [("FAIL", None), ("COMPLETE", None), ("COMPLETE", 0)]
    assert "trial 0 was given to another worker" in capfd.readouterr().err


def test_a_point_is_told_before_it_is_asked_for(
    postgres: Postgres, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two workers that come to the same point at once, one must see the other."""
    name = f"toy{random.SystemRandom().randrange(10**9)}"
    toy.write_text(toy.read_text().replace('name = "toy"', f'name = "{name}"').replace("trials = 8", "trials = 1"))
    home, phase = Home(tmp_path / "runs", postgres.url), Phase(load(toy))
    elsewhere = open_study(phase, connect(home))
    queue.top_up(phase, elsewhere, 1)
    seen = []

    def ask(self: Preparation, number: int, point_hash: str) -> None:
        seen.append((point_hash, elsewhere.get_trials()[number].user_attrs.get("point_hash")))

    monkeypatch.setattr(Preparation, "_same_point", ask)
    assert Worker(home, phase, "far-1-1", find_objective("toys:counted"), str(tmp_path), 1).run(float("inf")) == 0
    assert len(seen) == 1 and seen[0][0] == seen[0][1]

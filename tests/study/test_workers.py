"""Many workers on a real PostgreSQL, behind a real proxy, placed by a real Ray: whatever dies, every trial is accounted for."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspace.errors import DspaceError, StorageError, UserError
from dspace.study import engine, ledger, queue, remote
from dspace.study import worker as worker_module
from dspace.study.away import hidden
from dspace.study.engine import heal, run
from dspace.study.ledger import open_study
from dspace.study.phase import Phase, retries
from dspace.study.reading import load
from dspace.study.results import collect, open_home
from dspace.study.storage import Home, connect, home_of, prepare
from dspace.study.trial import derive_seed
from tests.study.servers import Postgres, Proxy, wait_until

ROOT = Path(__file__).resolve().parents[2]
WORKERS = """
[workers]
heartbeat = 0.5
grace = 4.0
patience = 60.0
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def many(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy study without its comparison, with short graces, under a name of its own: tests share the server."""
    text = toy.read_text().split("[compare.shapes]")[0].replace('[prune]\non = "accuracy"\n', "")
    name = f"toy{random.SystemRandom().randrange(10**9)}"
    toy.write_text(text.replace('name = "toy"', f'name = "{name}"') + WORKERS)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return toy


def trials_at(study: Path, url: str) -> list:
    phase = Phase(load(study))
    return open_study(phase, connect(Home(Path("x"), url))).get_trials(deepcopy=False)


def account(trials: list, budget: int) -> None:
    """Every slot of the budget has exactly one finished trial, every other trial is a lost attempt that was repeated."""
    assert Counter(t.state.name for t in trials if t.state.name != "FAIL") == {"COMPLETE": budget}
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert sorted(t.user_attrs["slot"] for t in complete) == list(range(budget))
    repeated = retries(trials)
    for t in trials:
        if t.state.name == "FAIL":
            assert t.number in repeated and "lost" in t.user_attrs
    for t in complete:
        assert t.user_attrs["seed"] == derive_seed(7, t.user_attrs.get("root", t.number))


def workers_of(home: Path) -> list[int]:
    """Process ids of the workers that serve this folder."""
    pattern = f"dspace.study.worker --dir {home} "
    return [int(p) for p in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()]


def at_work() -> set[int]:
    """Process ids of the workers that have run a trial of :func:`toys.logged`."""
    log = Path("attempts.log")
    return {int(line.split()[1]) for line in log.read_text().splitlines()} if log.exists() else set()


def kill_three(home: Path, killed: list[int]) -> None:
    """``kill -9`` three of eight workers at random moments, once all are there and several at work."""
    chance = random.Random(5)
    wait_until(lambda: len(workers_of(home)) >= 8, 120, "eight workers did not start")
    wait_until(lambda: len(at_work() & set(workers_of(home))) >= 4, 120, "the workers did not begin")
    for _ in range(3):
        time.sleep(chance.uniform(0.05, 0.3))
        victim = chance.choice(sorted(at_work() & set(workers_of(home))))
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)


def test_three_of_eight_workers_killed_behind_the_proxy(
    postgres: Postgres, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_SECONDS", "0.4")
    proxy, killed = Proxy(postgres.url), []
    try:
        killer = threading.Thread(target=kill_three, args=(Path("runs") / load(many).name, killed))
        killer.start()
        summary = run(many, 8, objective="toys:logged", storage=proxy.url, quiet=True, trials=100)
        killer.join()
        trials = trials_at(many, proxy.url)
    finally:
        proxy.close()
    assert len(killed) == 3 and summary.counts["complete"] == 100
    account(trials, 100)
    lost = sum(t.state.name == "FAIL" for t in trials)
    attempts = Counter(line.split()[0] for line in Path("attempts.log").read_text().splitlines())
    # Nothing is run twice but what had lost its worker (which may have died before the objective began).
    assert len(attempts) == 100 and lost <= 3 and sum(attempts.values()) <= 100 + lost


def test_proxy_and_database_killed_in_the_middle(
    postgres: Postgres, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_SECONDS", "0.3")
    proxy = Proxy(postgres.url)
    before: dict[int, list[float]] = {}

    def disturb() -> None:
        def complete() -> list:
            try:
                return [t for t in trials_at(many, postgres.url) if t.state.name == "COMPLETE"]
            except (DspaceError, KeyError):
                return []

        wait_until(lambda: len(complete()) >= 6, 60)
        proxy.kill()
        time.sleep(1.0)
        proxy.start()
        wait_until(lambda: len(complete()) >= 16, 60)
        before.update({t.number: t.values for t in complete()})
        postgres.kill()
        time.sleep(1.0)
        postgres.start()

    try:
        disturber = threading.Thread(target=disturb)
        disturber.start()
        run(many, 4, objective="toys:logged", storage=proxy.url, quiet=True, trials=60)
        disturber.join()
        trials = trials_at(many, proxy.url)
    finally:
        proxy.close()
    account(trials, 60)
    assert len(before) >= 16
    for number, values in before.items():
        assert trials[number].values == values


def test_an_engine_killed_and_started_again_loses_nothing(postgres: Postgres, many: Path) -> None:
    from tests.study.test_engine import start

    os.environ["OPTUNA_STORAGE"] = postgres.url
    text = many.read_text().replace("seed = 7", f'seed = 7\nstorage = "{postgres.url}"')
    many.write_text(text.replace("trials = 8", "trials = 20"))
    process = start(many, "toys:logged", 3)
    try:
        wait_until(lambda: sum(t.state.name == "COMPLETE" for t in _quietly(many, postgres.url)) >= 3, 60)
    finally:
        process.kill()
        process.wait()
        del os.environ["OPTUNA_STORAGE"]
    summary = run(many, 3, objective="toys:logged", quiet=True)
    account(trials_at(many, postgres.url), 20)
    assert summary.counts["complete"] == 20
    assert len(collect(open_home(load(many).name)).trials) == 20, "the study file says where its storage is"


def _quietly(study: Path, url: str) -> list:
    try:
        return trials_at(study, url)
    except (DspaceError, KeyError):
        return []


def test_ray_places_workers_and_outlives_their_death(
    postgres: Postgres, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed here (pip install 'dspace[ray]'); CI installs it")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("TOY_SECONDS", "0.3")
    many.write_text(many.read_text() + "cpus = 0.25\n")
    killed: list[int] = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        address = ray.get_runtime_context().gcs_address
        home = Path("runs") / load(many).name
        killer = threading.Thread(target=kill_three, args=(home.resolve(), killed))
        killer.start()
        summary = run(many, 8, objective="toys:logged", storage=postgres.url, quiet=True, trials=60, ray=address)
        killer.join()
        with pytest.raises(UserError, match=r"wants 1.0 GPU"):
            many.write_text(many.read_text() + "gpus = 1.0\n")
            run(many, 1, objective="toys:logged", storage=postgres.url, quiet=True, trials=61, ray=address)
    finally:
        ray.shutdown()
    with pytest.raises(UserError, match="no Ray cluster answers"):
        run(many, 1, objective="toys:logged", storage=postgres.url, quiet=True, trials=61, ray="127.0.0.1:9")
    assert len(killed) == 3 and summary.counts["complete"] == 60
    account(trials_at(many, postgres.url), 60)


def test_slurm_jobs_through_submitit(postgres: Postgres, many: Path) -> None:
    pytest.importorskip("submitit")
    many.write_text(many.read_text() + "[workers.slurm]\ntimeout_min = 5\n")
    run(many, 2, objective="toys:quick", storage=postgres.url, quiet=True, trials=6, slurm="local")
    account(trials_at(many, postgres.url), 6)
    many.write_text(many.read_text().replace("timeout_min = 5", "timeout_minn = 5"))
    with pytest.raises(UserError, match="workers.slurm"):
        run(many, 1, objective="toys:quick", storage=postgres.url, quiet=True, trials=7, slurm="local")


def test_a_worker_joins_from_elsewhere_and_brings_nothing(
    postgres: Postgres, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspace.study.worker import main

    phase = Phase(load(many))
    optuna_study = open_study(phase, connect(Home(Path("x"), postgres.url)))
    queue.remember(optuna_study, many.read_text())
    queue.top_up(phase, optuna_study, 16)
    elsewhere = tmp_path / "elsewhere" / phase.name
    arguments = ["--dir", str(elsewhere), "--url", postgres.url, "--id", "far-1-0", "--alone"]
    assert main([*arguments, "--objective", "toys:quick"]) == 0
    account(trials_at(many, postgres.url), 8)
    assert (elsewhere / "study.toml").read_text() == many.read_text()
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN, "what calls a worker can be interrupted afterwards"


def test_a_worker_that_joined_from_a_terminal_heeds_ctrl_c(postgres: Postgres, many: Path, tmp_path: Path) -> None:
    phase = Phase(load(many))
    optuna_study = open_study(phase, connect(Home(Path("x"), postgres.url)))
    queue.remember(optuna_study, many.read_text())
    queue.top_up(phase, optuna_study, 16)
    arguments = ["--dir", str(tmp_path / "elsewhere" / phase.name), "--url", postgres.url, "--id", "far-1-0", "--alone"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "study")])}
    worker = subprocess.Popen(
        [sys.executable, "-m", "dspace.study.worker", *arguments, "--objective", "toys:held"], env=environment
    )
    wait_until(lambda: "RUNNING" in [t.state.name for t in trials_at(many, postgres.url)])
    worker.send_signal(signal.SIGINT)
    assert worker.wait(60) == worker_module.STOPPED
    assert "RUNNING" not in [t.state.name for t in trials_at(many, postgres.url)]


def test_a_lost_trial_of_another_machine_is_healed_after_its_grace(postgres: Postgres, many: Path) -> None:
    study = load(many)
    home = home_of(study.name, None, postgres.url)
    prepare(home)
    home.definition.write_text(many.read_text())
    phase, storage = Phase(study), connect(home)
    optuna_study = open_study(phase, storage)
    queue.top_up(phase, optuna_study, 16)
    trial = queue.take(phase, optuna_study, "far-1-1")
    assert trial is not None
    watch = remote.Watch(grace=0.3)
    assert not ledger.heal(home, [phase], storage, watch), "only just seen"
    time.sleep(0.2)
    trial.set_user_attr(remote.BEAT, time.time())
    assert not ledger.heal(home, [phase], storage, watch), "it gave a sign of life"
    time.sleep(0.4)
    healed = ledger.heal(home, [phase], storage, watch)
    assert [h.number for h in healed] == [trial.number] and healed[0].retried
    again = [t for t in optuna_study.get_trials() if t.user_attrs.get("retry_of") == trial.number]
    assert len(again) == 1 and again[0].user_attrs["slot"] == 0
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    assert RetryHeartbeatStaleTrialCallback.retry_history(again[0]) == [trial.number]
    second = queue.take(phase, optuna_study, "far-1-2")
    assert second is not None
    second.set_user_attr(remote.BEAT, time.time() - 100)
    _, healed = heal(study.name, storage=postgres.url)
    assert [h.number for h in healed] == [second.number], "by hand, at once"


def test_a_proxy_that_was_started_again_takes_a_running_trials_parameters(postgres: Postgres, many: Path) -> None:
    phase = Phase(load(many))
    proxy = Proxy(postgres.url)
    try:
        optuna_study = open_study(phase, connect(Home(Path("x"), proxy.url), patience=30.0))
        queue.top_up(phase, optuna_study, 16)
        trial = queue.take(phase, optuna_study, "far-1-1")
        assert trial is not None
        proxy.kill()
        proxy.start()
        assert trial.suggest_categorical("shape", ["round", "flat"]) == "round"
        assert 0 <= trial.suggest_float("x", 0, 1) <= 1
    finally:
        proxy.close()


def test_a_slot_that_is_there_twice_is_run_once(postgres: Postgres, many: Path) -> None:
    phase = Phase(load(many))
    optuna_study = open_study(phase, connect(Home(Path("x"), postgres.url)))
    for _ in range(2):
        optuna_study.enqueue_trial({}, user_attrs={"slot": 0})
    first, second = (queue.take(phase, optuna_study, "far-1-1") for _ in range(2))
    assert first is not None and second is None
    superfluous = optuna_study.get_trials()[1]
    assert superfluous.state.name == "FAIL" and superfluous.user_attrs["superfluous"]


def test_combinations_that_lose_data_are_refused_with_the_reason(toy: Path) -> None:
    with pytest.raises(StorageError, match="6084"):
        remote.run_proxy("runs/toy/journal.log", "localhost", 1)
    with pytest.raises(StorageError, match="before SQLite"):
        remote.run_proxy("sqlite:///x.db", "localhost", 1)
    with pytest.raises(StorageError, match="SQLite with 8 workers"):
        run(toy, 8, storage="sqlite:///x.db")
    with pytest.raises(UserError, match="storage on a server"):
        run(toy, 2, ray="auto")
    with pytest.raises(StorageError, match="names no host"):
        remote.check_url("grpc://", 1)
    with pytest.raises(StorageError, match="no proxy answers"):
        connect(Home(Path("x"), "grpc://127.0.0.1:9"), patience=0.0)


def test_passwords_are_not_shown() -> None:
    assert hidden("postgresql://me:secret@db/x") == "postgresql://me:***@db/x"


def test_engine_is_quick(postgres: Postgres, many: Path) -> None:
    """Bookkeeping on the journal, eight workers: nothing lost, nothing twice, and little time beside the trials."""
    begin = os.times()
    summary = engine.run(many, 8, objective="toys:quick", quiet=True, trials=200)
    trials = open_study(Phase(load(many)), connect(open_home(load(many).name))).get_trials(deepcopy=False)
    assert summary.counts == {"complete": 200} and len({t.user_attrs["seed"] for t in trials}) == 200
    spent = [getattr(os.times(), n) - getattr(begin, n) for n in ("user", "system", "children_user", "children_system")]
    assert sum(spent) < 60, "processor time: the clock also counts what else this machine does"


def test_of_several_gpus_each_local_worker_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspace.study.placement import Here

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    here = Here(jobs=3)
    command = ["sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS"; sleep "$1"', "worker"]
    first = here.start([*command, "0"], {}, tmp_path / "0.log")
    wait_until(lambda: first.poll() is not None)
    handles = [here.start([*command, "30"], {}, tmp_path / f"{i}.log") for i in (1, 2)]
    wait_until(lambda: all((tmp_path / f"{i}.log").stat().st_size for i in (1, 2)))
    assert [(tmp_path / f"{i}.log").read_text().split()[0] for i in (0, 1, 2)] == ["4", "4", "7"]
    for handle in handles:
        handle.kill()
    assert [h.poll() for h in handles] == [-9, -9]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert Here(jobs=2).next_gpu() is None, "one GPU is shared"

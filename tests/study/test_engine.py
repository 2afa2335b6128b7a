"""The engine with toy objectives: workers, deaths, stops, damaged and unwritable storage. Nothing may be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspace.errors import DspaceError, StorageError, UserError
from dspace.study.engine import heal, run
from dspace.study.enqueue import enqueue_cover
from dspace.study.ledger import open_study
from dspace.study.phase import Phase
from dspace.study.reading import load
from dspace.study.remote import check_url
from dspace.study.results import collect, open_home
from dspace.study.schema import PruneTable
from dspace.study.storage import connect, find_damage, home_of
from dspace.study.trial import derive_seed, should_prune

ROOT = Path(__file__).resolve().parents[2]


def trials_of(name: str = "toy") -> list:
    home = open_home(name)
    return open_study(Phase(load(home.definition)), connect(home)).get_trials(deepcopy=False)


def states(trials: list) -> list[str]:
    return [t.state.name for t in trials]


def test_two_workers_meet_the_budget_exactly(toy: Path) -> None:
    summary = run(toy, jobs=2, objective="toys:quick", quiet=True)
    trials = trials_of()
    assert states(trials) == ["COMPLETE"] * 8 and summary.counts == {"complete": 12}
    assert [t.user_attrs["seed"] for t in trials] == [derive_seed(7, n) for n in range(8)]
    assert {t.params["shape"] for t in trials} == {"round", "flat"}
    results = collect(open_home("toy"))
    arms = [(r.arm, r.params["repeat"]) for r in results.comparisons["shapes"]]
    assert sorted(arms) == [("flat", 0), ("flat", 1), ("round", 0), ("round", 1)]
    assert results.best is not None and results.best.params["shape"] == "round" and results.front
    note = open_home("toy").artifacts / trials[3].user_attrs["artifacts"]["note"]
    assert note.read_text() == "trial 3"


def test_a_finished_study_is_not_run_again_and_a_larger_budget_goes_on(toy: Path) -> None:
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=3)
    before = [(t.number, t.values) for t in trials_of()]
    run(toy, jobs=1, objective="toys:broken", quiet=True, trials=3)
    assert [(t.number, t.values) for t in trials_of()] == before
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=5)
    after = trials_of()
    assert len(after) == 5 and [(t.number, t.values) for t in after[:3]] == before


def test_one_worker_gives_the_same_study_twice(toy: Path) -> None:
    for folder in ("one", "two"):
        run(toy, jobs=1, objective="toys:quick", quiet=True, folder=folder)
    one, two = (
        open_study(Phase(load(toy)), connect(home_of("toy", folder))).get_trials(deepcopy=False)
        for folder in ("one", "two")
    )
    assert [t.params for t in one] == [t.params for t in two]


def test_a_worker_killed_in_its_trial_is_replaced_and_the_trial_runs_once_more(toy: Path) -> None:
    summary = run(toy, jobs=2, objective="toys:suicidal", quiet=True)
    trials = trials_of()
    dead = [t for t in trials if t.state.name == "FAIL"]
    assert [t.number for t in dead] == [1] and "worker died" in dead[0].user_attrs["failure"]
    again = [t for t in trials if t.user_attrs.get("retry_of") == 1]
    assert len(again) == 1 and again[0].state.name == "COMPLETE"
    assert again[0].params == dead[0].params and again[0].user_attrs["seed"] == dead[0].user_attrs["seed"]
    assert states(trials).count("COMPLETE") == 8 and [h.number for h in summary.healed if h.study == "toy"] == [1]


def start(toy: Path, objective: str, jobs: int = 2) -> subprocess.Popen:
    code = f"import sys; from dspace.study.engine import run; s = run({str(toy)!r}, {jobs}, objective={objective!r}); sys.exit(130 if s.interrupted else 0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.time() + seconds
    while time.time() < end:
        try:
            if condition():
                return
        except (DspaceError, OSError, KeyError):
            pass
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def two_complete_and_two_running() -> bool:
    found = states(trials_of())
    return found.count("COMPLETE") == found.count("RUNNING") == 2


def workers_of(engine: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"runs/toy --id .*{engine.pid}-"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_kill_of_everything_loses_only_what_was_running(toy: Path) -> None:
    engine = start(toy, "toys:held")
    wait_for(two_complete_and_two_running)
    workers = [int(p.stem.split("-")[-2]) for p in Path("runs/toy/workers").glob("*.lock") if p.stem != "claim"]
    assert workers and set(workers) == {engine.pid}
    # Stopped, or it would replace its workers; killed first, it would have them give their trials back.
    engine.send_signal(signal.SIGSTOP)
    pids = workers_of(engine)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    engine.kill()
    engine.wait()
    wait_for(lambda: not workers_of(engine))
    before = {t.number: (t.state.name, t.values) for t in trials_of()}
    running = [n for n, (state, _) in before.items() if state == "RUNNING"]
    assert len(running) == 2
    summary = run(toy, jobs=2, objective="toys:quick", quiet=True)
    trials = trials_of()
    assert sorted(h.number for h in summary.healed) == running
    for number, (state, values) in before.items():  # every completed trial is intact, every other one accounted for
        assert trials[number].state.name == (
            state if state == "COMPLETE" else "FAIL" if state == "RUNNING" else "COMPLETE"
        )
        assert trials[number].values == values or state != "COMPLETE"
    assert sorted(t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs) == running
    assert states(trials).count("COMPLETE") == 8


def test_a_lock_left_by_a_killed_writer_holds_nobody_up(toy: Path) -> None:
    begin = time.time()
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=2)
    usual = time.time() - begin
    journal = open_home("toy").journal
    os.symlink(journal.resolve(), str(journal) + ".lock")
    begin = time.time()
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=3)
    assert time.time() - begin < usual + 25, "Optuna by itself waits for 30 s"
    assert len(trials_of()) == 3


def test_ctrl_c_gives_running_trials_back(toy: Path) -> None:
    engine = start(toy, "toys:held")
    wait_for(two_complete_and_two_running)
    engine.send_signal(signal.SIGINT)
    assert engine.wait(120) == 130
    assert engine.stderr is not None and "Traceback" not in engine.stderr.read()
    trials = trials_of()
    assert "RUNNING" not in states(trials) and find_damage(Path("runs/toy/journal.log")) is None
    assert all("stopped by the user" in t.user_attrs["failure"] for t in trials if t.state.name == "FAIL")
    complete = {t.number: t.values for t in trials if t.state.name == "COMPLETE"}
    run(toy, jobs=2, objective="toys:quick", quiet=True)
    trials = trials_of()
    assert all(trials[n].values == v for n, v in complete.items()) and states(trials).count("COMPLETE") == 8


def test_trials_that_fail_are_kept_and_stop_the_study_when_all_do(toy: Path) -> None:
    with pytest.raises(DspaceError, match="the toy is broken"):
        run(toy, jobs=1, objective="toys:broken", quiet=True)
    assert set(states(trials_of())) <= {"FAIL", "WAITING"}
    with pytest.raises(UserError, match="no objective"):
        run(toy, jobs=1, objective="toys:absent", quiet=True, folder="elsewhere")


def test_a_full_disk_is_told_and_nothing_is_lost(toy: Path) -> None:
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=3)
    with pytest.raises(StorageError, match="disk is full"):
        run(toy, jobs=1, objective="toys:full_disk", quiet=True)
    run(toy, jobs=1, objective="toys:quick", quiet=True)
    assert states(trials_of()).count("COMPLETE") == 8


def test_an_append_that_fails_half_way_is_taken_back(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=2)
    home = open_home("toy")
    study = open_study(Phase(load(home.definition)), connect(home))
    before, write = home.journal.read_bytes(), os.write

    def short(handle: int, data) -> int:
        if len(data) > 20:
            return write(handle, bytes(data[:20]))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "write", short)
        study.set_user_attr("x", "y" * 15)
    assert home.journal.read_bytes() == before and not list(home.folder.glob("*.lock"))


def test_a_damaged_tail_is_explained_and_cut_with_a_copy(toy: Path) -> None:
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=3)
    home = open_home("toy")
    whole = home.journal.read_bytes()
    home.journal.write_bytes(whole + b'{"op_code":8,"tri')
    with pytest.raises(StorageError, match="heal .* --cut") as caught:
        run(toy, jobs=1, objective="toys:quick", quiet=True)
    assert "records before it are whole" in str(caught.value)
    assert home.journal.read_bytes() == whole + b'{"op_code":8,"tri', "nothing is deleted unasked"
    done, _ = heal("toy", cut=True)
    assert done[0].at_tail and done[1].read_bytes().endswith(b"tri") and home.journal.read_bytes() == whole
    assert states(trials_of()).count("COMPLETE") == 3


def test_damage_in_the_middle_names_the_line(toy: Path) -> None:
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=3)
    journal = open_home("toy").journal
    lines = journal.read_bytes().split(b"\n")
    lines[4] = b"\x00" * 40
    journal.write_bytes(b"\n".join(lines))
    with pytest.raises(StorageError, match="line 5"):
        collect(open_home("toy"))


def test_storage_that_cannot_be_written(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cure"):
        run(toy, quiet=True, objective="toys:quick")
    Path("runs").unlink()

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "runs/toy/journal.log")

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(StorageError, match="cannot be written"):
        run(toy, quiet=True, objective="toys:quick")


def test_storages_that_lock_up_are_refused() -> None:
    with pytest.raises(StorageError, match="SQLite with 2 workers"):
        check_url("sqlite:///x.db", 2)
    with pytest.raises(StorageError, match="unknown storage"):
        check_url("redis://x", 1)
    check_url("sqlite:///x.db", 1)
    check_url(None, 8)


def test_sqlite_with_one_worker(toy: Path) -> None:
    summary = run(toy, jobs=1, objective="toys:quick", storage="sqlite:///toy.db", quiet=True, trials=2)
    assert summary.counts["complete"] >= 2 and not Path("runs/toy/journal.log").exists()


def test_another_study_of_the_same_name_is_refused(toy: Path) -> None:
    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=2)
    toy.write_text(toy.read_text().replace("high = 1.0", "high = 2.0"))
    with pytest.raises(StorageError, match="another axes"):
        run(toy, jobs=1, objective="toys:quick", quiet=True)


def test_each_choice_is_covered_first(toy: Path) -> None:
    study = load(toy)
    home = home_of("toy")
    from dspace.study.storage import prepare

    prepare(home)
    optuna_study = open_study(Phase(study), connect(home))
    for _ in range(2):
        enqueue_cover(home, Phase(study), optuna_study)
    fixed = [t.system_attrs["fixed_params"] for t in optuna_study.get_trials()]
    assert fixed == [{"shape": "round"}, {"shape": "flat"}]


def test_the_median_rule() -> None:
    rule = PruneTable(on="accuracy", after=0.3, min_trials=3)
    others = [[{"step": 1, "accuracy": a}, {"step": 5, "accuracy": a}] for a in (0.5, 0.6, 0.7)]
    bad = [{"step": 1, "accuracy": 0.1}, {"step": 5, "accuracy": 0.2}]
    good = [{"step": 1, "accuracy": 0.1}, {"step": 5, "accuracy": 0.65}]
    assert "worse than" in should_prune(rule, bad, 10, others) and not should_prune(rule, good, 10, others)
    assert not should_prune(rule, bad[:1], 10, others), "too early"
    assert not should_prune(rule, bad, 10, others[:2]), "too few others"
    loss = PruneTable(on="loss", after=0.0, min_trials=1)
    assert should_prune(loss, [{"step": 1, "loss": 2.0}], 10, [[{"step": 1, "loss": 1.0}]])


def test_the_journal_is_one_that_optuna_reads_itself(toy: Path) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    run(toy, jobs=1, objective="toys:quick", quiet=True, trials=2)
    storage = optuna.storages.JournalStorage(JournalFileBackend("runs/toy/journal.log"))
    study = optuna.load_study(study_name="toy", storage=storage)
    assert len(study.trials) == 2 and study.best_trials
    assert all("op_code" in json.loads(line) for line in Path("runs/toy/journal.log").read_text().splitlines())

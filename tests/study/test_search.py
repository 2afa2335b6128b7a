"""Search: the structural space, constraints, halving, saturation, warm starts, comparisons of what was found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspace.errors import StudyError, UserError
from dspace.study.engine import run
from dspace.study.page import comparison_arms
from dspace.study.phase import is_stale
from dspace.study.publish import publish
from dspace.study.reading import load, loads
from dspace.study.results import collect, open_home
from dspace.study.schema import ModelTable, PruneTable
from dspace.study.space import Composer, fitted
from dspace.study.trial import should_prune, violations
from tests.study.conftest import TOY

SPACE = """
name = "wide"
[space]
structure = ["constant", "key_value"]
evidence = ["none", "energy"]
forgetting = ["token"]
target = ["prior"]
prior_precision = ["head"]
prior_mean = ["zero"]
correction = ["none"]
readout = ["mean"]
[cost]
gpu = "H100"
[task]
name = "mqar"
input_seq_len = 16
num_kv_pairs = 2
vocab_size = 24
train_examples = 64
valid_examples = 16
test_examples = 16
[model]
hidden_size = 8
num_layers = 1
num_heads = 1
head_dim = 4
state_per_head = 64
[train]
steps = 2
batch_size = 8
reports = 1
[budget]
trials = 4
[sampler]
kind = "random"
[objectives]
accuracy = "maximize"
[axes.prior_start]
low = 0.5
high = 2.0
target = "model.init.I_p"
when = { structure = ["key_value"] }
[compare.best]
arms = { palimpsa = { structure = "key_value", evidence = "energy" } }
top = 2
tries = 1
seeds = 2
fresh_data = true
"""


def test_a_head_gets_as_many_value_channels_as_its_state_holds() -> None:
    model = ModelTable(head_dim=4, state_per_head=64)
    widths = [int(4 * fitted(model, axes).expand_v) for axes in (("kv",), ("kv", "kv"), ("kv", "k"), ("kv", "v"))]
    assert widths == [16, 8, 15, 12]
    with pytest.raises(UserError, match="holds no value channel"):
        fitted(ModelTable(head_dim=32, state_per_head=31), ("kv",))
    assert fitted(ModelTable(expand_v=3.0), ("kv",)).expand_v == 3.0
    composer = Composer(loads(SPACE))
    both = [p for p in composer.walk.points if p.structure in ("constant", "key_value")]
    costs = {}
    for p in both:
        point = composer.compose({**asdict(p), "prior_start": 1.0} if p.structure != "constant" else asdict(p))
        costs[p.structure] = composer.cost(point).state_bytes
    assert costs == {"constant": 256.0, "key_value": 256.0}, "equal state, whatever it is spent on"


@pytest.mark.timeout(300)
def test_the_space_is_searched_and_the_best_are_trained_again_on_fresh_data(tmp_path: Path) -> None:
    path = tmp_path / "wide.toml"
    both = 'accuracy = "maximize"\ngpu_ms = "minimize"\n[best]\nby = "accuracy"'
    path.write_text(SPACE.replace('accuracy = "maximize"', both))
    run(path, 1, folder=tmp_path / "run", quiet=True)
    results = collect(open_home(tmp_path / "run"))
    assert {t.state for t in results.trials} == {"complete"}
    assert all(t.metrics["state_bytes"] == 4 * 64 and t.metrics["gpu_ms"] > 0 for t in results.trials)
    compared = results.comparisons["best"]
    assert {t.arm for t in compared} >= {"palimpsa", "top1"} and all(t.state == "complete" for t in compared)
    searched = {t.attributes["data_hash"] for t in results.trials if t.state == "complete"}
    fresh = {t.attributes["data_hash"] for t in compared}
    assert len(searched) == len(fresh) == 1 and searched != fresh
    arms = comparison_arms(results, "best")
    assert [a.name for a in arms] == results.study.compare["best"].names, "those that the search found too"
    raw, page, _ = publish(tmp_path / "run", tmp_path)
    published = json.loads(raw.read_text())
    assert {t["arm"] for t in published["comparisons"]["best"]} == {a.name for a in arms}
    assert published["front"] == results.front and published["importances"] == results.importances
    text = page.read_text()
    assert all(f"| {a.name} | {a.mean:.4f}" in text for a in arms) and "## The front" in text
    assert ("## What matters" in text) == bool(results.importances)


def test_constraints_are_told_to_the_sampler_and_bar_the_best(toy: Path) -> None:
    text = toy.read_text().replace("[axes.x]", "[constraints]\nstate_bytes = { most = 1500 }\n\n[axes.x]")
    toy.write_text(text.split("[compare.shapes]")[0])
    study = load(toy)
    assert violations(study, {"state_bytes": 1600.0}) == {"state_bytes <= 1500": 100.0}
    run(toy, 1, objective="toys:quick", quiet=True, trials=8)
    results = collect(open_home("toy"))
    outside = [t for t in results.trials if t.metrics["state_bytes"] > 1500]
    assert outside and all(t.attributes["infeasible"] for t in outside)
    assert results.best is not None and results.best.metrics["state_bytes"] <= 1500
    with pytest.raises(StudyError, match="needs a bound"):
        loads(TOY + "\n[constraints]\naccuracy = {}\n")


def test_halving_prunes_at_its_rungs_only() -> None:
    rule = PruneTable(kind="halving", factor=2, on="accuracy", after=0.0, before=1.0, min_trials=4)
    others = [[{"step": s, "accuracy": a} for s in range(1, 9)] for a in (0.1, 0.2, 0.3, 0.4)]
    curve = [{"step": s, "accuracy": 0.25} for s in range(1, 9)]
    pruned = [s for s in range(1, 9) if should_prune(rule, curve[:s], 8, others)]
    assert pruned == [1, 2, 4], "at 8/8, 8/4 and 8/2 steps; 0.25 is not in the better half"


def test_a_search_ends_when_nothing_new_comes(toy: Path) -> None:
    text = toy.read_text().replace("trials = 8", "trials = 60\nstale_trials = 5").split("[compare.shapes]")[0]
    toy.write_text(text + '\n[objectives]\naccuracy = "maximize"\n\n[sampler]\nkind = "random"\n')
    run(toy, 1, objective="toys:quick", quiet=True)
    trials = collect(open_home("toy")).trials
    best = max(range(len(trials)), key=lambda i: trials[i].metrics["accuracy"])
    assert len(trials) < 60 and len(trials) - 1 - best == 5


def test_a_warm_start_takes_the_best_points_of_earlier_studies(toy: Path) -> None:
    run(toy, 1, objective="toys:quick", quiet=True, trials=6)
    earlier = sorted(collect(open_home("toy")).trials, key=lambda t: -t.metrics["accuracy"])
    later = toy.with_name("later.toml")
    later.write_text(
        toy.read_text().split("[compare.shapes]")[0].replace('name = "toy"', 'name = "later"')
        + '\n[warm]\nstudies = ["runs/toy"]\nbest = 2\n'
    )
    run(later, 1, objective="toys:quick", quiet=True, trials=6)
    trials = collect(open_home("later")).trials
    warm = [t for t in trials if t.attributes.get("warm")]
    assert [t.params for t in warm] == [t.params for t in earlier[:2]]
    later.write_text(later.read_text().replace("runs/toy", "runs/absent"))
    with pytest.raises(UserError, match="absent"):
        run(later, 1, objective="toys:quick", quiet=True, folder="elsewhere")


def test_the_front_grows_or_is_stale() -> None:
    study = loads(TOY.replace("trials = 8", "trials = 8\nstale_trials = 2"))

    def trial(i: int, *values: float):
        return SimpleNamespace(state=SimpleNamespace(name="COMPLETE"), values=list(values), datetime_complete=i)

    grown = [trial(0, 1, 0, 5), trial(1, 0, 1, 5), trial(2, 0, 0, 9)]
    assert not is_stale(study, grown) and is_stale(study, [*grown, trial(3, 0.5, 0, 6)])
    assert not is_stale(study, [*grown, trial(3, 0.5, 0, 1)]), "less state at the same recall is new"

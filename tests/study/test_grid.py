"""A small grid with real trainings: shared steps, results as trained alone, and the files for the repository."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dspace.errors import StudyError, UserError
from dspace.study.engine import run
from dspace.study.publish import Line, difference, publish, versions_of
from dspace.study.reading import load, loads
from dspace.study.results import Record, collect, open_home
from dspace.study.space import grid
from dspace.study.winner import export

STUDY = """
name = "small"
seed = 3
base = "palimpsa"

[task]
name = "mqar"
input_seq_len = 16
num_kv_pairs = 2
vocab_size = 24
train_examples = 200
valid_examples = 50
test_examples = 60

[model]
hidden_size = 16
head_dim = 4

[train]
steps = 12
batch_size = 20
reports = 3
stack = 4
schedule = "cosine"

[budget]
trials = 12

[sampler]
kind = "grid"

[objectives]
accuracy = "maximize"

[axes.variant.choices.palimpsa]
[axes.variant.choices.twin]
base = "simple_gla"
[axes.variant.choices.softmax]
model = { mixer = "softmax" }

[axes.rate]
values = [0.002, 0.01]
target = "train.learning_rate"

[axes.seed]
values = [1, 2]
target = "trial.seed"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: the first seed, then the rest."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "small.toml").write_text(STUDY)
    first = run(folder / "small.toml", 1, folder=folder / "run", quiet=True, trials=6)
    assert first.counts == {"complete": 6}
    assert run(folder / "small.toml", 1, folder=folder / "run", quiet=True).counts == {"complete": 12}
    return folder


def test_every_point_once_seed_by_seed(home: Path) -> None:
    study = load(home / "small.toml")
    points = grid(study)
    assert len(points) == 12 and [p["seed"] for p in points] == [1] * 6 + [2] * 6
    trials = collect(open_home(home / "run")).trials
    found = [json.dumps({**t.params}, sort_keys=True) for t in trials]
    assert sorted(found) == sorted(json.dumps(p, sort_keys=True) for p in points)
    assert {t.attributes["stacked"] for t in trials} == {2}, "two rates of a seed shared their steps"
    for t in trials:
        assert len({u.attributes["seed"] for u in trials if u.params["seed"] == t.params["seed"]}) == 1


def test_stacked_trials_are_as_trained_alone(home: Path, tmp_path: Path) -> None:
    alone = tmp_path / "small.toml"
    alone.write_text(STUDY.replace("stack = 4", "stack = 1"))
    run(alone, 1, folder=tmp_path / "run", quiet=True, trials=4)
    together = {json.dumps(t.params, sort_keys=True): t for t in collect(open_home(home / "run")).trials}
    for t in collect(open_home(tmp_path / "run")).trials:
        twin = together[json.dumps(t.params, sort_keys=True)]
        assert t.attributes["stacked"] == 1
        for mine, his in zip(t.curve, twin.curve, strict=True):
            assert mine["train_loss"] == pytest.approx(his["train_loss"], abs=2e-3)


def test_results_are_published(home: Path, tmp_path: Path) -> None:
    paths = publish(home / "run", tmp_path)
    assert [p.name for p in paths] == ["small.json", "small.md", "small.png"]
    told = json.loads(paths[0].read_text())
    assert len(told["trials"]) == 12 and all(len(t["curve"]) == 3 and t["test"] for t in told["trials"])
    assert told["versions"]["torch"] and told["study"]["task"]["num_kv_pairs"] == 2
    page = paths[1].read_text()
    assert "| palimpsa |" in page and "| softmax |" in page and "standard error, 2 seeds" in page
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_every_commit_and_machine_of_a_study_is_named(home: Path) -> None:
    """Of trials that give numbers: a study may go on elsewhere, and later."""
    results = collect(open_home(home / "run"))
    noted = [("one", "complete"), ("two", "pruned"), ("one", "complete"), ("three", "failed")]
    trials = [
        Record(i, state, {}, {}, {"versions": {"commit": c, "machine": "m"}}, 1.0) for i, (c, state) in enumerate(noted)
    ]
    assert versions_of(replace(results, trials=trials)) == {"commit": "one and two", "machine": "m"}


def test_the_ceiling_has_no_spec_to_export(home: Path) -> None:
    trials = collect(open_home(home / "run")).trials
    ceiling = next(t.number for t in trials if t.params["variant"] == "softmax")
    with pytest.raises(UserError, match="softmax attention"):
        export(home / "run", trial=ceiling)


def test_a_difference_is_told_with_its_doubt() -> None:
    def line(name: str, values: list[float]) -> Line:
        records = [Record(i, "complete", {}, {"accuracy": v}, {"seed": i}, 1.0) for i, v in enumerate(values)]
        return Line(name, {}, tuple(records))

    assert "+0.1000 ± 0.0000" in difference(line("a", [0.9, 0.8]), line("b", [0.8, 0.7]), "accuracy")
    assert "within twice" in difference(line("a", [0.9, 0.7]), line("b", [0.8, 0.8]), "accuracy")
    assert "one seed" in difference(line("a", [0.9]), line("b", [0.8]), "accuracy")


def test_a_grid_has_no_continuous_axis_and_seeds_are_whole() -> None:
    with pytest.raises(StudyError, match="continuous"):
        loads(STUDY.replace("values = [0.002, 0.01]", "low = 0.002\nhigh = 0.01"))
    with pytest.raises(StudyError, match="whole numbers"):
        loads(STUDY.replace("values = [1, 2]", "values = [1, 2.5]"))

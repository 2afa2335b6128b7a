"""Search: the structural space, constraints, halving, saturation, warm starts, comparisons of what was found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dspace.errors import StudyError, UserError
from dspace.study import ledger
from dspace.study.engine import run
from dspace.study.objective import model_arguments
from dspace.study.reading import load, loads
from dspace.study.results import collect, open_home
from dspace.study.schema import PruneTable
from dspace.study.space import Composer, NotAVariant
from dspace.study.trial import should_prune, violations
from tests.study.conftest import TOY

SPACE = """
name = "wide"
base = "palimpsa"
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
trials = 5
[sampler]
kind = "random"
[objectives]
accuracy = "maximize"
[axes.structure]
values = ["constant", "key_value"]
target = "point.structure"
[axes.evidence]
values = ["none", "energy"]
target = "point.evidence"
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


def test_a_point_of_the_space_is_composed_at_equal_state() -> None:
    composer = Composer(loads(SPACE))
    point = composer.compose({"structure": "key_value", "evidence": "energy", "prior_start": 2.0})
    assert point.build().structure == "key_value" and point.model.init == {"I_p": 2.0}
    with pytest.raises(NotAVariant, match="needs evidence"):
        composer.compose({"structure": "key_value", "evidence": "none", "prior_start": 1.0})
    operator = SimpleNamespace(state_numbers=lambda heads, k, v: 2 * k * v)
    widths = {}
    for structure, numbers in (("key_value", 2), ("constant", 1)):
        operator = _operator(numbers)
        arguments = model_arguments(point, operator)
        widths[structure] = int(4 * arguments["expand_v"])
        assert "state_per_head" not in arguments and "mixer" not in arguments
    assert widths == {"key_value": 8, "constant": 16}


def _operator(numbers: int):
    from dspace.nn.operator import Operator, ParameterInfo
    from dspace.nn.recipe import Declared

    inputs = tuple(Declared(n, a) for n, a in (("q", "k"), ("k", "k"), ("v", "v")))
    parameters = (ParameterInfo("I_p", "", "positive", 1.0),)
    return Operator("toy", lambda: None, lambda: None, inputs, parameters, ("kv",) * numbers)


@pytest.mark.timeout(300)
def test_the_space_is_searched_and_the_best_are_trained_again_on_fresh_data(tmp_path: Path) -> None:
    path = tmp_path / "wide.toml"
    path.write_text(SPACE)
    run(path, 1, folder=tmp_path / "run", quiet=True)
    results = collect(open_home(tmp_path / "run"))
    states = {t.state for t in results.trials}
    assert states <= {"complete", "pruned"} and "complete" in states
    for t in results.trials:
        if t.state == "pruned":
            assert "not a variant" in t.attributes["pruned"]
        else:
            assert t.metrics["state_bytes"] <= 4 * 64
    compared = results.comparisons["best"]
    assert {t.arm for t in compared} >= {"palimpsa", "top1"} and all(t.state == "complete" for t in compared)
    searched = {t.attributes["data_hash"] for t in results.trials if t.state == "complete"}
    fresh = {t.attributes["data_hash"] for t in compared}
    assert len(searched) == len(fresh) == 1 and searched != fresh


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
    assert not ledger.is_stale(study, grown) and ledger.is_stale(study, [*grown, trial(3, 0.5, 0, 6)])
    assert not ledger.is_stale(study, [*grown, trial(3, 0.5, 0, 1)]), "less state at the same recall is new"

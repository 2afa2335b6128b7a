"""Studies over the structural space: restrictions, limits on cost, no mathematics trained twice."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

import dspace.study
from dspace.errors import StudyError, UserError
from dspace.math import analyse
from dspace.space import why_not
from dspace.study.cost import expected, refusal
from dspace.study.engine import run
from dspace.study.ledger import open_study
from dspace.study.phase import Phase
from dspace.study.reading import loads
from dspace.study.results import collect, open_home
from dspace.study.schema import CostTable, ModelTable
from dspace.study.space import Composer
from dspace.study.storage import connect
from dspace.study.walk import point_of
from dspace.study.winner import spec_text

STUDY = """
name = "walk"
[space]
structure = ["constant", "key"]
evidence = ["none", "energy"]
forgetting = ["token", "token_key"]
target = ["prior"]
prior_precision = ["head"]
prior_mean = ["zero"]
correction = ["none"]
readout = ["mean"]
[task]
name = "rebinding_mqar"
vocab_size = 66
[budget]
trials = 6
"""
"""Four points: a constant precision or one per key channel, forgotten at one rate per token or per channel."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPACE_CACHE", str(tmp_path / "cache"))


def asked(composer: Composer, count: int) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    return [composer.suggest(study.ask()) for _ in range(count)]


def test_a_walk_ends_at_points_that_are_variants_and_stay_within_the_restrictions():
    composer = Composer(loads(STUDY))
    assert len(composer.walk.points) == 4 and composer.check() == 4
    found = asked(composer, 40)
    assert {str(point_of(p)) for p in found} == {str(p) for p in composer.walk.points}
    assert not any(why_not(point_of(p)) for p in found)
    spec = composer.compose(found[0]).build()
    assert spec.name.startswith("walk_") and set(spec.layer) >= set(spec.inputs)


def test_every_choice_can_be_asked_for_by_name():
    walk = Composer(loads(STUDY)).walk
    study = optuna.create_study()
    for choices in ({"structure": "key"}, {"forgetting": "token_key", "structure": "constant"}):
        study.enqueue_trial(walk.parameters(choices))
        assert choices.items() <= walk.suggest(study.ask()).items()
    assert walk.parameters({"structure": "value"}) is None


def test_no_mathematics_is_trained_twice_and_repetitions_cost_no_budget(toy: Path):
    toy.with_name("walk.toml").write_text(STUDY)
    summary = run("walk.toml", 2, objective="toys:counted", quiet=True)
    evaluated = (toy.parent / "evaluated").read_text().split("\n")[:-1]
    assert len(evaluated) == len(set(evaluated)) == 4, "the four points, once each, though six trials were to be had"
    home = open_home("walk")
    trials = open_study(Phase(loads(STUDY)), connect(home)).get_trials()
    assert sum("duplicate_of" not in t.user_attrs for t in trials) == 4
    assert summary.counts["complete"] >= 4 and "fail" not in summary.counts
    results = collect(home)
    assert set(results.best.params) >= {"structure", "forgetting", "readout"}
    assert analyse(dspace.spec.loads(spec_text(results, results.best, "winner")))
    assert dspace.study.report("walk").is_file()


def test_two_spellings_of_one_variant_are_one_point():
    """The hash of a point is that of the mathematics and the layer: neither names nor the order of factors enter."""
    text = """
name = "spelt"
base = "simple_gla"
[task]
name = "mqar"
vocab_size = 128
[axes.spelling.choices.plain]
[axes.spelling.choices.turned]
spec = { state = { S = { update = "k * v + S * exp(g)" } } }
[axes.spelling.choices.renamed]
spec = { state = { S = false, H = { axes = "kv", update = "v * k + exp(g) * H" } }, readout = { output = "scale * sum_k(H * q)" } }
[axes.spelling.choices.defined]
spec = { define = { kept = "exp(g) * S" }, state = { S = { update = "kept + v * k" } } }
[axes.spelling.choices.other]
spec = { state = { S = { update = "exp(2 * g) * S + v * k" } } }
[axes.spelling.choices.other_layer]
spec = { layer = { k = "silu(conv(linear))" } }
"""
    composer = Composer(loads(text))
    hashes = {c: composer.compose({"spelling": c}).hash for c in composer.study.axes["spelling"].choices}
    same = {hashes[c] for c in ("plain", "turned", "renamed", "defined")}
    assert len(same) == 1 and len(set(hashes.values())) == 3


def test_where_parameters_start_tells_points_apart():
    text = """
name = "starts"
base = "palimpsa"
[task]
name = "mqar"
vocab_size = 128
[axes.prior]
low = 0.1
high = 10.0
target = "model.init.I_p"
"""
    composer = Composer(loads(text))
    one, two, default = (composer.compose({"prior": x}).hash for x in (0.5, 2.0, 1.0))
    assert len({one, two, default}) == 3
    assert composer.compose({"prior": 1.0}).hash == Composer(loads(text)).compose({"prior": 1}).hash


COST = '[cost]\ngpu = "H100"\n'


def test_points_that_cost_too_much_are_not_walked_to():
    model = "[model]\nhidden_size = 512\nnum_layers = 2\nnum_heads = 8\nhead_dim = 64\n"
    every = Composer(loads(STUDY.replace('["constant", "key"]', '["constant", "key_value"]') + model + COST))
    costs = {
        str(p): every.cost(every.compose(dict(zip(_axes(), str(p).split("/"), strict=True)))) for p in every.walk.points
    }
    times = sorted(c.gpu_ms for c in costs.values())
    between = (times[1] + times[2]) / 2
    limited = Composer(
        loads(
            every_text := STUDY.replace('["constant", "key"]', '["constant", "key_value"]')
            + model
            + COST
            + f"max_ms = {between}\n"
        )
    )
    assert {p.structure for p in limited.walk.points} == {"constant"}, costs
    with pytest.raises(UserError, match=r"all 4 points cost more .* ms expected on H100"):
        Composer(loads(every_text.replace(f"max_ms = {between}", "max_ms = 1e-6"))).check()


def _axes() -> list[str]:
    from dspace.space import AXES

    return list(AXES)


def test_the_cost_is_that_of_the_model():
    costs = {"state_bytes": "4*K*V", "flops": "0", "flops_tensor": "0", "bytes": "K*V"}
    one = expected(costs, CostTable(gpu="h100", tokens=1000), ModelTable(hidden_size=64, num_heads=4, num_layers=1))
    two = expected(costs, CostTable(gpu="h100", tokens=2000), ModelTable(hidden_size=64, num_heads=4, num_layers=3))
    assert one.state_bytes == 4 * 16 * 16 * 4 and two.state_bytes == 3 * one.state_bytes
    assert two.gpu_ms == pytest.approx(6 * one.gpu_ms) and one.gpu_ms == pytest.approx(1e3 * 4 * 1000 * 256 / 3.35e12)
    assert refusal(CostTable(max_ms=one.gpu_ms / 2), one).startswith(f"{one.gpu_ms:.4g} ms expected on H100")
    assert "bytes of state" in refusal(CostTable(max_state_bytes=10), one) and not refusal(CostTable(), one)


def test_a_trial_that_would_cost_too_much_is_refused_before_training(toy: Path):
    """Also in a study of a base, where a number decides: the wide heads are pruned, untrained."""
    text = """
name = "wide"
base = "simple_gla"
[task]
name = "rebinding_mqar"
vocab_size = 66
[cost]
max_state_bytes = 9000
[budget]
trials = 6
[axes.width]
values = [8, 64]
target = "model.head_dim"
"""
    text += '[axes.x]\nlow = 0.0\nhigh = 1.0\ntarget = "train.weight_decay"\n'
    toy.with_name("wide.toml").write_text(text)
    run("wide.toml", 1, objective="toys:counted", quiet=True)
    trials = open_study(Phase(loads(text)), connect(open_home("wide"))).get_trials()
    assert {t.params["width"] for t in trials if t.state.name == "PRUNED"} == {64}
    assert {t.params["width"] for t in trials if t.state.name == "COMPLETE"} == {8}
    assert all("bytes of state" in t.user_attrs["pruned"] for t in trials if t.state.name == "PRUNED")
    assert all(t.user_attrs["cost"]["gpu_ms"] > 0 for t in trials)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('["constant", "key"]', '["constant", "keys"]', "did you mean 'key'"),
        ('["constant", "key"]', "[]", "no choice is allowed"),
        ("[space]", "[spaces]", "unknown key 'spaces'"),
        ("[space]\n", "[space]\nstructur = 3\n", "did you mean 'structure'"),
        ('name = "walk"', 'name = "walk"\nbase = "gla"', "a base or a [space], not both"),
        ("[budget]", '[cost]\ngpu = "H10"\n[budget]', "did you mean 'H100'"),
        ("[budget]", '[objectives]\ngpu_ms = "minimize"\n[budget]', "needs to know the GPU"),
        ("[budget]", '[axes.readout]\nvalues = [1]\ntarget = "train.steps"\n[budget]', "an axis of the space already"),
        ("[budget]", '[compare.a]\narms = { x = { structure = "value" }, y = {} }\n[budget]', "unknown choice"),
    ],
)
def test_mistakes_are_told_in_their_place(old: str, new: str, said: str):
    with pytest.raises(StudyError) as caught:
        loads(STUDY.replace(old, new, 1))
    assert said in str(caught.value) and any(p.line > 1 for p in caught.value.problems)


def test_neither_base_nor_space():
    with pytest.raises(StudyError, match="or a \\[space\\] to walk through"):
        loads('name = "x"\n[task]\nname = "mqar"\nvocab_size = 128\n')


def test_arms_that_the_space_does_not_have():
    text = STUDY + '[compare.a]\narms = { x = { structure = "key", evidence = "none" }, y = {} }\n'
    with pytest.raises(UserError, match="no point of its space is the arm 'x'"):
        Composer(loads(text)).check()
    text = STUDY.replace('["none", "energy"]', '["gain"]')
    assert {p.structure for p in Composer(loads(text)).walk.points} == {"key"}
    with pytest.raises(UserError, match="no point of the space has"):
        _ = Composer(loads(STUDY.replace('["none", "energy"]', '["none"]').replace('"constant", ', ""))).walk

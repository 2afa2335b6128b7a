"""Points: composing specs, conditional axes, hashes."""

from __future__ import annotations

import pytest

from dspace.errors import UserError
from dspace.study.reading import find, load, loads
from dspace.study.space import Composer, merge, middle, structures
from tests.study.conftest import TOY

STUDY = """
name = "memory"
base = "palimpsa"
[task]
name = "mqar"
vocab_size = 128

[axes.precision.choices.diagonal]
[axes.precision.choices.constant]
spec = { precision = { structure = "constant", evidence = false } }
model = { expand_v = 4.0 }
[axes.precision.choices.other]
base = "simple_gla"

[axes.prior]
low = 0.1
high = 10.0
log = true
target = "model.init.I_p"
when = { precision = ["diagonal"] }

[axes.rate]
low = 1e-3
high = 1e-2
target = "train.learning_rate"

[axes.gain]
values = [0.5, 2.0]
target = "spec.layer.b"
template = "{value} * sigmoid(low_rank)"
when = { precision = ["diagonal"] }
"""


def test_a_point_composes_a_spec_a_model_and_a_training() -> None:
    composer = Composer(loads(STUDY))
    point = composer.compose({"precision": "diagonal", "prior": 0.25, "rate": 2e-3, "gain": 2.0})
    assert point.model.init == {"I_p": 0.25} and point.train.learning_rate == 2e-3
    spec = point.build()
    assert spec.name == "memory_diagonal" and spec.layer["b"] == "2.0 * sigmoid(low_rank)"
    assert spec.structure == "key_value"


def test_choices_patch_replace_and_remove() -> None:
    composer = Composer(loads(STUDY))
    constant = composer.compose({"precision": "constant", "rate": 1e-3})
    assert constant.model.expand_v == 4.0
    assert "b" not in constant.build().inputs, "what no formula uses is dropped"
    assert composer.compose({"precision": "other", "rate": 1e-3}).build().inputs.keys() == {"q", "k", "v", "g"}


def test_axes_exist_only_under_their_choices() -> None:
    study = loads(STUDY)
    assert set(middle(study, {"precision": "diagonal"})) == {"precision", "prior", "rate", "gain"}
    assert set(middle(study, {"precision": "other"})) == {"precision", "rate"}
    assert middle(study, {"precision": "diagonal"})["prior"] == pytest.approx(1.0)
    assert structures(study) == [{"precision": c} for c in ("diagonal", "constant", "other")]


def test_equal_points_have_equal_hashes() -> None:
    composer = Composer(loads(STUDY))
    one = {"precision": "other", "rate": 1e-3}
    assert composer.compose(one).hash == composer.compose(dict(one)).hash
    assert composer.compose(one).hash != composer.compose({**one, "rate": 2e-3}).hash


def test_a_point_that_cannot_be_composed_is_told_before_any_trial() -> None:
    text = STUDY.replace('structure = "constant"', 'structure = "konstant"')
    with pytest.raises(UserError, match="precision = constant"):
        Composer(loads(text)).check()
    text = STUDY.replace("spec.layer.b", "spec.layers.b")
    with pytest.raises(UserError, match="there is no 'layers'"):
        Composer(loads(text)).check()


def test_merge_removes_with_false() -> None:
    tables = {"a": {"x": 1, "y": 2}, "b": 3}
    merge(tables, {"a": {"x": False}, "b": False, "c": {"z": 1}})
    assert tables == {"a": {"y": 2}, "c": {"z": 1}}


def test_every_structure_of_the_quickstart_compiles_to_a_spec() -> None:
    study = load(find("quickstart"))
    assert Composer(study).check() >= 3
    assert study.budget.trials >= 16 and study.compare


def test_circular_conditions_are_told() -> None:
    text = TOY.replace('target = "train', 'when = { shape = ["flat"] }\ntarget = "train') + "\n"
    text = text.replace(
        'doc = "better"',
        'doc = "better"\n[axes.shape.when]\nother = ["a"]\n[axes.other.when]\nshape = ["flat"]\n[axes.other.choices.a]',
    )
    with pytest.raises(UserError, match="circle"):
        Composer(loads(text)).check()

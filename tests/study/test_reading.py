"""Study files: what is refused, and what the refusal says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspace.errors import StudyError, UserError
from dspace.study.reading import find, load, loads
from tests.study.conftest import TOY


def problems(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        loads(text, "toy.toml")
    return str(caught.value)


def test_a_good_file_is_read() -> None:
    study = loads(TOY)
    assert study.name == "toy" and list(study.axes) == ["shape", "x"]
    assert list(study.objectives) == ["stability", "plasticity", "state_bytes"]
    assert list(study.structural_axes) == ["shape"]


def test_an_unknown_key_is_refused_in_its_place_with_the_nearest_spelling() -> None:
    text = TOY.replace("trials = 8", "trails = 8")
    line = text.split("\n").index("trails = 8") + 1
    said = problems(text)
    assert f"toy.toml:{line}:1" in said and "budget.trails" in said and "did you mean 'trials'" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('base = "linear_attention"', "", "'base' is missing"),
        ("trials = 8", 'trials = "ten"', "budget.trials"),
        ("trials = 8", "trials = 0", "greater than or equal to 1"),
        ('on = "accuracy"', 'on = "acuracy"', "did you mean 'accuracy'"),
        ("low = 0.0", "low = 2.0", "above high"),
        ("low = 0.0", "low = 0.0\nlog = true", "needs low > 0"),
        ('"train.learning_rate"', '"train.learning_rat"', "did you mean 'learning_rate'"),
        ('"train.learning_rate"', '"nowhere"', "unknown target"),
        ('name = "rebinding_mqar"', 'name = "rebindingmqar"', "did you mean 'rebinding_mqar'"),
        ("vocab_size = 66", "vocab_size = 10", "must exceed input_seq_len"),
        ("vocab_size = 66", "vocab_sise = 66", "did you mean 'vocab_size'"),
        ('flat = { shape = "flat" }', 'flat = { shape = "flatt" }', "did you mean 'flat'"),
        ('flat = { shape = "flat" }', 'flat = { shap = "flat" }', "did you mean 'shape'"),
        ("seed = 7", "seed = 7\n[sampler]\nkind = 'tpee'", "did you mean 'tpe'"),
        ("seed = 7", "seed = = 7", "not TOML"),
        ('title = "A toy"', "title = 3", "valid string"),
    ],
)
def test_mistakes(old: str, new: str, said: str) -> None:
    text = TOY.replace(old, new)
    assert text != TOY
    message = problems(text)
    assert said in message and "toy.toml" in message


def test_all_problems_are_told_at_once() -> None:
    said = problems(TOY.replace("trials = 8", "trails = 8").replace("high = 1.0", "hihg = 1.0"))
    assert said.startswith("2 problems")
    assert said.index("trails") < said.index("hihg"), "in the order of the file"


def test_a_mistyped_base_is_told_with_the_other_problems(tmp_path: Path) -> None:
    wrong = TOY.replace("low = 0.0", "low = 2.0").replace("trials = 8", "trails = 8")
    said = problems(wrong.replace('"linear_attention"', '"linear_atention"'))
    assert said.startswith("3 problems") and "toy.toml:5:9: base: unknown base spec 'linear_atention'" in said
    assert "did you mean 'linear_attention'" in said and "trails" in said and "above high" in said
    said = problems(wrong.replace("base =", "bsae ="))
    assert said.startswith("3 problems") and "did you mean 'base'" in said and "is missing" not in said
    said = problems(wrong.replace('base = "linear_attention"', "base = 3"))
    assert said.startswith("3 problems") and "valid string" in said and "is missing" not in said
    said = problems(
        TOY.replace('doc = "better"', 'base = "glaa"\ntransform = "metaplastik"').replace("low = 0.0", "low = 2.0")
    )
    assert said.startswith("3 problems") and "did you mean 'gla'" in said and "did you mean 'metaplastic'" in said
    with pytest.raises(StudyError) as caught:
        loads(wrong.replace('"linear_attention"', '"specs/mine.toml"'), "toy.toml", tmp_path)
    assert str(caught.value).startswith("3 problems") and "no spec file 'specs/mine.toml'" in str(caught.value)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs/mine.toml").write_text("")
    assert loads(TOY.replace('"linear_attention"', '"specs/mine.toml"'), "toy.toml", tmp_path).base == "specs/mine.toml"


def test_what_follows_from_a_key_of_the_wrong_type_is_no_problem_of_its_own() -> None:
    said = problems(TOY.replace("low = 0.0", 'low = "none"').replace('on = "accuracy"', 'on = "acuracy"'))
    assert said.startswith("2 problems") and "valid number" in said and "did you mean 'accuracy'" in said
    said = problems(TOY.replace("[axes.shape.choices.flat]", "[axes.shape]\nchoices.flat = 3"))
    assert said.startswith("1 problem\n")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study file"):
        load(tmp_path / "absent.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StudyError, match="UTF-8"):
        load(tmp_path / "x.toml")
    (tmp_path / "big.toml").write_text("#" * 1_100_000)
    with pytest.raises(StudyError, match="at most"):
        load(tmp_path / "big.toml")
    with pytest.raises(StudyError):
        loads("x = " + "[" * 20_000)


def test_shipped_studies_are_found_by_name_and_are_valid() -> None:
    for path in sorted(find("quickstart").parent.glob("*.toml")):
        study = load(path)
        assert study.budget.trials >= 1 and study.name == path.stem


def test_a_study_is_read_without_the_heavy_libraries(toy: Path) -> None:
    """Every worker reads it, and `dspace study list` reads all."""
    code = f"import sys; from dspace.study.reading import load; load({str(toy)!r}); print(*{{'sympy', 'torch', 'optuna'}} & set(sys.modules))"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr

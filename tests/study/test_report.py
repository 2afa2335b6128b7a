"""The report and the export of a study with real specs and toy numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from dspace.errors import UserError
from dspace.math import analyse
from dspace.spec import builtin_names, load
from dspace.study import formulas
from dspace.study.engine import run
from dspace.study.figures import Arm
from dspace.study.page import comparison_arms, content, report, verdict
from dspace.study.publish import compared
from dspace.study.results import Record, collect, open_home, pareto
from dspace.study.svg import Plot, ticks
from dspace.study.winner import export
from tests.study.conftest import TOY


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished toy study; the study's folder is beside it."""
    folder = tmp_path_factory.mktemp("report")
    path = folder / "toy.toml"
    path.write_text(TOY.replace('base = "linear_attention"', 'base = "palimpsa"'))
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parent))
        run(path, jobs=2, objective="toys:quick", quiet=True, folder=folder / "run")
    return report(folder / "run")


def test_the_page_has_all_its_parts(page: Path) -> None:
    text = page.read_text()
    for part in (
        "Stability against plasticity",
        "Learning curves",
        "What mattered",
        "The winning spec",
        "Where the winner stands",
        'class="node marked"',
        "All trials",
        "Run it again",
        "2 arms, 2 fresh seeds each",
        "round wins: ",
        "dspace generate",
        "chunk_toy_best(q, k, v, b, g, I_p",
        "<math",
        "optuna-dashboard",
    ):
        assert part in text, part
    assert text.count("<svg") >= 3 and text.count('<tr class="complete') == 8


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\(", text)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/1998/Math/MathML"}


def test_the_figures_are_well_formed(page: Path) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page.read_text(), re.S):
        assert not re.search(r"\bnan\b|\binf\b", svg)
        ElementTree.fromstring(svg)


def test_what_a_user_writes_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "toy.toml"
    path.write_text(TOY.replace('"A toy"', '"<script>alert(1)</script>"'))
    run(path, jobs=1, objective="toys:quick", quiet=True, folder=tmp_path / "run", trials=1)
    assert "<script>" not in report(tmp_path / "run").read_text(), "one trial and no comparison are enough for a page"


def test_export_gives_a_spec_that_compiles_to_the_same_variant(page: Path, tmp_path: Path) -> None:
    path = export(page.parent, tmp_path / "best.toml")
    spec = load(path)
    assert spec.name == "toy_best" and path.read_text().startswith("# Trial ")
    again = load(export(page.parent, tmp_path / "again.toml"))
    assert again.hash == spec.hash
    assert load(export(page.parent, tmp_path / "third.toml", trial=3)).name == "toy_trial_3"
    with pytest.raises(UserError, match="trial 99"):
        export(page.parent, trial=99)


def test_studies_that_are_not_there_are_told_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no study 'toi' was run"):
        open_home("toi")


@pytest.mark.parametrize("name", builtin_names())
def test_formulas_of_every_variant_are_well_formed(name: str) -> None:
    for _, formula in formulas.recurrence(analyse(load(name))):
        ElementTree.fromstring(formula)


def test_formulas_read_as_people_write_them() -> None:
    lines = dict(formulas.recurrence(analyse(load("simple_gla"))))
    words = re.sub(r"<[^>]+>", "", lines["decayed sum of v k^T"])
    assert words == "St=egtSt−1+ktvt"


def test_the_front_holds_what_nothing_dominates(page: Path) -> None:
    results = collect(open_home(page.parent))
    study = results.study

    def record(number: int, a: float, b: float, c: float) -> Record:
        return Record(number, "complete", {}, {"stability": a, "plasticity": b, "state_bytes": c}, {}, 0.0)

    trials = [record(0, 0.9, 0.1, 10), record(1, 0.8, 0.1, 10), record(2, 0.1, 0.9, 10), record(3, 0.8, 0.1, 5)]
    assert pareto(trials, study) == [0, 2, 3]


def test_a_verdict_claims_no_more_than_the_spread_allows() -> None:
    clear = [Arm("a", (0.90, 0.91, 0.92), 64), Arm("b", (0.80, 0.81, 0.82), 64)]
    assert "At equal state (64 B)" in verdict(clear, "accuracy") and "more than twice" in verdict(clear, "accuracy")
    close = [Arm("a", (0.80, 0.90), 64), Arm("b", (0.81, 0.91), 128)]
    assert "no difference can be claimed" in verdict(close, "accuracy") and "not equal" in verdict(close, "accuracy")
    assert "one seed" in verdict([Arm("a", (0.8,), 64), Arm("b", (0.9,), 64)], "accuracy")


def test_a_verdict_measures_the_best_against_the_arms_that_the_file_names() -> None:
    mine, found = Arm("mine", (0.1, 0.2, 0.3), 64), [Arm("top1", (0.7, 0.8, 0.9), 64), Arm("top2", (0.6, 0.7, 0.8), 64)]
    text = verdict([mine, *found], "accuracy", {"mine": {}})
    assert text.startswith(verdict([mine, *found], "accuracy")), "best against second first, as it was"
    assert "Against mine 0.200 ± 0.100 over 3 seeds, which the study file names: " in text
    assert text.endswith("the difference of top1 is +0.600, more than twice its standard error of 0.082.")
    wide = Arm("mine", (0.1, 0.9, 0.2), 128)
    text = verdict([wide, *found], "accuracy", ["mine"])
    assert "with 64 B against 128 B of state (not equal): the difference of top1 is +0.400, within twice" in text
    lower = [Arm("mine", (3.0, 3.1), 64), Arm("top1", (1.0, 1.1), 64), Arm("top2", (2.0, 2.1), 64)]
    assert "of top1 is -2.000, more than twice" in verdict(lower, "loss", ["mine"])


def test_a_verdict_says_nothing_twice() -> None:
    top = [Arm("top1", (0.7, 0.8), 64), Arm("top2", (0.5, 0.6), 64)]
    second = [Arm("mine", (0.65, 0.75), 64), *top]
    assert verdict(second, "accuracy", ["mine"]) == verdict(second, "accuracy"), "it is compared already"
    best = verdict([Arm("mine", (0.9, 1.0), 64), *top], "accuracy", ["mine"])
    assert best.endswith(
        "mine, which the study file names, is itself the best: no arm from the search has a better mean."
    )
    assert "Against" not in best
    both = verdict([Arm("mine", (0.9, 1.0), 64), *top, Arm("yours", (0.1, 0.2), 64)], "accuracy", ["mine", "yours"])
    assert "mine, which the study file names, is itself the best" in both and "Against yours 0.150" in both
    written = [Arm("mine", (0.9, 1.0), 64), Arm("yours", (0.1, 0.2), 64)]
    assert "itself the best" not in verdict(written, "accuracy", ["mine", "yours"]), "nothing came from the search"


def test_a_verdict_of_one_seed_claims_no_spread() -> None:
    arms = [Arm("mine", (0.1,), 64), Arm("top1", (0.8,), 64), Arm("top2", (0.7,), 64)]
    text = verdict(arms, "accuracy", ["mine"])
    assert "Against mine 0.100 over one seed, which the study file names: " in text and "0.000" not in text
    assert text.endswith("the difference of top1 is +0.700, not to be judged: one seed has no spread.")


def test_the_page_says_what_the_file_asked(page: Path) -> None:
    results = collect(open_home(page.parent))
    arms = comparison_arms(results, "shapes")
    results.comparisons["shapes"] += [
        replace(t, params={**t.params, "arm": "third"}) for t in results.comparisons["shapes"]
    ]
    asked = results.study.compare["shapes"]
    wider = asked.model_copy(update={"arms": {**asked.arms, "third": {"shape": "flat"}}})
    results.study = results.study.model_copy(update={"compare": {"shapes": wider}})
    assert len(arms) == 2 and "which the study file names" in content(results)["comparisons"][0]["verdict"]
    assert any("which the study file names" in line for line in compared(results))


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.83, 0.91) == [0.84, 0.86, 0.88, 0.9]
    assert ticks(3, 3) == [3]
    ElementTree.fromstring(Plot((0, 1), (0, 1), "x", "y").render())

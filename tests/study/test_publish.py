"""The picture of published results, and numbers that are the same wherever they are published."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspace.study.page import importance_rows
from dspace.study.picture import GREY, PALETTE, colours_of, draw, panels_of
from dspace.study.reading import loads
from dspace.study.results import Record, Results, importances, lines_of, pareto
from dspace.study.storage import Home
from tests.study.conftest import TOY

OBJECTIVES = (
    '[objectives]\nstability = "maximize"\nplasticity = "maximize"\nloss = "minimize"\n[best]\nby = "accuracy"\n'
)
ACCURACY = '[objectives]\naccuracy = "maximize"\n'
SHAPES = [f"a_structure_that_has_quite_a_long_name_indeed_{i}" for i in range(10)]


def trial(number: int, shape: str, x: float, arm: str = "", loss: float = 1.0, source: int = 0) -> Record:
    """A completed trial of which everything follows from ``x``."""
    metrics = {"stability": x, "plasticity": 1 - x, "loss": loss, "accuracy": x, "state_bytes": 64.0}
    attributes: dict[str, Any] = {
        "test": {"accuracy": x, "stability": x, "plasticity": 1 - x},
        "curve": [{"step": 1, "accuracy": 0.0}, {"step": 2, "accuracy": x}],
        "recall_by_age": {"edges": [0, 10, 20], "recall": [x, x / 2]},
    }
    named = {"arm": arm} if arm else {}
    attributes |= {"arm": arm, "from_trial": source} if arm else {}
    return Record(number, "complete", {"shape": shape, "x": 0.1 * (1 + number % 2), **named}, metrics, attributes, 1.0)


def results_of(text: str, trials: list[Record], compared: list[Record] | None = None) -> Results:
    study = loads(text)
    results = Results(Home(Path(".")), study, Path("."), trials, {"shapes": compared or []}, None)
    results.front = pareto(trials, study)
    return results


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Results], Any]:
    """Draws results and gives the figure as it was saved."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", saved)

    def drawn(results: Results) -> Figure:
        draw(results, lines_of(results), tmp_path / "toy.png")
        assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
        return kept[-1]

    return drawn


def words(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.texts} - {""}


def test_several_objectives_are_shown_by_their_front_and_the_comparison(picture: Callable[[Results], Any]) -> None:
    trials = [trial(0, "round", 0.9), trial(1, "flat", 0.2), trial(2, "flat", 0.2, loss=2.0), trial(3, "round", 0.5)]
    compared = [trial(i, "round", 0.8 + 0.1 * i, "round", source=3) for i in (0, 1)] + [
        trial(i, "flat", 0.1 * i, "top1", source=2) for i in (2, 3)
    ]
    text = TOY.replace("seeds = 2", "seeds = 2\ntop = 1") + OBJECTIVES
    results = results_of(text, trials, compared)
    assert results.front == [0, 1, 3]
    front, comparison, ages = picture(results).axes
    assert front.get_ylabel().startswith("stability, validation") and front.get_xlabel().startswith("plasticity")
    assert words(front) == {"trial 0, loss 1", "trial 1, loss 1", "trial 3, loss 1, round", "top1"}
    assert len(front.collections) == 4, "all that completed, on the front or not"
    assert front.lines[0].get_xdata() == pytest.approx([0.1, 0.5, 0.8])
    assert front.lines[0].get_ydata() == pytest.approx([0.9, 0.5, 0.2])
    assert [label.get_text() for label in comparison.get_xticklabels()] == ["round\ntrial 3", "top1\ntrial 2"]
    dots = [
        collection.get_offsets()[:, 1].tolist()
        for collection in comparison.collections
        if len(collection.get_offsets()) > 1
    ]
    assert dots == [pytest.approx([0.8, 0.9]), pytest.approx([0.2, 0.3])], "every seed of each arm"
    assert ages.get_ylabel() == "recall, test" and len(ages.lines) == 2


def test_less_is_said_to_be_better(picture: Callable[[Results], Any]) -> None:
    results = results_of(
        TOY + '[objectives]\naccuracy = "maximize"\nstate_bytes = "minimize"\n', [trial(0, "flat", 0.5)]
    )
    front, curves, _ = picture(results).axes
    assert front.get_xlabel() == "state_bytes (less is better)"
    assert curves.get_xlabel() == "steps", "there is no comparison"


def test_a_grid_keeps_its_three_panels(picture: Callable[[Results], Any]) -> None:
    grid = TOY.replace("low = 0.0\nhigh = 1.0", "values = [0.1, 0.2]") + ACCURACY
    results = results_of(grid, [trial(i, "flat", 0.2 * i) for i in range(2)])
    assert [axes.get_xlabel() for axes in picture(results).axes] == [
        "steps",
        "learning rate",
        "tokens since the binding",
    ]
    searched = results_of(TOY + ACCURACY, results.trials)
    assert len(panels_of(searched)) == 2, "no line joins rates that a sampler chose"


def test_the_legend_names_the_best_and_covers_nothing(picture: Callable[[Results], Any]) -> None:
    choices = "".join(f"[axes.shape.choices.{shape}]\n" for shape in SHAPES)
    text = TOY.replace("[axes.x]", choices + "[axes.x]")
    trials = [trial(i, shape, 0.9 - 0.05 * i, loss=1.0 + i) for i, shape in enumerate(SHAPES)]
    results = results_of(text + ACCURACY, trials)
    results.comparisons["shapes"] = [trial(0, SHAPES[-1], 0.5, "flat", source=9)]
    colours = colours_of(results, lines_of(results))
    assert list(colours) == SHAPES, "best first"
    named = [shape for shape in SHAPES if colours[shape] != GREY]
    assert named == [*SHAPES[:7], SHAPES[-1]] and len(named) == len(PALETTE), "the compared is worth a colour"
    figure = picture(results)
    (legend,) = figure.legends
    assert [entry.get_text() for entry in legend.get_texts()] == [*named, "others"]
    place = legend.get_window_extent()
    assert place.x0 >= 0 and place.x1 <= figure.bbox.x1 and place.y0 >= 0, "inside the picture"
    assert all(axes.get_tightbbox().y0 >= place.y1 for axes in figure.axes)
    assert not any(axes.get_legend() for axes in figure.axes)


def test_importances_do_not_hang_on_the_order_of_sums() -> None:
    chance = random.Random(3)
    study = loads(TOY + ACCURACY)
    trials = [trial(i, chance.choice(["round", "flat"]), chance.random()) for i in range(40)]
    told = importances(trials, study)
    for _ in range(20):
        chance.shuffle(trials)
        assert importances(trials, study)["accuracy"]["shape"] == told["accuracy"]["shape"]


def test_axes_that_explain_the_same_keep_their_order() -> None:
    axes = "".join(f'[axes.a{i}]\nvalues = [1.0, 2.0]\ntarget = "model.init.a{i}"\n' for i in (3, 1, 4, 2, 0))
    results = results_of(TOY.replace("[axes.x]", axes + "[axes.x]"), [])
    results.importances = {"accuracy": dict.fromkeys(["a0", "x", "a1", "a2", "a3", "a4"], 0.0) | {"shape": 0.5}}
    assert [row["axis"] for row in importance_rows(results)] == ["shape", "a3", "a1", "a4", "a2", "a0", "x"]

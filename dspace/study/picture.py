"""The figure of a study's results: panels beside each other, one legend below."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dspace.study.figures import age_curve
from dspace.study.page import comparison_arms
from dspace.study.results import Line, Record, Results, best_lines, pareto, structure
from dspace.study.schema import METRICS, StudyFile

Panel = Callable[[Any, Results, Sequence[Line], dict[str, str]], None]
"""Draws one panel on the axes that it is given, structures in these colours."""
PALETTE = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C9")
GREY = "0.78"
"""Of the structures beyond the palette."""


def draw(results: Results, lines: Sequence[Line], path: Path) -> None:
    """One figure of several panels, 1600 pixels wide, with one legend below them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    colours, panels = colours_of(results, lines), panels_of(results)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 6.6), layout="constrained", squeeze=False)
    for panel, each in zip(panels, axes[0], strict=True):
        panel(each, results, lines, colours)
        each.grid(alpha=0.3)
    shown = {name: colour for name, colour in colours.items() if colour != GREY}
    if len(shown) < len(colours):
        shown["others"] = GREY
    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in shown.items()]
    columns = max(175 // (5 + max(len(name) for name in shown)), 1)  # 175 letters fit beside each other
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(results.study.title or results.study.name)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=100)
    pyplot.close(figure)
    os.replace(temporary, path)


def panels_of(results: Results) -> list[Panel]:
    """What the figure of a study shows, from left to right.

    Several objectives: their front. One: accuracy against steps, and against the rate where rates are a grid (no two
    trials share a rate that a sampler chose, so that no line can join them). Then comparisons; recall against age.
    """
    study = results.study
    several = len(study.objectives) > 1
    panels: list[Panel] = [_draw_front if several else _draw_curves]
    if not several and any(study.axes[n].values for n in _rates(study)):
        panels.append(_draw_rates)
    panels += [partial(_draw_comparison, name=n) for n in results.comparisons if comparison_arms(results, n)]
    if several and len(panels) == 1:
        panels.append(_draw_curves)
    return [*panels, _draw_ages]


def colours_of(results: Results, lines: Sequence[Line]) -> dict[str, str]:
    """A colour for each structure, the best structure first.

    There are as many as a reader can tell apart: structures on the front and in comparisons have one before others,
    and what is left is grey.
    """
    metric, study = results.study.best.by, results.study
    sign = 1 if METRICS[metric][0] == "maximize" else -1
    ranked = sorted(best_lines(results, lines), key=lambda line: -sign * fmean(line.values(metric, False)))
    shown = [t for found in results.comparisons.values() for t in found]
    if len(study.objectives) > 1:
        shown += [t for t in results.trials if t.number in results.front]
    first = {structure(t, study) for t in shown}
    named = [line.name for line in sorted(ranked, key=lambda line: line.name not in first)][: len(PALETTE)]
    palette = iter(PALETTE)
    return {line.name: next(palette) if line.name in named else GREY for line in ranked}


def _draw_front(axes: Any, results: Results, lines: Sequence[Line], colours: dict[str, str]) -> None:
    """The first objective against the second: every completed trial faint, those of the front strong.

    The line joins what nothing beats in these two; with a third objective there may be more on the front.
    """
    study = results.study
    up, across = list(study.objectives)[:2]
    done = [t for t in results.trials if t.state == "complete"]
    edge = pareto(done, study, (up, across))
    joined = sorted({(t.metrics[across], t.metrics[up]) for t in done if t.number in edge})
    axes.plot(*zip(*joined, strict=True), color="0.3", lw=1, ls="--", zorder=1)
    xs, labels = [t.metrics[across] for t in done], _labels(results)
    for t in done:
        x, y = t.metrics[across], t.metrics[up]
        front = t.number in results.front
        style = {"s": 90, "edgecolor": "black", "zorder": 3} if front else {"s": 36, "alpha": 0.5, "zorder": 2}
        axes.scatter([x], [y], color=colours[structure(t, study)], **style)
        right = x > (min(xs) + max(xs)) / 2  # its label goes to the left, so that it stays inside
        place = {"ha": "right" if right else "left", "va": "bottom" if front else "center"}
        offset = (-8 if right else 8, 2 if front else 0)
        axes.annotate(labels.get(t.number, ""), (x, y), offset, textcoords="offset points", fontsize=9, **place)
    axes.set(xlabel=_objective(across, done), ylabel=_objective(up, done))
    axes.set_title("completed trials, those of the front outlined", fontsize=10)
    axes.margins(0.08)


def _labels(results: Results) -> dict[int, str]:
    """What is written beside a trial: of the front its number and further objectives; names of arms made from it."""
    found: dict[int, list[str]] = {}
    for t in results.trials:
        if t.number in results.front:
            further = [f"{n} {t.metrics[n]:.3g}" for n in list(results.study.objectives)[2:]]
            found[t.number] = [f"trial {t.number}", *further]
    for t in (t for trials in results.comparisons.values() for t in trials if "from_trial" in t.attributes):
        words = found.setdefault(t.attributes["from_trial"], [])
        if t.arm not in words:
            words.append(t.arm)
    return {number: ", ".join(words) for number, words in found.items()}


def _objective(name: str, trials: Sequence[Record]) -> str:
    """An objective as an axis has it: on which data, and which way is better."""
    data = ", validation" if any(name in t.test for t in trials) else ""
    return f"{name}{data}" + (" (less is better)" if METRICS[name][0] == "minimize" else "")


def _draw_comparison(
    axes: Any, results: Results, lines: Sequence[Line], colours: dict[str, str], *, name: str = ""
) -> None:
    """Each arm of a comparison: its seeds as dots, beside them mean and standard deviation."""
    arms, metric = comparison_arms(results, name), results.study.compare[name].metric
    firsts = {t.arm: t for t in reversed(results.comparisons[name]) if t.state == "complete"}
    for i, arm in enumerate(arms):
        colour = colours.get(structure(firsts[arm.name], results.study), GREY)
        axes.scatter([i - 0.1] * len(arm.values), arm.values, color=colour, s=36, alpha=0.6)
        axes.errorbar([i + 0.1], [arm.mean], [arm.spread], color=colour, marker="D", ms=7, capsize=5, lw=1.8)
    sources = [firsts[arm.name].attributes.get("from_trial") for arm in arms]
    names = [arm.name + ("" if n is None else f"\ntrial {n}") for arm, n in zip(arms, sources, strict=True)]
    axes.set_xticks(range(len(arms)), names)
    axes.tick_params("x", rotation=0 if len(arms) < 6 else 60)
    axes.set_xlim(-0.5, len(arms) - 0.5)
    axes.set(xlabel=f"comparison {name!r}, fresh seeds", ylabel=f"{metric}, test; seeds, mean and deviation")


def _draw_curves(axes: Any, results: Results, lines: Sequence[Line], colours: dict[str, str]) -> None:
    """The metric on validation data against steps, for each structure at its best."""
    metric = results.study.best.by
    curves = [
        (line, [(row["step"], row[metric]) for row in t.curve if metric in row])
        for line in best_lines(results, lines)
        for t in line.trials
    ]
    _plot(axes, curves, colours)
    axes.set(xlabel="steps", ylabel=f"{metric}, validation")


def _draw_rates(axes: Any, results: Results, lines: Sequence[Line], colours: dict[str, str]) -> None:
    """The metric at the end against the learning rate, for each structure."""
    metric, rate = results.study.best.by, _rates(results.study)[0]
    for name, colour in reversed(colours.items()):
        same = sorted((s for s in lines if s.name == name), key=lambda s: s.setting.get(rate, 0))
        x = [s.setting.get(rate) for s in same]
        y, e = [fmean(s.values(metric)) for s in same], [deviation(s.values(metric)) for s in same]
        axes.errorbar(x, y, e, color=colour, marker="o", ms=4, capsize=3, lw=1.2)
    axes.set(xlabel="learning rate", ylabel=f"{metric}, test; mean and deviation over seeds", xscale="log")
    ticks = results.study.axes[rate].values or ()
    axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axes.minorticks_off()


def _draw_ages(axes: Any, results: Results, lines: Sequence[Line], colours: dict[str, str]) -> None:
    """Recall against the age of the binding, for each structure at its best."""
    _plot(axes, [(line, age_curve(t)) for line in best_lines(results, lines) for t in line.trials], colours)
    axes.set(xlabel="tokens since the binding", ylabel="recall, test")


def _plot(axes: Any, curves: Sequence[tuple[Line, list[tuple[float, float]]]], colours: dict[str, str]) -> None:
    """Curves in the colours of their structures, grey ones below."""
    for line, points in curves:
        if points:
            colour = colours[line.name]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, zorder=1 if colour == GREY else 2)


def _rates(study: StudyFile) -> list[str]:
    return [n for n, a in study.axes.items() if a.target == "train.learning_rate"]


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0

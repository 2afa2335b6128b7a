"""The figures of a report, each from plain results to inline SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from dspace.study.results import Record, Results
from dspace.study.schema import METRICS, StudyFile
from dspace.study.svg import Plot

COLOURS = 8


@dataclass(frozen=True)
class Group:
    """Trials that share their structural choices: one colour."""

    label: str
    css: str


def structure_of(record: Record, study: StudyFile) -> str:
    """The structural choices of a trial, in words."""
    open_axes = [
        name for name, axis in study.structural_axes.items() if name in study.axes or len(axis.choices or {}) > 1
    ]
    words = [str(record.params[name]).replace("_", " ") for name in open_axes if name in record.params]
    return " · ".join(words) or "the base spec"


def groups(results: Results) -> dict[str, Group]:
    """A colour for each structure, in the order of the best result; those beyond the palette share grey."""
    study = results.study
    sign = 1 if METRICS[study.best.by][0] == "maximize" else -1
    best: dict[str, float] = {}
    for t in results.trials:
        value = sign * t.metrics.get(study.best.by, -math.inf if t.state != "complete" else 0)
        label = structure_of(t, study)
        best[label] = max(best.get(label, -math.inf), value)
    order = sorted(best, key=lambda k: -best[k])
    return {label: Group(label, f"c{i}" if i < COLOURS else "cx") for i, label in enumerate(order)}


def tip(record: Record, study: StudyFile) -> str:
    """What hovering over a trial says."""
    numbers = [
        f"{k} = {v:.3g}" for k, v in record.params.items() if isinstance(v, float | int) and not isinstance(v, bool)
    ]
    metrics = [f"{k} {v:.4g}" for k, v in record.metrics.items()]
    return "\n".join([f"trial {record.number}: {structure_of(record, study)}", ", ".join(numbers), ", ".join(metrics)])


def front(results: Results, colours: Mapping[str, Group]) -> str:
    """Stability against plasticity; the area of a dot is the state's size, the line joins what nothing beats on both."""
    study = results.study
    shown = [t for t in results.trials if {"stability", "plasticity"} <= t.metrics.keys()]
    if not shown:
        return ""
    largest = max((t.metrics.get("state_bytes", 1) for t in shown), default=1) or 1
    xs, ys = [t.metrics["plasticity"] for t in shown], [t.metrics["stability"] for t in shown]
    plot = Plot(
        _range(xs),
        _range(ys),
        "plasticity: recall of re-bound keys",
        "stability: recall of the oldest bindings",
        height=420,
    )
    plot.title = "Stability against plasticity"
    points = [(t.metrics["plasticity"], t.metrics["stability"]) for t in shown]
    best = sorted(p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))
    plot.line(list(dict.fromkeys(best)), "frontline")
    on_front = set(results.front)
    for t in sorted(shown, key=lambda t: -t.metrics.get("state_bytes", 0)):
        radius = 4 + 9 * math.sqrt(t.metrics.get("state_bytes", largest) / largest)
        css = f"{colours[structure_of(t, study)].css} {'solid' if t.number in on_front else 'faint'}"
        plot.dot(t.metrics["plasticity"], t.metrics["stability"], radius, css, tip(t, study))
    if results.best is not None and results.best in shown:
        b = results.best
        radius = 4 + 9 * math.sqrt(b.metrics.get("state_bytes", largest) / largest)
        plot.dot(b.metrics["plasticity"], b.metrics["stability"], radius + 4, "ring")
        late = plot.px(b.metrics["plasticity"]) > plot.width * 0.75
        high = plot.py(b.metrics["stability"]) < plot.top + 40
        lift = radius + 20 if high else -(radius + 11)
        side = ("end", radius) if late else ("start", -radius)
        plot.text(b.metrics["plasticity"], b.metrics["stability"], f"winner, trial {b.number}", "note", *side, dy=lift)
    return plot.render()


def curves(results: Results, colours: Mapping[str, Group], metric: str) -> str:
    """The reported metric against steps: every trial a line, the winner's the strong one."""
    study = results.study
    shown = [t for t in results.trials if len(t.curve) > 1 and metric in t.curve[-1]]
    if not shown:
        return ""
    steps = max(row["step"] for t in shown for row in t.curve)
    values = [row[metric] for t in shown for row in t.curve if metric in row]
    plot = Plot((0, steps), _range(values), "training step", metric, height=340)
    winner = results.best.number if results.best else -1
    for t in sorted(shown, key=lambda t: (t.number == winner, t.state == "complete")):
        css = colours[structure_of(t, study)].css
        strength = "strong" if t.number == winner else "thin" if t.state == "complete" else "thin cut"
        points = [(row["step"], row[metric]) for row in t.curve if metric in row]
        plot.line(points, f"{css} {strength}", tip(t, study))
        if t.state == "pruned":
            plot.dot(*points[-1], 2.5, f"{css} faint", tip(t, study))
    return plot.render()


MIN_COUNT = 30
"""Bindings that a bin of ages must hold to be shown: fewer say nothing."""


def age_curve(record: Record) -> list[tuple[float, float]]:
    """(age in tokens, recall) of a trial, from the bins that it stored."""
    bins = record.attributes.get("recall_by_age") or {}
    edges, recall = bins.get("edges", []), bins.get("recall", [])
    count = bins.get("count", [MIN_COUNT] * len(recall))
    rows = zip(edges, edges[1:], recall, count, strict=False)
    return [((a + b) / 2, r) for a, b, r, n in rows if n >= MIN_COUNT]


def ages(results: Results, colours: Mapping[str, Group]) -> str:
    """Recall against the age of the binding, for the best trial of each structure."""
    study, sign = results.study, 1 if METRICS[results.study.best.by][0] == "maximize" else -1
    chosen: dict[str, Record] = {}
    for t in results.trials:
        label = structure_of(t, study)
        if t.state == "complete" and len(age_curve(t)) > 1:
            old = chosen.get(label)
            if old is None or sign * t.metrics.get(study.best.by, 0) > sign * old.metrics.get(study.best.by, 0):
                chosen[label] = t
    if not chosen:
        return ""
    points = {label: age_curve(t) for label, t in chosen.items()}
    xs = [x for p in points.values() for x, _ in p]
    ys = [y for p in points.values() for _, y in p]
    plot = Plot((0, max(xs) * 1.02), _range(ys), "age of the binding, tokens", "recall", height=340)
    for label, line in sorted(points.items(), key=lambda item: item[1][-1][1]):
        winner = results.best is not None and chosen[label].number == results.best.number
        plot.line(line, f"{colours[label].css} {'strong' if winner else 'medium'}", tip(chosen[label], study))
        for x, y in line:
            plot.dot(x, y, 3 if winner else 2.2, f"{colours[label].css} solid", f"{label}\nage {x:.0f}: recall {y:.3f}")
    return plot.render()


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison over its seeds."""

    name: str
    values: tuple[float, ...]
    state_bytes: float
    css: str = "c0"

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (0 for one seed)."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def comparison(arms: list[Arm], metric: str) -> str:
    """A row an arm: each seed a dot, the mean a stroke, one standard deviation a bar."""
    if not arms:
        return ""
    values = [v for arm in arms for v in (*arm.values, arm.mean - arm.spread, arm.mean + arm.spread)]
    left = min(40 + 7 * max(len(arm.name) for arm in arms), 240)
    plot = Plot(_range(values, clip=False), (0, len(arms)), f"{metric}, held-out test data", "", y_ticks=[])
    plot.left, plot.height, plot.title = left, 66 + 54 * len(arms), f"{metric} by arm and seed"
    for row, arm in enumerate(arms):
        y = len(arms) - row - 0.5
        plot.segment((arm.mean - arm.spread, y), (arm.mean + arm.spread, y), f"spread {arm.css}")
        plot.segment((arm.mean, y - 0.24), (arm.mean, y + 0.24), f"mean {arm.css}")
        for i, value in enumerate(arm.values):
            plot.dot(value, y, 5, f"{arm.css} solid", f"{arm.name}, seed {i + 1}: {value:.4f}")
        plot.text(plot.x[0], y, arm.name, "rowlabel", "end", dx=-12, dy=4)
    return plot.render()


def _range(values: list[float], clip: bool = True) -> tuple[float, float]:
    """A comfortable interval around the values; fractions stay within 0 and 1."""
    low, high = min(values), max(values)
    pad = max((high - low) * 0.08, 0.02 if high <= 1.5 else 1e-9)
    fraction = 0 <= low and high <= 1
    low, high = low - pad, high + pad
    if clip and fraction:
        return max(low, 0.0), min(high, 1.02)
    return low, high

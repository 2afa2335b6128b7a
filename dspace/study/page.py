"""The report: one HTML page that stands alone (no script, no font, no network), written from the storage."""

from __future__ import annotations

import html
import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dspace.errors import DspaceError
from dspace.study import figures
from dspace.study.figures import Arm, structure_of
from dspace.study.results import Record, Results, collect, open_home
from dspace.study.schema import METRICS
from dspace.study.storage import Home, storage_errors
from dspace.study.winner import model_settings, spec_text

TABLE_ROWS = 400
"""Trials shown in the table; beyond that the best ones."""


def report(
    name: str | Path,
    output: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    storage: str | None = None,
) -> Path:
    """Write the report of a study, finished or running, and return its path (``runs/NAME/report.html``)."""
    results = collect(open_home(name, folder, storage))
    path = Path(output) if output else results.home.report
    text = render(results)
    with storage_errors(Home(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


def render(results: Results) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html", "j2"], default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"metric": metric_text, "number": number_text, "duration": duration}
    return environment.get_template("report.html.j2").render(**content(results))


def content(results: Results) -> dict[str, Any]:
    """Everything that the template shows."""
    study, best = results.study, results.best
    colours = figures.groups(results)
    arms = {name: comparison_arms(results, name) for name in results.comparisons}
    metric = study.best.by
    reported = any(metric in t.curve[-1] for t in results.trials if t.curve)
    attributes = best.attributes if best else {}
    return {
        "study": study,
        "title": study.title or study.name,
        "best": best,
        "best_structure": structure_of(best, study) if best else "",
        "headline": headline(results),
        "counts": results.counts(),
        "groups": list(colours.values()),
        "front": figures.front(results, colours),
        "curves": figures.curves(results, colours, metric if reported else "train_loss"),
        "ages": figures.ages(results, colours),
        "importances": importance_rows(results),
        "importance_names": list(results.importances),
        "jobs": results.jobs,
        "objectives": [(name, METRICS[name][1], way) for name, way in study.objectives.items()],
        "comparisons": [
            {
                "name": name,
                "doc": study.compare[name].doc,
                "metric": study.compare[name].metric,
                "arms": arms[name],
                "figure": figures.comparison(arms[name], study.compare[name].metric),
                "verdict": verdict(arms[name], study.compare[name].metric, study.compare[name].arms),
                "seeds": study.compare[name].seeds,
            }
            for name in results.comparisons
            if arms[name]
        ],
        "metrics": list(dict.fromkeys([metric, *study.objectives, "tokens_per_second"])),
        "numbers": [name for name, axis in study.axes.items() if not axis.structural],
        "rows": table(results, colours),
        "more": max(len(results.trials) - TABLE_ROWS, 0),
        "winner": winner(results),
        "versions": attributes.get("versions", {}),
        "data_hash": attributes.get("data_hash", ""),
        "definition": results.home.definition.read_text(encoding="utf-8"),
        "folder": str(results.home.folder),
        "journal": str(results.home.journal),
        "written": time.strftime("%d %B %Y, %H:%M"),
        "hours": sum(t.seconds for t in results.trials) / 3600,
        "seconds": sum(t.seconds for t in results.trials),
        "structures": len({structure_of(t, study) for t in results.trials}),
    }


def comparison_arms(results: Results, name: str) -> list[Arm]:
    """The arms of a comparison with what was measured, on test data where the objective has it."""
    metric = results.study.compare[name].metric
    found = []
    for i, arm in enumerate(results.study.compare[name].names):
        trials = [t for t in results.comparisons[name] if t.arm == arm and t.state == "complete"]
        values = tuple(t.test.get(metric, t.metrics.get(metric, math.nan)) for t in trials)
        if values and all(math.isfinite(v) for v in values):
            found.append(Arm(arm, values, trials[0].metrics.get("state_bytes", 0.0), f"c{i % figures.COLOURS}"))
    return found


def verdict(arms: list[Arm], metric: str, named: Collection[str] = ()) -> str:
    """What a comparison says, with its doubt: the best arm against the second, then against each of the references.

    ``named``: the arms that the study file writes out; they are the references, all others were found by the search.
    """
    if len(arms) < 2:
        return ""
    sign = 1 if METRICS[metric][0] == "maximize" else -1
    first, second, *others = sorted(arms, key=lambda a: -sign * a.mean)
    sizes = [arm.state_bytes for arm in arms]
    size = f"at equal state ({bytes_text(first.state_bytes)})" if _same(sizes) else _unequal(first, second)
    scores = f"{_score(first)}, {_score(second)} over {_seeds(min(len(first.values), len(second.values)))}"
    said = [
        f"{size[0].upper()}{size[1:]}, {metric}: {scores}. "
        f"The difference of {abs(first.mean - second.mean):.3f} is {_trust(first, second)}."
    ]
    if first.name in named and any(arm.name not in named for arm in arms):
        said.append(
            f"{first.name}, which the study file names, is itself the best: no arm from the search has a better mean."
        )
    for arm in others:
        if arm.name in named:
            unequal = "" if _same([first.state_bytes, arm.state_bytes]) else f", {_unequal(first, arm)}"
            said.append(
                f"Against {_score(arm)} over {_seeds(len(arm.values))}, which the study file names{unequal}: "
                f"the difference of {first.name} is {first.mean - arm.mean:+.3f}, {_trust(first, arm)}."
            )
    return " ".join(said)


def _score(arm: Arm) -> str:
    return f"{arm.name} {arm.mean:.3f}" + (f" ± {arm.spread:.3f}" if len(arm.values) > 1 else "")


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _same(sizes: list[float]) -> bool:
    """Whether states are of one size: channels are whole numbers, so bytes are equal within those of one."""
    return max(sizes) <= 1.02 * min(sizes)


def _unequal(first: Arm, other: Arm) -> str:
    return f"with {bytes_text(first.state_bytes)} against {bytes_text(other.state_bytes)} of state (not equal)"


def _trust(first: Arm, other: Arm) -> str:
    """Whether the difference of two means can be told from chance."""
    n, m = len(first.values), len(other.values)
    if min(n, m) < 2:
        return "not to be judged: one seed has no spread"
    error = math.sqrt(first.spread**2 / n + other.spread**2 / m)
    if abs(first.mean - other.mean) > 2 * error:
        return f"more than twice its standard error of {error:.3f}"
    return f"within twice its standard error of {error:.3f}: no difference can be claimed"


def headline(results: Results) -> str:
    """The answer in one sentence."""
    best, study = results.best, results.study
    if best is None:
        return "No trial is complete yet."
    metric = study.best.by
    value = best.test.get(metric, best.metrics[metric])
    where = "held-out test data" if metric in best.test else "held-out data"
    amount = f"{100 * value:.1f} % {metric}" if 0 <= value <= 1 and metric != "loss" else f"{metric} {value:.4g}"
    state = best.metrics.get("state_bytes")
    size = f" with {bytes_text(state)} of state" if state else ""
    return f"{structure_of(best, study)} wins: {amount} on {where}{size}."


def importance_rows(results: Results) -> list[dict[str, Any]]:
    """An axis a row, an objective a column; shares in percent."""
    found = [
        axis for axis in results.study.every_axis if any(axis in shares for shares in results.importances.values())
    ]
    names = sorted(  # those that explain the same stay in the order of the study file
        found,
        key=lambda axis: -sum(shares.get(axis, 0) for shares in results.importances.values()),
    )
    return [
        {
            "axis": axis,
            "doc": results.study.every_axis[axis].doc,
            "shares": [100 * shares[axis] if axis in shares else None for shares in results.importances.values()],
        }
        for axis in names
    ]


def table(results: Results, colours: dict[str, figures.Group]) -> list[dict[str, Any]]:
    """Rows of the table of trials, best first, then pruned, then the others."""
    study, sign = results.study, 1 if METRICS[results.study.best.by][0] == "maximize" else -1
    order = {"complete": 0, "pruned": 1}

    def rank(t: Record) -> tuple[int, float]:
        return order.get(t.state, 2), -sign * t.metrics.get(study.best.by, 0.0)

    front = set(results.front)
    return [
        {
            "t": t,
            "css": colours[structure_of(t, study)].css,
            "structure": structure_of(t, study),
            "front": t.number in front,
            "best": results.best is not None and t.number == results.best.number,
            "note": t.attributes.get("pruned") or str(t.attributes.get("failure", "")).split("\n")[0],
            "hash": str(t.attributes.get("spec_hash", ""))[:8],
        }
        for t in sorted(results.trials, key=rank)[:TABLE_ROWS]
    ]


def winner(results: Results) -> dict[str, Any]:
    """The winning spec: formulas, TOML, how to use it. Says what is missing instead of failing."""
    if results.best is None:
        return {}
    from dspace.study.space import identifier

    name = identifier(f"{results.study.name}_best")
    try:
        from dspace.math import analyse
        from dspace.spec import loads
        from dspace.study import formulas
        from dspace.study.atlas import atlas

        text = spec_text(results, results.best, name)
        spec = loads(text)
        analysis = analyse(spec)
    except DspaceError as error:
        return {"problem": str(error)}
    arguments = [*spec.inputs, *spec.parameters]
    kind = analysis.classification
    return {
        "atlas": atlas(analysis),
        "name": name,
        "toml": text,
        "hash": spec.hash,
        "formulas": [(doc, line) for doc, line in formulas.recurrence(analysis)],
        "letter": kind.letter,
        "class": kind.name,
        "reason": kind.reason,
        "layer": list(spec.layer.items()),
        "parameters": [(k, v.doc, v.init) for k, v in spec.parameters.items()],
        "inputs": [(k, v.axes, v.domain, v.doc) for k, v in spec.inputs.items()],
        "arguments": ", ".join(arguments),
        "model": [f"{k}={v!r}" for k, v in model_settings(results, results.best).items()],
        "vocab_size": results.study.task.sizes.get("vocab_size"),
    }


def metric_text(value: float | None, name: str) -> str:
    """A metric as people write it."""
    if value is None:
        return ""
    if name == "state_bytes":
        return bytes_text(value)
    if name == "gpu_ms":
        return f"{value:.3g} ms"
    if name == "tokens_per_second":
        return f"{value / 1000:.0f}k" if value >= 1000 else f"{value:.0f}"
    return f"{value:.3f}"


def bytes_text(value: float) -> str:
    if value >= 1 << 20:
        return f"{value / (1 << 20):.3g} MiB"
    if value >= 1 << 10:
        return f"{value / (1 << 10):.3g} KiB"
    return f"{value:.0f} B"


def number_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.3g}"
    return html.unescape(str(value))


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"

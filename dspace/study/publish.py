"""A study's results for the repository: the raw numbers as JSON, a table as Markdown, a figure as PNG."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dspace.errors import UserError
from dspace.study.page import comparison_arms, importance_rows, verdict
from dspace.study.picture import deviation, draw
from dspace.study.results import (
    Line,
    Record,
    Results,
    best_lines,
    collect,
    lines_of,
    open_home,
    structure,
)
from dspace.study.storage import Home, storage_errors

KEPT = ("seed", "train_seconds", "device", "engine", "stacked", "spec_name", "spec_hash", "data_hash", "parameters")


def publish(
    name: str | Path,
    output: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    storage: str | None = None,
    command: str = "",
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into ``output`` (``studies/results``) and return their paths.

    Raises UserError for a study without a completed trial.
    """
    results = collect(open_home(name, folder, storage))
    lines = lines_of(results)
    if not lines:
        raise UserError(f"study {results.study.name!r} has no completed trial yet\n  cure: dspace study run")
    place = Path(output) if output else Path("studies") / "results"
    command = command or f"dspace study run studies/{results.study.name}.toml"
    paths = [place / f"{results.study.name}.{kind}" for kind in ("json", "md", "png")]
    with storage_errors(Home(place)):
        place.mkdir(parents=True, exist_ok=True)
        _write(paths[0], json.dumps(raw(results, command), indent=1, sort_keys=True) + "\n")
        _write(paths[1], table(results, lines, command))
        draw(results, lines, paths[2])
    return paths


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def versions_of(results: Results) -> dict[str, str]:
    """What the numbers depend on besides the study file: all that trials noted, in their order, " and " between."""
    found: dict[str, dict[str, None]] = {}
    for trial in [*results.trials, *(t for trials in results.comparisons.values() for t in trials)]:
        if trial.state in ("complete", "pruned"):
            for key, value in trial.attributes.get("versions", {}).items():
                found.setdefault(key, {})[value] = None
    return {key: " and ".join(values) for key, values in found.items()}


def raw(results: Results, command: str) -> dict[str, Any]:
    """Every finished trial with its curve, as plain data."""
    study = results.study
    return {
        "study": study.model_dump(mode="json", exclude_defaults=True),
        "command": command,
        "versions": versions_of(results),
        "trials": _finished(results.trials),
        **({"front": results.front} if len(study.objectives) > 1 else {}),
        "importances": results.importances,
        **({"comparisons": {n: _finished(found) for n, found in results.comparisons.items()}} if study.compare else {}),
    }


def _finished(trials: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "number": t.number,
            "state": t.state,
            "params": t.params,
            "metrics": t.metrics,
            "test": t.test,
            "seconds": round(t.seconds, 1),
            "curve": t.curve,
            "recall_by_age": t.attributes.get("recall_by_age"),
            **({"arm": t.arm} if t.arm else {}),
            **{k: t.attributes[k] for k in KEPT if k in t.attributes},
            **{k: v for k, v in t.attributes.get("versions", {}).items() if k in ("commit", "machine")},
            **({"note": t.attributes["pruned"]} if "pruned" in t.attributes else {}),
        }
        for t in trials
        if t.state in ("complete", "pruned")
    ]


def table(results: Results, lines: Sequence[Line], command: str) -> str:
    """The page of the results: what was run, each structure at its best, differences with their doubt, all settings."""
    study, metric = results.study, results.study.best.by
    best = best_lines(results, lines)
    versions = versions_of(results)
    stated = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("machine", "commit"))
    counts = ", ".join(f"{n} {state}" for state, n in results.counts().items())
    sections = [*compared(results), *front(results), *importances(results)]
    text = [
        f"# {study.title or study.name}",
        "",
        study.doc,
        "",
        f"`{command}`, commit {versions.get('commit', 'unknown')}, on {versions.get('machine', 'an unknown machine')}; "
        f"{stated}. Trials: {counts}.",
        "",
        *sections,
        *(["## Structures", ""] if sections else []),
        f"Each structure at its best setting (chosen on validation data), {metric} on test data: mean and standard "
        "deviation over seeds.",
        "",
        f"| structure | {metric} | seeds | setting | state bytes | tokens/s | minutes a trial |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in best:
        first = line.trials[0]
        seconds = [t.attributes.get("train_seconds", t.seconds) / t.attributes.get("stacked", 1) for t in line.trials]
        text.append(
            f"| {line.name} | {_spread(line.values(metric))} | {len(line.trials)} | {_setting(line.setting)} "
            f"| {first.metrics.get('state_bytes', 0):.0f} | {fmean(line.values('tokens_per_second', False)):.3g} "
            f"| {fmean(seconds) / 60:.2f} |"
        )
    if len(best) > 1 and max(len(line.trials) for line in best) > 1:  # of one seed each nothing can be said
        text += ["", f"Differences of {best[0].name} to the others, over the seeds that both have:", ""]
        text += [f"- {difference(best[0], other, metric)}" for other in best[1:]]
    text += [
        "",
        f"All settings, {metric} on test data:",
        "",
        "| structure | setting | mean | seeds |",
        "|---|---|---|---|",
    ]
    text += [
        f"| {line.name} | {_setting(line.setting)} | {_spread(line.values(metric))} "
        f"| {', '.join(f'{v:.4f}' for v in line.values(metric))} |"
        for line in lines
    ]
    return "\n".join(text) + f"\n\n![accuracy and recall]({study.name}.png)\n"


def compared(results: Results) -> list[str]:
    """Of each comparison: what it asks, its arms with every seed, and what can be said of their difference."""
    text = []
    for name in results.comparisons:
        asked, arms = results.study.compare[name], comparison_arms(results, name)
        if not arms:
            continue
        trials = {t.arm: t for t in results.comparisons[name] if t.state == "complete"}
        text += [
            f"## Comparison {name!r}",
            "",
            f"{asked.doc} {asked.metric} on test data, mean and standard deviation over seeds.",
            "",
            f"| arm | {asked.metric} | seeds | state bytes | expected ms | structure and setting |",
            "|---|---|---|---|---|---|",
        ]
        for arm in arms:
            first = trials[arm.name]
            cost = first.metrics.get("gpu_ms")
            setting = {k: v for k, v in first.params.items() if k not in ("arm", "repeat")}
            text.append(
                f"| {arm.name} | {_spread(arm.values)} | {', '.join(f'{v:.4f}' for v in arm.values)} | {arm.state_bytes:.0f} "
                f"| {'' if cost is None else f'{cost:.4f}'} | {_setting(setting)} |"
            )
        text += ["", verdict(arms, asked.metric, asked.arms), ""]
    return text


def front(results: Results) -> list[str]:
    """The trials that no other dominates, where there are several objectives."""
    study = results.study
    if len(study.objectives) < 2:
        return []
    chosen = [t for t in results.trials if t.number in results.front]
    first, way = next(iter(study.objectives.items()))
    chosen.sort(key=lambda t: t.metrics[first], reverse=way == "maximize")
    text = [
        "## The front",
        "",
        "The trials of the search that no other is at least as good as in everything; objectives on validation data.",
        "",
        f"| trial | {' | '.join(study.objectives)} | structure | setting |",
        f"|---|{'---|' * len(study.objectives)}---|---|",
    ]
    for t in chosen:
        numbers = {n: v for n, v in t.params.items() if n not in study.structural_axes}
        values = " | ".join(f"{t.metrics[n]:.4g}" for n in study.objectives)
        text.append(f"| {t.number} | {values} | {structure(t, study)} | {_setting(numbers)} |")
    return [*text, ""]


def importances(results: Results) -> list[str]:
    """What each axis explains alone of each objective."""
    rows = importance_rows(results)
    if not rows:
        return []
    names = list(results.importances)
    text = [
        "## What matters",
        "",
        "Percent of the variation over trials that an axis explains alone (adjusted R squared).",
        "",
        f"| axis | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for row in rows:
        text.append(f"| {row['axis']} | {' | '.join('' if s is None else f'{s:.0f}' for s in row['shares'])} |")
    return [*text, ""]


def difference(mine: Line, other: Line, metric: str) -> str:
    """How far ``mine`` is above ``other``, paired by seed, and whether that can be told from chance."""
    theirs = dict(zip(other.seeds, other.values(metric), strict=True))
    pairs = [v - theirs[s] for s, v in zip(mine.seeds, mine.values(metric), strict=True) if s in theirs]
    if not pairs:
        pairs = [fmean(mine.values(metric)) - fmean(other.values(metric))]
    if len(pairs) < 2:
        return f"{other.name}: {pairs[0]:+.4f} (one seed: its spread is not known)"
    error = deviation(pairs) / math.sqrt(len(pairs))
    sure = "more than" if abs(fmean(pairs)) > 2 * error else "within"
    return f"{other.name}: {fmean(pairs):+.4f} ± {error:.4f} (standard error, {len(pairs)} seeds; {sure} twice it)"


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in setting.items()) or "as it is"


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f} ± {deviation(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"

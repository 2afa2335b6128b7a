"""A finished (or running) study as plain data, for the report, the export and the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from dspace.errors import UserError
from dspace.study.phase import Phase, best_of, params_of, retries
from dspace.study.reading import load, nearest
from dspace.study.schema import METRICS, SEED, Axis, StudyFile
from dspace.study.storage import Home, connect, home_of


class NoTrialsYet(UserError):
    """The study was begun, and stopped before its first trial."""


@dataclass(frozen=True)
class Record:
    """One trial."""

    number: int
    state: str
    params: dict[str, Any]
    metrics: dict[str, float]
    attributes: dict[str, Any]
    seconds: float

    @property
    def test(self) -> dict[str, float]:
        return self.attributes.get("test", {})

    @property
    def curve(self) -> list[dict[str, float]]:
        return self.attributes.get("curve", [])

    @property
    def arm(self) -> str:
        return str(self.params.get("arm", self.attributes.get("arm", "")))


@dataclass
class Results:
    """Everything that a report shows."""

    home: Home
    study: StudyFile
    root: Path
    trials: list[Record]
    comparisons: dict[str, list[Record]]
    best: Record | None
    jobs: int = 1
    importances: dict[str, dict[str, float]] = field(default_factory=dict)
    """Objective -> axis -> share of the variation that it explains alone."""
    front: list[int] = field(default_factory=list)
    """Numbers of the trials that no other dominates in the study's objectives."""

    def counts(self) -> dict[str, int]:
        states = [t.state for t in self.trials]
        return {state: states.count(state) for state in dict.fromkeys(states)}


def open_home(name: str | Path, folder: str | Path | None = None, storage: str | None = None) -> Home:
    """The home of a study that was run: by name, by folder, or by its study file."""
    given = Path(name)
    if folder is None and (given / "study.toml").is_file():
        return Home(given, storage or load(given / "study.toml").storage)
    stem = load(given).name if given.suffix == ".toml" and given.is_file() else str(name)
    home = home_of(stem, folder, storage)
    if not home.definition.is_file():
        known = sorted(p.parent.name for p in Path("runs").glob("*/study.toml"))
        there = f"; here are {', '.join(known)}" if known else "; none was run in this folder yet"
        if folder is not None:
            raise UserError(
                f"no study was run with --dir {folder}: there is no {home.definition}\n"
                f"  cure: give --dir as `dspace study run` was given it, or leave it away{there}"
            )
        near = nearest(stem, known)
        hint = f"\n  did you mean {near!r}?" if near else ""
        raise UserError(
            f"no study {stem!r} was run in {home.folder.parent}{hint}\n  cure: dspace study run {stem}, or --dir{there}"
        )
    return Home(home.folder, storage or load(home.definition).storage)


def collect(home: Home) -> Results:
    """Read a study from its storage. Raises StorageError and UserError."""
    import optuna

    study = load(home.definition)
    storage = connect(home)
    known = {s.study_name for s in storage.get_all_studies()}
    if study.name not in known:
        raise NoTrialsYet(f"{home.folder}: the study has no trials yet\n  cure: dspace study run {home.definition}")
    search = optuna.load_study(study_name=study.name, storage=storage)
    found = search.get_trials(deepcopy=False)
    comparisons = {}
    for name in study.compare:
        phase = Phase(study, name)
        if phase.name in known:
            twin_study = optuna.load_study(study_name=phase.name, storage=storage)
            comparisons[name] = _records(twin_study.get_trials(deepcopy=False))
    best = best_of(found, study.best.by)
    results = Results(
        home,
        study,
        Path(search.user_attrs.get("root", ".")),
        _records(found),
        comparisons,
        next((r for r in _records(found) if best is not None and r.number == best.number), None),
        int(search.user_attrs.get("jobs", 1)),
    )
    results.front = pareto(results.trials, study)
    results.importances = importances(results.trials, study)
    return results


def _records(trials: list[Any]) -> list[Record]:
    """Trials by number, without attempts that another trial repeats."""
    repeated = retries(trials)
    records = []
    for t in trials:
        if t.number in repeated:
            continue
        ended, began = t.datetime_complete, t.datetime_start
        seconds = (ended - began).total_seconds() if ended and began else 0.0
        params = params_of(t)
        if "fixed" in t.user_attrs:
            params = {**t.user_attrs["fixed"], **params}
        metrics = t.user_attrs.get("metrics", {}) if t.state.name == "COMPLETE" else {}
        records.append(Record(t.number, t.state.name.lower(), dict(params), metrics, dict(t.user_attrs), seconds))
    return records


def pareto(trials: list[Record], study: StudyFile, objectives: Sequence[str] = ()) -> list[int]:
    """Completed trials that no other dominates in these objectives (in all of the study where none is named)."""
    signs = {n: 1 if study.objectives[n] == "maximize" else -1 for n in objectives or study.objectives}
    points = [(t.number, [s * t.metrics[n] for n, s in signs.items()]) for t in trials if t.state == "complete"]

    def dominated(mine: list[float]) -> bool:
        return any(all(o >= m for o, m in zip(other, mine, strict=True)) and other != mine for _, other in points)

    return [number for number, values in points if not dominated(values)]


def importances(trials: list[Record], study: StudyFile) -> dict[str, dict[str, float]]:
    """Objective -> axis -> share of the variation that the axis explains alone (adjusted R squared, 0 to 1).

    Choices and values are groups; a number is cut into three groups of equal size. An axis that exists only under
    some choices is judged among the trials that have it. Pruned trials count with their last report.
    """
    found: dict[str, dict[str, float]] = {}
    for metric in dict.fromkeys([study.best.by, *study.objectives]):
        seen = [(t.params, t.metrics.get(metric, (t.curve or [{}])[-1].get(metric))) for t in trials]
        shares = {
            name: share
            for name, axis in study.every_axis.items()
            if (share := _explained([(p[name], y) for p, y in seen if name in p and y is not None], _numeric(axis)))
            is not None
        }
        if shares:
            found[metric] = shares
    return found


def _numeric(axis: Axis) -> bool:
    return axis.choices is None and axis.values is None


def _explained(pairs: list[tuple[Any, float]], numeric: bool) -> float | None:
    """Adjusted R squared of the groups' means; None where there is too little to say.

    Sums are exact: those of ``sum`` differ from Python 3.11 to 3.12, and results are kept with all their digits.
    """
    groups: dict[Any, list[float]] = {}
    for i, (x, y) in enumerate(sorted(pairs, key=lambda p: p[0] if numeric else str(p[0]))):
        groups.setdefault(3 * i // len(pairs) if numeric else x, []).append(y)
    n, k = len(pairs), len(groups)
    if k < 2 or n - k < 2:
        return None
    mean = math.fsum(y for _, y in pairs) / n
    total = math.fsum((y - mean) ** 2 for _, y in pairs)
    if total <= 1e-12 * (1 + mean * mean):
        return None
    rest = math.fsum((y - math.fsum(g) / len(g)) ** 2 for g in groups.values() for y in g)
    return max(1 - (rest / (n - k)) / (total / (n - 1)), 0.0)


@dataclass(frozen=True)
class Line:
    """The trials of one structure at one setting of its numbers: they differ in their seed only."""

    name: str
    setting: dict[str, Any]
    trials: tuple[Record, ...]

    def values(self, metric: str, test: bool = True) -> list[float]:
        """The metric of each seed, on the data that no choice was made with (``test``) or on the other."""
        return [t.test.get(metric, t.metrics[metric]) if test else t.metrics[metric] for t in self.trials]

    @property
    def seeds(self) -> list[Any]:
        return [t.attributes.get("seed") for t in self.trials]


def lines_of(results: Results) -> list[Line]:
    """All lines, structures in the order of the study file."""
    study = results.study
    seeds = {n for n, a in study.axes.items() if a.target == SEED}
    found: dict[tuple[str, str], list[Record]] = {}
    for t in results.trials:
        if t.state == "complete":
            numbers = {n: v for n, v in t.params.items() if n not in seeds and n not in study.structural_axes}
            found.setdefault((structure(t, study), json.dumps(numbers, sort_keys=True)), []).append(t)
    return [Line(name, json.loads(numbers), tuple(trials)) for (name, numbers), trials in found.items()]


def structure(record: Record, study: StudyFile) -> str:
    """The structural choices of a trial in one word."""
    return "-".join(str(record.params[n]) for n in study.structural_axes if n in record.params) or study.base


def best_lines(results: Results, lines: Sequence[Line]) -> list[Line]:
    """The best line of each structure, chosen on the data that the search sees."""
    metric = results.study.best.by
    sign = 1 if METRICS[metric][0] == "maximize" else -1
    best: dict[str, Line] = {}
    for line in lines:
        known = best.get(line.name)
        if known is None or sign * fmean(line.values(metric, False)) > sign * fmean(known.values(metric, False)):
            best[line.name] = line
    return list(best.values())

"""Study file (TOML) -> :class:`StudyFile`, with every problem of the file reported at once and in its place."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dspace.errors import Problem, StudyError, UserError
from dspace.spec.positions import Positions
from dspace.study.schema import METRICS, SEED, Axis, ModelTable, Patch, StudyFile, TrainTable

MAX_BYTES = 1_000_000


class _Report:
    """Collects problems, each with the line of the file where it stands."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.positions = Positions(text)
        self.problems: list[Problem] = []
        self.left_out: list[tuple[str, ...]] = []
        """Keys that are wrong by themselves, reported and read no further: what follows from them is no news."""

    def follows(self, path: tuple[str, ...]) -> bool:
        """Whether what is wrong at ``path`` may come from a key that was left out."""
        tables = [(key[:-1] or key) for key in self.left_out]
        if any(path[: len(table)] == table for table in tables):
            return True
        named = any(table[0] in ("axes", "space") for table in tables)  # whose choices are named elsewhere
        return named and (path[0] == "compare" or "when" in path)

    def add(self, message: str, *path: str, suggestion: str = "", cure: str = "", on_value: bool = False) -> None:
        if self.follows(path):
            return
        place = None
        for length in range(len(path), 0, -1):  # the nearest enclosing table that the file writes down
            here = tuple(path[:length])
            value_place = self.positions.character(here, 1) if on_value and length == len(path) else None
            place = value_place or self.positions.key(here)
            if place:
                break
        line, column = place or (0, 0)
        source = self.positions.line_text(line) if line else ""
        self.problems.append(Problem(message, self.file, line, column, ".".join(path), suggestion, cure, source[:200]))

    def in_order(self) -> list[Problem]:
        """The problems in the order of the file."""
        return sorted(self.problems, key=lambda p: (p.line, p.column))


def load(source: str | Path, root: Path | None = None) -> StudyFile:
    """Read a study file, or a shipped one by name. Raises StudyError with all its problems.

    Specs that it names by path are looked for where ``root`` says where paths start (a copy of the file does not know).
    """
    path = find(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}\n  cure: check the path and its permissions") from None
    if len(data) > MAX_BYTES:
        raise StudyError([Problem(f"the file has {len(data)} bytes, at most {MAX_BYTES} are read", str(path))])
    try:
        return loads(data.decode("utf-8"), str(path), root)
    except UnicodeDecodeError as error:
        raise StudyError([Problem(f"not UTF-8 at byte {error.start}", str(path), cure="save it as UTF-8")]) from None


def find(source: str | Path) -> Path:
    """The path of a study file: as given, or one shipped in ``studies/`` by its name."""
    path = Path(source)
    if path.is_file():
        return path
    package = Path(__file__).resolve().parent.parent
    shipped = [p for d in (package.parent / "studies", package / "_studies") for p in sorted(d.glob("*.toml"))]
    for candidate in shipped:
        if candidate.stem == str(source):
            return candidate
    names = [p.stem for p in shipped]
    near = nearest(Path(source).stem, names)
    hint = f"\n  did you mean {near!r}?" if near else ""
    raise UserError(f"there is no study file {str(source)!r}{hint}\n  cure: give a path, or one of {', '.join(names)}")


def loads(text: str, file: str = "<study>", root: Path | None = None) -> StudyFile:
    """Read a study from text. Raises StudyError with all its problems."""
    text = text.replace("\r\n", "\n")
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StudyError([_toml_problem(error, text, file)]) from None
    report = _Report(text, file)
    study = _validate(raw, report)
    if study is not None:
        _check(study, report, root)
    if study is None or report.problems:
        raise StudyError(report.in_order())
    return study


def _validate(raw: dict[str, Any], report: _Report) -> StudyFile | None:
    """The study as far as its keys and types are right, so that the rest is checked too; None if too little is left."""
    try:
        return StudyFile.model_validate(raw)
    except ValidationError as error:
        wrong = error.errors()
    left_out = []
    for item in wrong:
        instead = _pydantic_problem(item, report)
        gone = _leave_out(raw, tuple(item["loc"]), instead)
        left_out += [] if instead else [gone]
    report.left_out = left_out
    try:
        return StudyFile.model_validate(raw)
    except ValidationError:
        return None


def _leave_out(tables: dict[str, Any], path: tuple[Any, ...], instead: str) -> tuple[str, ...]:
    """Remove the key at ``path``, or the nearest above it that the file has; ``instead`` is what it was to be called."""
    trail: list[tuple[dict[str, Any], Any]] = []
    here: Any = tables
    for part in path:
        if not isinstance(here, dict) or part not in here:
            break
        trail.append((here, part))
        here = here[part]
    if trail:
        table, key = trail[-1]
        value = table.pop(key)
        if instead:
            table.setdefault(instead, value)
    return tuple(map(str, path[: max(len(trail), 1)]))


def nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else ""


def _toml_problem(error: Exception, text: str, file: str) -> Problem:
    match = re.search(r"(.*?) \(at line (\d+), column (\d+)\)", str(error))
    if not match:
        return Problem(f"not TOML: {error}", file, cure="see https://toml.io for the format")
    line, column = int(match[2]), int(match[3])
    lines = text.split("\n")
    source = lines[line - 1] if line <= len(lines) else ""
    return Problem(f"not TOML: {match[1]}", file, line, column, source=source[:200])


def _fields_at(path: tuple[str, ...]) -> list[str]:
    """Names that the table at ``path`` may hold."""
    model: Any = StudyFile
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            info = model.model_fields.get(part)
            model = info.annotation if info else None
        else:  # a dict of tables, keyed by a name of the user's
            model = next((a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if model is not None and not isinstance(model, type):
            inner = [a for a in get_args(model) if a is not type(None)]
            model = inner[0] if len(inner) == 1 else model
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _pydantic_problem(item: Any, report: _Report) -> str:
    """Report it; returns the name that a mistyped key was to be."""
    path = tuple(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        meant = nearest(path[-1], known)
        cure = f"remove it, or use one of {', '.join(known)}"
        report.add(f"unknown key {path[-1]!r}", *path, suggestion=meant, cure=cure)
        return meant
    if item["type"] == "missing":
        report.add(f"{path[-1]!r} is missing", *path, cure=f"add {path[-1]} = ... here")
    else:
        value = item.get("input")
        shown = f", not {value!r}" if isinstance(value, (str, int, float, bool)) else ""
        known = re.findall(r"'([^']+)'", item["msg"]) if item["type"] == "literal_error" else []
        message = item["msg"][0].lower() + item["msg"][1:] + shown
        report.add(message, *path, suggestion=nearest(str(value), known), on_value=True)
    return ""


def _check(study: StudyFile, report: _Report, root: Path | None) -> None:
    """What types alone cannot say: names that refer to each other, intervals, targets, the task's own rules."""
    _check_space(study, report)
    _check_bases(study, report, root)
    for name in study.objectives:
        if name == "gpu_ms" and study.cost is None:
            report.add("gpu_ms needs to know the GPU", "objectives", name, cure='[cost]\n  gpu = "H100"')
        if name not in METRICS:
            _unknown(report, "objective", name, METRICS, "objectives", name)
    if not study.objectives:
        report.add("a study needs at least one objective", "objectives", cure='accuracy = "maximize"')
    for metric, path in [(study.best.by, ("best", "by"))] + (
        [(study.prune.on, ("prune", "on"))] if study.prune else []
    ):
        if metric not in METRICS:
            _unknown(report, "metric", metric, METRICS, *path)
    for metric, limit in study.constraints.items():
        if metric not in METRICS:
            _unknown(report, "metric", metric, METRICS, "constraints", metric)
        if limit.most is None and limit.least is None:
            report.add("a constraint needs a bound", "constraints", metric, cure="{ most = 4096 }")
    for name, axis in study.axes.items():
        _check_axis(study, name, axis, report)
        if study.sampler.kind == "grid" and study.space is None and not (axis.choices or axis.values):
            report.add(f"a grid cannot run all of {name!r}: it is continuous", "axes", name, cure="values = [...]")
    for name, comparison in study.compare.items():
        if comparison.metric not in METRICS:
            _unknown(report, "metric", comparison.metric, METRICS, "compare", name, "metric")
        if len(comparison.names) < 2:
            report.add("a comparison needs at least two arms", "compare", name, "arms")
        for arm, fixed in comparison.arms.items():
            _check_choices(study, {k: [v] for k, v in fixed.items()}, report, "compare", name, "arms", arm)
    _check_task(study, report)


def _check_space(study: StudyFile, report: _Report) -> None:
    """A base or the space, not both; choices and axes that exist; a GPU that is known."""
    if study.space is not None and study.sampler.kind == "grid":
        report.add("the space is no grid: not all its combinations are points", "sampler", "kind", cure='kind = "tpe"')
    from dspace.math.roofline import GPUS, find_gpu
    from dspace.space.points import AXES

    if study.space is None and not study.base:
        report.add("'base' is missing", "base", cure="add base = ... here, or a [space] to walk through")
    if study.space is not None and study.base:
        report.add("a study has a base or a [space], not both", "base", cure="remove one of them")
    if study.space is not None:
        for axis, known in AXES.items():
            for choice in getattr(study.space, axis) or []:
                if choice not in known:
                    _unknown(report, f"choice of the axis {axis!r}:", choice, known, "space", axis)
            if getattr(study.space, axis) == []:
                report.add("no choice is allowed", "space", axis, cure=f"some of {', '.join(known)}, or leave it out")
        for axis in study.axes.keys() & AXES.keys():
            report.add(f"{axis!r} is an axis of the space already", "axes", axis, cure="give it another name")
    if study.cost is not None:
        try:
            find_gpu(study.cost.gpu)
        except UserError:
            _unknown(report, "GPU", study.cost.gpu, GPUS, "cost", "gpu")


def _check_bases(study: StudyFile, report: _Report, root: Path | None) -> None:
    """Base specs and transforms that exist, of the study and of each choice."""
    from dspace.spec.library import builtin_names

    patches: dict[tuple[str, ...], Patch] = {
        ("axes", name, "choices", choice): patch
        for name, axis in study.axes.items()
        for choice, patch in (axis.choices or {}).items()
    }
    bases: dict[tuple[str, ...], str | None] = {("base",): study.base}
    bases.update({(*path, "base"): patch.base for path, patch in patches.items()})
    for path, base in bases.items():
        if not base or Path(base).is_file():
            continue
        if base.endswith(".toml") or Path(base).name != base:
            if root is not None and not (root / base).is_file():
                report.add(f"there is no spec file {base!r}", *path, cure=f"a path from {root} on", on_value=True)
        elif base not in builtin_names():
            _unknown(report, "base spec", base, builtin_names(), *path)
    for path, patch in patches.items():
        if patch.transform is None:
            continue
        from dspace.spec.transforms import TRANSFORMS  # SymPy loads with it

        if patch.transform not in TRANSFORMS:
            _unknown(report, "transform", patch.transform, TRANSFORMS, *path, "transform")


def _unknown(report: _Report, what: str, name: str, known: Iterable[str], *path: str) -> None:
    known = list(known)
    cure = f"use one of {', '.join(known)}" if known else "there is none to use"
    report.add(f"unknown {what} {name!r}", *path, suggestion=nearest(name, known), cure=cure, on_value=path[-1] != name)


def _check_choices(study: StudyFile, wanted: dict[str, list[str]], report: _Report, *path: str) -> None:
    for axis, choices in wanted.items():
        if axis not in study.structural_axes:
            _unknown(report, "structural axis", axis, study.structural_axes, *path, axis)
            continue
        known = study.structural_axes[axis].choices or {}
        for choice in choices:
            if choice not in known:
                _unknown(report, f"choice of the axis {axis!r}:", choice, known, *path, axis)


def _check_axis(study: StudyFile, name: str, axis: Axis, report: _Report) -> None:
    path = ("axes", name)
    kinds = [axis.choices is not None, axis.values is not None, axis.low is not None or axis.high is not None]
    if sum(kinds) != 1:
        report.add("an axis has either choices, or values, or low and high", *path, cure="low = 1e-3\n  high = 1e-2")
        return
    others = {k: v for k, v in axis.when.items() if k != name}
    if len(others) != len(axis.when):
        report.add("an axis cannot depend on itself", *path, "when")
    _check_choices(study, others, report, *path, "when")
    if axis.structural:
        if not axis.choices:
            report.add("a structural axis needs at least one choice", *path)
        for choice, patch in (axis.choices or {}).items():
            for table, fields in (("model", ModelTable.model_fields), ("train", TrainTable.model_fields)):
                for key in getattr(patch, table):
                    if key not in fields:
                        _unknown(report, f"key of [{table}]", key, fields, *path, "choices", choice, table, key)
        return
    if axis.values is not None and not axis.values:
        report.add("values is empty", *path, "values")
    if axis.values is None:
        if axis.low is None or axis.high is None:
            report.add("both low and high are needed", *path)
        elif axis.low > axis.high:
            report.add(f"low = {axis.low} is above high = {axis.high}", *path, "low")
        elif axis.log and axis.low <= 0:
            report.add("a logarithmic axis needs low > 0", *path, "low")
    if axis.template is not None and "{value}" not in axis.template:
        report.add("the template has no {value} in it", *path, "template", on_value=True)
    if axis.target == SEED:
        if axis.values is None or any(isinstance(v, bool) or not isinstance(v, int) for v in axis.values):
            report.add("an axis of seeds needs whole numbers", *path, cure="values = [0, 1, 2]")
        return
    target = (axis.target or "").split(".")
    tables: dict[str, Iterable[str]] = {"model": ModelTable.model_fields, "train": TrainTable.model_fields}
    if target[0] in tables:
        starts = target[:2] == ["model", "init"] and len(target) == 3
        if not starts and (len(target) != 2 or target[1] not in tables[target[0]]):
            _unknown(report, f"key of [{target[0]}]", ".".join(target[1:]), tables[target[0]], *path, "target")
    elif target[0] != "spec" or len(target) < 3:
        report.add(
            "where the value goes is not said" if axis.target is None else f"unknown target {axis.target!r}",
            *path,
            "target",
            cure='target = "train.learning_rate", "model.expand_v" or "spec.TABLE.KEY"',
            on_value=True,
        )


def _check_task(study: StudyFile, report: _Report) -> None:
    from dspace.tasks import TASKS

    task = TASKS.get(study.task.name)
    if task is None:
        _unknown(report, "task", study.task.name, TASKS, "task", "name")
        return
    for key in study.task.sizes:
        if key not in task.sizes:
            _unknown(report, f"size of the task {task.name!r}:", key, task.sizes, "task", key)
    sizes = {k: v for k, v in study.task.sizes.items() if k in task.sizes}
    try:
        task.check(**{**task.sizes, **sizes})
    except UserError as error:
        report.add(str(error).strip(), "task")
    except TypeError as error:
        report.add(f"a size has the wrong type: {error}", "task")

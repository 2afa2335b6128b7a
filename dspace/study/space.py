"""A point of the space: choices and numbers -> one composed spec, one model, one training."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from dspace.errors import DspaceError, UserError
from dspace.study.schema import POINT, SEED, Axis, ModelTable, Scalar, StudyFile, TrainTable

if TYPE_CHECKING:
    import optuna

    from dspace.spec import Spec

USUAL = {
    "structure": "key_value",
    "evidence": "energy",
    "forgetting": "token",
    "target": "prior",
    "prior_precision": "head",
    "prior_mean": "zero",
    "correction": "none",
    "readout": "mean",
}
"""The choice on each axis of the space that a study does not search."""

Params = Mapping[str, Scalar]
"""Axis name -> choice (structural) or value (numerical): what Optuna stores as a trial's parameters."""


class NotAVariant(UserError):
    """These choices on the axes of the space do not go together."""


@dataclass(frozen=True)
class Point:
    """One composed point; ``spec`` is a plain dict that ``dspace.spec.from_dict`` accepts."""

    params: dict[str, Scalar]
    spec: dict[str, Any]
    model: ModelTable
    train: TrainTable
    task: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Equal for two points that would train the same thing (names and words do not count)."""
        spec = {k: v for k, v in self.spec.items() if k not in ("name", "title", "references", "doc")}
        content = [spec, self.model.model_dump(), self.train.model_dump(), self.task]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def build(self) -> Spec:
        """The validated spec. Raises SpecError when the patches do not fit together."""
        from dspace.spec import from_dict

        return from_dict(self.spec, name=self.spec["name"], prune=True)


def exists(axis: Axis, params: Params) -> bool:
    """Whether the axis exists beside the choices made so far."""
    return all(params.get(other) in choices for other, choices in axis.when.items())


def ordered(study: StudyFile) -> Iterator[tuple[str, Axis]]:
    """Axes such that each comes after those that its ``when`` names."""
    left = dict(study.axes)
    while left:
        ready = [name for name, axis in left.items() if not any(other in left for other in axis.when)]
        if not ready:
            raise UserError(f"the axes {', '.join(left)} depend on each other in a circle\n  cure: remove a `when`")
        for name in ready:
            yield name, left.pop(name)


def suggest(study: StudyFile, trial: optuna.Trial) -> dict[str, Scalar]:
    """Ask Optuna for a value on every axis that exists."""
    params: dict[str, Scalar] = {}
    for name, axis in ordered(study):
        if not exists(axis, params):
            continue
        if axis.choices is not None:
            params[name] = trial.suggest_categorical(name, list(axis.choices))
        elif axis.values is not None:
            params[name] = cast(Scalar, trial.suggest_categorical(name, list(axis.values)))
        elif axis.integer:
            params[name] = trial.suggest_int(name, int(axis.low or 0), int(axis.high or 0), log=axis.log)
        else:
            params[name] = trial.suggest_float(name, float(axis.low or 0), float(axis.high or 0), log=axis.log)
    return params


def middle(study: StudyFile, choices: Params) -> dict[str, Scalar]:
    """The point with these choices and every number in the middle of its axis."""
    params: dict[str, Scalar] = {}
    for name, axis in ordered(study):
        if not exists(axis, params):
            continue
        if axis.choices is not None:
            params[name] = choices.get(name, next(iter(axis.choices)))
        elif axis.values is not None:
            params[name] = axis.values[len(axis.values) // 2]
        else:
            low, high = float(axis.low or 0), float(axis.high or 0)
            value = (low * high) ** 0.5 if axis.log else (low + high) / 2
            params[name] = round(value) if axis.integer else value
    return params


def holds(axis: Axis, value: Scalar) -> bool:
    """Whether the axis has this value."""
    if axis.choices is not None:
        return str(value) in axis.choices
    if axis.values is not None:
        return value in axis.values
    return isinstance(value, int | float) and float(axis.low or 0) <= value <= float(axis.high or 0)


def seed_of(study: StudyFile, params: Params) -> int | None:
    """The value on the axis that seeds the trial, if there is one."""
    return next((int(params[n]) for n, a in study.axes.items() if a.target == SEED and n in params), None)


def grid(study: StudyFile) -> list[dict[str, Scalar]]:
    """Every combination of choices and values that can occur: seed by seed, then structure by structure."""
    found: list[dict[str, Scalar]] = [{}]

    def place(item: tuple[str, Axis]) -> int:
        if item[1].target == SEED and not item[1].when:
            return 0
        return 2 if item[0] in study.free_axes else 1

    for name, axis in sorted(ordered(study), key=place):
        values: list[Scalar] = list(axis.choices) if axis.choices is not None else list(axis.values or [])
        found = [{**p, name: v} for p in found for v in values if exists(axis, p)] + [
            p for p in found if not exists(axis, p)
        ]
    return found


def structures(study: StudyFile, limit: int = 256) -> list[dict[str, str]]:
    """Every combination of structural choices that can occur (at most ``limit``)."""
    found: list[dict[str, str]] = [{}]
    for name, axis in ordered(study):
        if axis.choices is None:
            continue
        grown = (
            {**so_far, name: choice} if exists(axis, so_far) else so_far
            for so_far in found
            for choice in (axis.choices if exists(axis, so_far) else [""])
        )
        found = list(itertools.islice(grown, limit))
    return found


class Composer:
    """Composes points of one study; base specs are read once. ``root`` is where relative paths start."""

    def __init__(self, study: StudyFile, root: Path | None = None) -> None:
        self.study = study
        self.root = root or Path()
        self._bases: dict[tuple[str, str | None], dict[str, Any]] = {}

    def base(self, name: str, transform: str | None) -> dict[str, Any]:
        """Tables of a base spec after its transform, as a plain dict of the caller's own."""
        if (name, transform) not in self._bases:
            from dspace.spec import from_dict, load

            path = self.root / name
            source: str = str(path) if name.endswith(".toml") and path.is_file() else name
            spec = load(source)
            if transform:
                spec = from_dict({"name": spec.name, "extends": source, "transform": transform}, name=spec.name)
            self._bases[name, transform] = tomllib.loads(spec.to_toml())
        return copy.deepcopy(self._bases[name, transform])

    def point(self, params: Params) -> dict[str, Any] | None:
        """Tables of the composed point of :mod:`dspace.space`, where the study searches it. Raises NotAVariant."""
        targets = {n: a.target or "" for n, a in self.study.axes.items()}
        chosen = {
            t.removeprefix(POINT): str(params[n]) for n, t in targets.items() if t.startswith(POINT) and n in params
        }
        if not chosen:
            return None
        from dspace.space import Point as SpacePoint
        from dspace.space import coincides, compose, why_not

        point = SpacePoint(**(USUAL | chosen))
        point = coincides(point) or point  # one spelling of the same mathematics
        reason = why_not(point)
        if reason:
            raise NotAVariant(f"{point} is not a variant: {reason}\n  cure: another choice on one of these axes")
        key = (str(point), None)
        if key not in self._bases:
            self._bases[key] = tomllib.loads(compose(point).to_toml())
        return copy.deepcopy(self._bases[key])

    def compose(self, params: Params) -> Point:
        """The point of these parameters. Raises UserError when its pieces do not fit."""
        study, base, transform = self.study, self.study.base, None
        patches = []
        for name, axis in ordered(study):
            if axis.choices is not None and name in params:
                patch = axis.choices[str(params[name])]
                base, transform = patch.base or base, patch.transform or transform
                patches.append(patch)
        spec = self.point(params) or self.base(base, transform)
        model, train = study.model.model_dump(), study.train.model_dump()
        for patch in patches:
            merge(spec, patch.spec)
            merge(model, patch.model)
            train.update(patch.train)
        for name, axis in study.axes.items():
            placed = axis.structural or axis.target == SEED or (axis.target or "").startswith(POINT)
            if not placed and name in params:
                _place(axis, params[name], {"spec": spec, "model": model, "train": train}, name)
        choices = [str(params[name]) for name in study.named_axes if name in params]
        spec["name"] = identifier("_".join([study.name, *choices]))
        spec["title"] = f"{study.title or study.name}: {', '.join(choices) or spec.get('title', '')}"
        task = {"name": study.task.name, **study.task.sizes}
        if any((a.target or "").startswith(POINT) for a in study.axes.values()):
            task["point"] = True
        seed = seed_of(study, params)
        if seed is not None:
            task["trial_seed"] = seed  # two points that differ in it only are not the same training
        try:
            return Point(dict(params), spec, ModelTable(**model), TrainTable(**train), task)
        except ValidationError as error:
            text = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"{', '.join(choices)}: the composed model or training is wrong: {text}") from None

    def check(self) -> int:
        """Build every structural combination once, before any work is spent; returns how many there are."""
        combinations = structures(self.study)
        for choices in combinations:
            try:
                self.compose(middle(self.study, choices)).build()
            except NotAVariant:
                continue  # of the space not all combinations are; the search finds its way
            except DspaceError as error:
                named = ", ".join(f"{k} = {v}" for k, v in choices.items()) or "the base spec"
                raise UserError(f"study {self.study.name!r}, {named}: the composed spec is wrong\n{error}") from None
        return len(combinations)


def merge(into: dict[str, Any], patch: Mapping[str, Any]) -> None:
    """Lay ``patch`` over ``into``, table by table; the value ``false`` removes what stands there."""
    for key, value in patch.items():
        if value is False:
            into.pop(key, None)
        elif isinstance(value, Mapping):
            here = into.get(key)
            into[key] = here if isinstance(here, dict) else {}
            merge(into[key], value)
        else:
            into[key] = value


def identifier(text: str) -> str:
    """A valid name of a spec: a letter, then letters, digits and underscores."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()
    return name if name[:1].isalpha() else f"s_{name}"


def _place(axis: Axis, value: Scalar, tables: dict[str, Any], name: str) -> None:
    """Put a number where its axis says."""
    *path, last = (axis.target or "").split(".")
    table: Any = tables
    for part in path:
        if not isinstance(table.get(part), dict):
            where = " and ".join(f'"{k}"' for k in table)
            raise UserError(
                f"axes.{name}.target: there is no {part!r} in the composed spec (there is {where or 'nothing'})\n"
                "  cure: change the target, or limit the axis with `when` to the choices that have it"
            )
        table = table[part]
    number: Any = float(f"{value:.6g}") if isinstance(value, float) else value
    table[last] = axis.template.replace("{value}", f"{number!r}") if axis.template else number

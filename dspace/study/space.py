"""A point of the space: choices and numbers -> one composed spec, one model, one training."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from dspace.errors import DspaceError, UserError
from dspace.study.schema import SEED, Axis, ModelTable, Scalar, StudyFile, TrainTable

if TYPE_CHECKING:
    import optuna

    from dspace.spec import Spec
    from dspace.study.cost import Cost
    from dspace.study.walk import Walk

Params = Mapping[str, Scalar]
"""Axis name -> choice (structural) or value (numerical): what Optuna stores as a trial's parameters."""


@dataclass(frozen=True)
class Point:
    """One composed point; ``spec`` is a plain dict that ``dspace.spec.from_dict`` accepts."""

    params: dict[str, Scalar]
    spec: dict[str, Any]
    model: ModelTable
    train: TrainTable
    task: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """Equal for two points that would train the same thing: spelling and names of the spec do not count."""
        from dspace.study.identity import spec_identity

        model = self.model.model_dump()
        starts = model.pop("init")
        content = [spec_identity(self.build(), starts), model, self.train.model_dump(), self.task]
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
    left = dict(study.every_axis)
    while left:
        ready = [name for name, axis in left.items() if not any(other in left for other in axis.when)]
        if not ready:
            raise UserError(f"the axes {', '.join(left)} depend on each other in a circle\n  cure: remove a `when`")
        for name in ready:
            yield name, left.pop(name)


def suggest(study: StudyFile, trial: optuna.Trial, walk: Walk | None = None) -> dict[str, Scalar]:
    """Ask Optuna for a value on every axis that exists; ``walk`` says which points a study of the space may visit."""
    params: dict[str, Scalar] = walk.suggest(trial) if walk is not None else {}
    for name, axis in ordered(study):
        if name in params or not exists(axis, params):
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


def structures(study: StudyFile, limit: int = 256, walk: Walk | None = None) -> list[dict[str, str]]:
    """Every combination of structural choices that can occur (at most ``limit``)."""
    found: list[dict[str, str]] = [{}]
    if walk is not None:
        # Every point of the space composes: a few of them, spread over it, try the patches.
        step = max(len(walk.points) // 8, 1)
        found = [{k: str(v) for k, v in asdict(p).items()} for p in walk.points[::step]]
    for name, axis in ordered(study):
        if axis.choices is None or any(name in choices for choices in found):
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

    def compose(self, params: Params) -> Point:
        """The point of these parameters. Raises UserError when its pieces do not fit."""
        study, base, transform = self.study, self.study.base, None
        patches = []
        point = self.space_spec(params)
        for name, axis in ordered(study):
            if axis.choices is not None and name in params:
                patch = axis.choices[str(params[name])]
                base, transform = patch.base or base, patch.transform or transform
                patches.append(patch)
        spec = self.base(base, transform) if point is None else point
        model, train = study.model.model_dump(), study.train.model_dump()
        for patch in patches:
            merge(spec, patch.spec)
            merge(model, patch.model)
            train.update(patch.train)
        for name, axis in study.every_axis.items():
            if not axis.structural and name in params and axis.target != SEED:
                _place(axis, params[name], {"spec": spec, "model": model, "train": train}, name)
        choices = [str(params[name]) for name in study.structural_axes if name in params]
        spec["name"] = identifier("_".join([study.name, *choices]))[:64].rstrip("_")
        spec["title"] = f"{study.title or study.name}: {', '.join(choices) or spec.get('title', '')}"
        task = {"name": study.task.name, **study.task.sizes}
        seed = seed_of(study, params)
        if seed is not None:
            task["trial_seed"] = seed  # two points that differ in it only are not the same training
        try:
            return Point(dict(params), spec, ModelTable(**model), TrainTable(**train), task)
        except ValidationError as error:
            text = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"{', '.join(choices)}: the composed model or training is wrong: {text}") from None

    @cached_property
    def walk(self) -> Walk | None:
        """The points that a study of the space may visit; None for a study of a base."""
        from dspace.study.walk import walk_of

        return walk_of(self.study) if self.study.space is not None else None

    def suggest(self, trial: optuna.Trial) -> dict[str, Scalar]:
        """Ask Optuna for a point."""
        return suggest(self.study, trial, self.walk)

    def space_spec(self, params: Params) -> dict[str, Any] | None:
        """Tables of the point of the space that ``params`` name; None where the study has a base."""
        from dspace.space.composing import compose
        from dspace.study.walk import point_of

        point = point_of(params) if self.study.space is not None else None
        return None if point is None else tomllib.loads(compose(point).to_toml())

    def cost(self, point: Point) -> Cost | None:
        """What the point costs on the GPU of ``[cost]``; None without one."""
        if self.study.cost is None:
            return None
        from dspace.math import analyse
        from dspace.math.roofline import costs_of
        from dspace.study.cost import expected

        if point.model.mixer != "spec":
            return None
        analysis = analyse(point.build())
        return expected(
            costs_of(analysis), self.study.cost, fitted(point.model, [s.axes for s in analysis.recurrence.states])
        )

    def check(self) -> int:
        """Build every structural combination once, before any work is spent; returns how many there are."""
        combinations = structures(self.study, walk=self.walk)
        for choices in combinations:
            try:
                self.compose(middle(self.study, choices)).build()
            except DspaceError as error:
                named = ", ".join(f"{k} = {v}" for k, v in choices.items()) or "the base spec"
                raise UserError(f"study {self.study.name!r}, {named}: the composed spec is wrong\n{error}") from None
        self._check_arms()
        self._check_cost(combinations)
        return len(combinations)

    def _check_arms(self) -> None:
        for name, comparison in self.study.compare.items():
            for arm, fixed in comparison.arms.items():
                if self.walk is not None and self.walk.parameters(fixed) is None:
                    raise UserError(
                        f"study {self.study.name!r}: no point of its space is the arm {arm!r} of the comparison {name!r}\n"
                        "  cure: other choices for the arm, or more in [space]"
                    )

    def _check_cost(self, combinations: list[dict[str, str]]) -> None:
        from dspace.study.cost import refusal

        table = self.study.cost
        if table is None or self.walk is not None or (table.max_ms is None and table.max_state_bytes is None):
            return
        reasons = []
        for choices in combinations:
            cost = self.cost(self.compose(middle(self.study, choices)))
            reason = refusal(table, cost) if cost is not None else ""
            if not reason:
                return
            reasons.append(reason)
        raise UserError(
            f"study {self.study.name!r}: every structure costs more than [cost] allows, such as {reasons[0]}\n"
            "  cure: raise the limits, or make the model smaller"
        )


def fitted(model: ModelTable, state_axes: Sequence[str]) -> ModelTable:
    """The model with as many value channels as ``state_per_head`` holds, for states on these axes.

    Raises UserError where it holds none.
    """
    if model.state_per_head is None:
        return model
    keys = model.head_dim or model.hidden_size // model.num_heads

    def numbers(values: int) -> int:
        return sum(math.prod({"k": keys, "v": values}[axis] for axis in axes) for axes in state_axes)

    fitting = [values for values in range(1, 257) if numbers(values) <= model.state_per_head]
    if not fitting:
        raise UserError(
            f"state_per_head = {model.state_per_head} holds no value channel beside {keys} key channels\n"
            "  cure: more of it, or a smaller head_dim"
        )
    return model.model_copy(update={"expand_v": (fitting[-1] + 0.5) / keys})  # rounded down by the layer


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

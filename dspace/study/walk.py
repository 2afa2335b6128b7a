"""A study over the structural space: which points it may visit, and how a trial walks to one of them.

A trial chooses axis by axis among the choices with which some point can still be reached, so that it never ends at a
combination that is no variant, nor at a second spelling of one: the points are those of the catalogue, pairwise
inequivalent, that the study's restrictions and its limits on cost leave. An axis whose choices are fewer after what
was chosen before is a variable of its own to the sampler.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dspace.errors import UserError
from dspace.space.points import AXES, Point
from dspace.study.cost import expected, refusal
from dspace.study.schema import Scalar, StudyFile

if TYPE_CHECKING:
    import optuna

    from dspace.space.catalogue import Entry


class Walk:
    """The points that a study may visit."""

    def __init__(self, study: StudyFile, entries: Sequence[Entry]) -> None:
        self.study = study
        self.points = tuple(e.point for e in entries)
        self._choices = [{axis: str(choice) for axis, choice in asdict(p).items()} for p in self.points]

    def suggest(self, trial: optuna.Trial) -> dict[str, Scalar]:
        """A point, chosen axis by axis by the study's sampler; every axis by its name."""
        chosen: dict[str, Scalar] = {}
        left = self._choices
        for axis in AXES:
            options = _options(left, axis)
            choice = options[0] if len(options) == 1 else trial.suggest_categorical(self._name(axis, options), options)
            chosen[axis] = choice
            left = [c for c in left if c[axis] == choice]
        return chosen

    def parameters(self, choices: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the sampler must be told for a trial to end at a point with ``choices``; None if there is none.

        Choices of other axes than the space's are kept as they are.
        """
        wanted = {axis: str(c) for axis, c in choices.items() if axis in AXES}
        matching = [c for c in self._choices if all(c[axis] == choice for axis, choice in wanted.items())]
        if not matching:
            return None
        at = random.Random(f"{self.study.seed} {sorted(wanted.items())}").choice(matching)
        told = {k: v for k, v in choices.items() if k not in AXES}
        left = self._choices
        for axis in AXES:
            options = _options(left, axis)
            if len(options) > 1:
                told[self._name(axis, options)] = at[axis]
            left = [c for c in left if c[axis] == at[axis]]
        return told

    def _name(self, axis: str, options: list[str]) -> str:
        """The sampler's name of an axis: its own where all choices of the study are open."""
        return axis if options == _options(self._choices, axis) else f"{axis}:{'|'.join(options)}"


def _options(choices: list[dict[str, str]], axis: str) -> list[str]:
    present = {c[axis] for c in choices}
    return [choice for choice in AXES[axis] if choice in present]


def walk_of(study: StudyFile) -> Walk:
    """The walk of a study with a ``[space]``. Raises UserError where no point is left."""
    from dspace.runtime.cache import default_dir
    from dspace.space.catalogue import candidates, load_or_build

    assert study.space is not None
    allowed = {axis: set(getattr(study.space, axis) or choices) for axis, choices in AXES.items()}
    within = [p for p in candidates() if all(getattr(p, axis) in allowed[axis] for axis in AXES)]
    if not within:
        told = ", ".join(
            f"{axis} in {sorted(choices)}" for axis, choices in allowed.items() if choices != {*AXES[axis]}
        )
        raise UserError(f"study {study.name!r}: no point of the space has {told}\n  cure: allow more in [space]")
    every = len(within) == len(candidates())
    found = load_or_build(default_dir(), points=None if every else within).entries
    if study.cost is None:
        return Walk(study, found)
    kept, least = [], ""
    for e in found:
        reason = refusal(study.cost, expected(e.costs, study.cost, study.model))
        if not reason:
            kept.append(e)
        least = least or f"{e.point}: {reason}"
    if not kept:
        raise UserError(
            f"study {study.name!r}: all {len(found)} points cost more than [cost] allows, such as {least}\n"
            "  cure: raise the limits, or make the model smaller"
        )
    return Walk(study, kept)


def point_of(choices: Mapping[str, Any]) -> Point | None:
    """The point of the space that a trial's choices name, or None where they name none."""
    return Point(**{axis: str(choices[axis]) for axis in AXES}) if all(axis in choices for axis in AXES) else None

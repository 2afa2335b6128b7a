"""Which trials are made: the first points of a search, those of a grid, and the arms of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspace.study.ledger import claim, open_study
from dspace.study.phase import Phase, best_of, params_of
from dspace.study.results import collect, open_home
from dspace.study.schema import METRICS, StudyFile
from dspace.study.space import grid, holds
from dspace.study.storage import Home

if TYPE_CHECKING:
    import optuna

    from dspace.study.change import Waiting
    from dspace.study.walk import Walk


def first_points(study: StudyFile, warm: Sequence[Mapping[str, Any]] = (), walk: Walk | None = None) -> list[Waiting]:
    """What is tried before the sampler chooses: parameters that are fixed, and attributes.

    All of a grid; else each choice of each structural axis and each arm of a comparison as often as it asks for, then
    the points of earlier studies. ``walk`` turns choices on the axes of the space into a point that has them; choices
    without one are left out.
    """
    if study.sampler.kind == "grid":
        return [(dict(point), {"grid": i}) for i, point in enumerate(grid(study)[: study.budget.trials])]
    arms = [(dict(arm), c.tries) for c in study.compare.values() for arm in c.arms.values()]
    wanted = [arm for i in range(max((tries for _, tries in arms), default=0)) for arm, tries in arms if i < tries]
    for name, axis in study.structural_axes.items():
        wanted += [{name: choice} for choice in axis.choices or {} if not any(w.get(name) == choice for w in wanted)]
    told = [(choices, {"cover": True}) for choices in wanted] + [(dict(p), {"warm": True}) for p in warm]
    points = [(c if walk is None else walk.parameters(c), attributes) for c, attributes in told]
    return [(c, attributes) for c, attributes in points if c is not None][: study.budget.trials]


def warm_points(study: StudyFile, root: Path) -> list[dict[str, Any]]:
    """The best points of the studies that ``warm`` names, as far as this study's axes can hold them.

    Raises UserError for a study that is not there.
    """
    if study.warm is None:
        return []
    sign = 1 if METRICS[study.best.by][0] == "maximize" else -1
    found: list[dict[str, Any]] = []
    for folder in study.warm.studies:
        path = Path(folder) if Path(folder).is_absolute() or Path(folder).exists() else root / folder
        trials = [t for t in collect(open_home(path)).trials if study.best.by in t.metrics]
        for t in sorted(trials, key=lambda t: -sign * t.metrics[study.best.by])[: study.warm.best]:
            point = {
                n: t.params[n] for n, axis in study.every_axis.items() if n in t.params and holds(axis, t.params[n])
            }
            if point and point not in found:
                found.append(point)
    return found


def enqueue_cover(home: Home, phase: Phase, optuna_study: optuna.Study, first: Sequence[Waiting] | None = None) -> None:
    """Enqueue the first points of a study that has no trial yet, and what a grid that has grown is short of."""
    with claim(home):
        trials = optuna_study.get_trials(deepcopy=False)
        there = {t.user_attrs.get("grid") for t in trials}
        if trials and phase.study.sampler.kind != "grid":
            return
        for choices, attributes in first_points(phase.study) if first is None else first:
            if attributes.get("grid") is None or attributes["grid"] not in there:
                optuna_study.enqueue_trial(choices, user_attrs=attributes)


def enqueue_comparison(home: Home, phase: Phase, storage: Any, search: optuna.Study) -> list[str]:
    """Enqueue every (arm, repeat) of a comparison with the best numbers that the search found for the arm.

    Returns the arms for which the search has no completed trial: they cannot be compared.
    """
    assert phase.comparison is not None
    comparison = phase.study.compare[phase.comparison]
    optuna_study = open_study(phase, storage)
    missing: list[str] = []
    with claim(home):
        existing = optuna_study.get_trials(deepcopy=False)
        found = search.get_trials(deepcopy=False)
        chosen = {arm: best_of(found, comparison.metric, fixed) for arm, fixed in comparison.arms.items()}
        chosen |= {f"top{i + 1}": None for i in range(comparison.top)}
        known_arms = {t.user_attrs["arm"]: t.user_attrs["from_trial"] for t in existing if "from_trial" in t.user_attrs}
        for i, trial in enumerate(top_structures(phase.study, found, comparison.metric, comparison.top)):
            chosen[f"top{i + 1}"] = trial
        for arm, trial in chosen.items():
            if arm in known_arms:  # arms do not change while they are compared
                trial = next((t for t in found if t.number == known_arms[arm]), trial)
            if trial is None:
                missing.append(arm)
                continue
            for repeat in range(comparison.seeds):
                if any(t.user_attrs.get("arm") == arm and t.user_attrs.get("repeat") == repeat for t in existing):
                    continue
                attributes = {"arm": arm, "repeat": repeat, "params": params_of(trial), "from_trial": trial.number}
                optuna_study.enqueue_trial({"arm": arm, "repeat": repeat}, user_attrs=attributes)
    return missing


def top_structures(study: StudyFile, trials: list[Any], metric: str, count: int) -> list[Any]:
    """The best trial of each of the ``count`` best structures."""
    names = set(study.structural_axes)
    found: dict[Any, Any] = {}
    left = list(trials)
    while len(found) < count and (trial := best_of(left, metric)) is not None:
        found.setdefault(tuple(sorted((k, v) for k, v in params_of(trial).items() if k in names)), trial)
        left = [t for t in left if t.number != trial.number]
    return list(found.values())

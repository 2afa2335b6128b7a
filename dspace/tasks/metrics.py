"""Metrics of recall. A prediction is one token per question, in the columns of :class:`~dspace.tasks.base.Batch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspace.errors import UserError
from dspace.tasks.base import Batch

Bools = NDArray[np.bool_]


def correct(batch: Batch, predictions: ArrayLike) -> Bools:
    """Which questions were answered rightly, ``[N, D]``. Raises UserError for predictions of another shape."""
    answers = np.asarray(predictions)
    if answers.shape != batch.targets.shape:
        raise UserError(
            f"predictions of shape {answers.shape} do not answer questions of shape {batch.targets.shape}\n"
            "  cure: pass one token per labelled position (argmax of the logits at batch.positions)"
        )
    return np.asarray(answers == batch.targets)


def accuracy(batch: Batch, predictions: ArrayLike) -> float:
    """Mean over examples of the fraction of an example's questions that were answered rightly."""
    return _mean(correct(batch, predictions).mean(axis=1))


def stability(batch: Batch, predictions: ArrayLike) -> float:
    """Recall of the oldest quarter of the bindings (the live ones, re-bound keys left out)."""
    return _mean(correct(batch, predictions)[oldest_quarter(batch)])


def plasticity(batch: Batch, predictions: ArrayLike) -> float:
    """Recall of the keys that were bound again; NaN where the task re-binds nothing."""
    return _mean(correct(batch, predictions)[batch.rebound])


def intrusion(batch: Batch, predictions: ArrayLike) -> float:
    """How often a re-bound key was answered with its stale value; NaN where the task re-binds nothing."""
    return _mean((np.asarray(predictions) == batch.stale)[batch.rebound])


def oldest_quarter(batch: Batch) -> Bools:
    """Questions on the oldest quarter (rounded up) of an example's live bindings, re-bound keys left out."""
    return (batch.order < -(-batch.num_questions // 4)) & ~batch.rebound


@dataclass(frozen=True)
class AgeCurve:
    """Recall by age: ``recall[i]`` over the ``count[i]`` questions with ``edges[i] <= age < edges[i + 1]``."""

    edges: tuple[float, ...]
    recall: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def centres(self) -> tuple[float, ...]:
        return tuple((a + b) / 2 for a, b in zip(self.edges, self.edges[1:], strict=False))

    def as_dict(self) -> dict[str, list[float] | list[int]]:
        """Plain lists for JSON; bins without questions are left out by :func:`recall_by_age`."""
        return {"edges": list(self.edges), "recall": list(self.recall), "count": list(self.count)}


def recall_by_age(batch: Batch, predictions: ArrayLike, bins: int = 16) -> AgeCurve:
    """Recall as a function of age (tokens between binding and query), in at most ``bins`` bins of equal width.

    Neighbouring bins are merged until each holds a question, so no value is undefined.
    """
    right = correct(batch, predictions).ravel()
    ages = np.asarray(batch.ages).ravel()
    if ages.size == 0:
        return AgeCurve((0.0, 1.0), (float("nan"),), (0,))
    low, high = int(ages.min()), int(ages.max()) + 1
    edges = np.linspace(low, high, min(max(bins, 1), high - low) + 1)
    which = np.clip(np.searchsorted(edges, ages, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(which, minlength=len(edges) - 1)
    hits = np.bincount(which, weights=right, minlength=len(edges) - 1)
    filled = count > 0  # bin 0 always is: it holds the youngest question
    kept = [float(e) for e in edges[:-1][filled]] + [float(edges[-1])]
    return AgeCurve(tuple(kept), tuple(map(float, hits[filled] / count[filled])), tuple(map(int, count[filled])))


def evaluate(batch: Batch, predictions: ArrayLike) -> dict[str, Any]:
    """All scalar metrics that the batch defines, by name (those that would be NaN are left out)."""
    functions = {"accuracy": accuracy, "stability": stability, "plasticity": plasticity, "intrusion": intrusion}
    values = {name: function(batch, predictions) for name, function in functions.items()}
    return {name: value for name, value in values.items() if value == value}


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else float("nan")

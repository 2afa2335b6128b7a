"""What a task is: a batch of labelled sequences, and a description that study files can name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspace.errors import UserError

IGNORE = -100
"""The label of a position that asks nothing; loss and metrics skip it."""

Seed = int | Sequence[int]
Rule = tuple[bool, str, str]
"""``(holds, rule, cure)``: what sizes must satisfy, and what to do where they do not."""
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Batch:
    """``N`` sequences of length ``L`` that each ask the same number ``D`` of questions.

    Questions are stored compactly, one column each; column ``i`` asks for key ``i`` of the example, in the
    order in which the keys are first bound. ``labels`` and the other dense views are derived on demand.
    """

    task: str
    vocab_size: int
    settings: Mapping[str, Any]
    """The sizes and the seed that made this batch."""
    inputs: Ints
    """Tokens, int32 ``[N, L]``."""
    positions: Ints
    """Where each question stands (the position of the query token), int32 ``[N, D]``."""
    targets: Ints
    """The token to be predicted there, int32 ``[N, D]``."""
    ages: Ints
    """Tokens between the key of the live binding and the query, int32 ``[N, D]``."""
    order: Ints
    """Rank of the live binding among those of its example, 0 the oldest, int32 ``[N, D]``."""
    rebound: NDArray[np.bool_]
    """Whether the key had another value before, bool ``[N, D]``."""
    stale: Ints
    """The value that a re-bound key had before, -1 for the others, int32 ``[N, D]``."""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return int(self.inputs.shape[1])

    @property
    def num_questions(self) -> int:
        """Labelled positions per sequence."""
        return int(self.positions.shape[1])

    def _dense(self, values: Ints, empty: int) -> Ints:
        full = np.full(self.inputs.shape, empty, dtype=values.dtype)
        np.put_along_axis(full, self.positions, values, axis=1)
        return full

    @cached_property
    def labels(self) -> Ints:
        """Dense targets int64 ``[N, L]``, ``-100`` where nothing is asked."""
        return self._dense(self.targets.astype(np.int64), IGNORE)

    @cached_property
    def dense_ages(self) -> Ints:
        """Ages on the grid of ``inputs``, int32 ``[N, L]``, -1 where nothing is asked."""
        return self._dense(self.ages, -1)

    @cached_property
    def hash(self) -> str:
        """sha256 hex of the content (tokens, questions and marks), the same on every machine."""
        digest = hashlib.sha256(f"{self.task}:{self.vocab_size}".encode())
        for array in (self.inputs, self.positions, self.targets, self.ages, self.order, self.rebound, self.stale):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array, dtype="<i4").data)
        return digest.hexdigest()

    def __getitem__(self, rows: slice | Ints) -> Batch:
        """The chosen examples; a slice is a view, an index array a copy."""
        return Batch(
            self.task,
            self.vocab_size,
            self.settings,
            self.inputs[rows],
            self.positions[rows],
            self.targets[rows],
            self.ages[rows],
            self.order[rows],
            self.rebound[rows],
            self.stale[rows],
        )


def asked_once(
    task: str,
    vocab_size: int,
    settings: Mapping[str, Any],
    inputs: Ints,
    positions: Ints,
    targets: Ints,
    places: Ints,
) -> Batch:
    """A batch whose bindings never change: column ``i`` asks for the ``i``-th from the start.

    ``positions``: where each question stands, ``places``: where its key was bound (or its token stood), both
    ``[N, D]``; ``places`` may be ``[D]``, the same for every example.
    """
    return Batch(
        task=task,
        vocab_size=vocab_size,
        settings=settings,
        inputs=inputs,
        positions=positions.astype(np.int32),
        targets=targets,
        ages=(positions - places).astype(np.int32),
        order=np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape),
        rebound=np.zeros(targets.shape, dtype=bool),
        stale=np.full(targets.shape, -1, dtype=np.int32),
    )


@dataclass(frozen=True)
class Task:
    """A task by name: how to make it, how to check its sizes, and what its numbers mean.

    ``make(num_examples=..., seed=..., **sizes)`` returns a :class:`Batch`; ``check(**sizes)`` raises
    :class:`~dspace.errors.UserError` for sizes that cannot be, without making anything. ``sizes`` are the
    settings that a study may give or search, with their defaults.
    """

    name: str
    make: Callable[..., Batch]
    check: Callable[..., None]
    sizes: Mapping[str, Any]
    doc: str = ""
    tags: tuple[str, ...] = field(default=())
    on_device: Callable[..., Any] | None = None
    """As ``make``, with a ``device`` and another stream of random numbers: see :mod:`dspace.tasks.device`."""

    def batch(self, num_examples: int, seed: Seed = 0, *, device: str | None = None, **sizes: Any) -> Any:
        """Make a batch after refusing names that the task does not know.

        With a ``device`` other than the CPU it is drawn there, where the task can do that.
        """
        unknown = sorted(set(sizes) - set(self.sizes))
        if unknown:
            known = ", ".join(self.sizes)
            raise UserError(
                f"task {self.name!r} has no setting {', '.join(map(repr, unknown))}\n  cure: use some of {known}"
            )
        settings = {**self.sizes, **sizes}
        if device is not None and not device.startswith("cpu") and self.on_device is not None:
            return self.on_device(num_examples=num_examples, seed=seed, device=device, **settings)
        return self.make(num_examples=num_examples, seed=seed, **settings)


def require(rules: Sequence[Rule], task: str) -> None:
    """Raise one UserError that names every broken rule."""
    broken = [f"  {rule}\n    cure: {cure}" for holds, rule, cure in rules if not holds]
    if broken:
        raise UserError(f"{task}: these sizes are impossible\n" + "\n".join(broken))


def require_integers(task: str, **values: Any) -> None:
    """Raise a UserError unless every value is an integer (a bool is not)."""
    wrong = [f"{k} = {v!r}" for k, v in values.items() if isinstance(v, bool) or not isinstance(v, int | np.integer)]
    if wrong:
        raise UserError(f"{task}: {', '.join(wrong)} must be whole numbers\n  cure: write an integer")

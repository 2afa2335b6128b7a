"""Synthetic recall tasks, their metrics, and a registry that study files name them by."""

from __future__ import annotations

import difflib

from dspace.errors import UserError
from dspace.tasks.base import IGNORE, Batch, Task
from dspace.tasks.copying import COMPRESSION, SELECTIVE_COPY, compression, selective_copy
from dspace.tasks.fuzzy import FUZZY_RECALL, fuzzy_recall
from dspace.tasks.metrics import (
    AgeCurve,
    accuracy,
    correct,
    evaluate,
    intrusion,
    oldest_quarter,
    plasticity,
    recall_by_age,
    stability,
)
from dspace.tasks.mqar import MQAR, mqar
from dspace.tasks.noisy import NOISY_RECALL, noisy_recall
from dspace.tasks.rebinding import REBINDING_MQAR, rebinding_mqar

TASKS: dict[str, Task] = {
    task.name: task for task in (MQAR, REBINDING_MQAR, NOISY_RECALL, FUZZY_RECALL, SELECTIVE_COPY, COMPRESSION)
}
"""Every task, by the name that a study file uses."""


def get_task(name: str) -> Task:
    """Look a task up. Raises UserError with the nearest name for an unknown one."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"\n  did you mean {near[0]!r}?" if near else ""
    raise UserError(f"there is no task {name!r}{hint}\n  cure: use one of {', '.join(TASKS)}")


__all__ = [
    "IGNORE",
    "TASKS",
    "AgeCurve",
    "Batch",
    "Task",
    "accuracy",
    "compression",
    "correct",
    "evaluate",
    "fuzzy_recall",
    "get_task",
    "intrusion",
    "mqar",
    "noisy_recall",
    "oldest_quarter",
    "plasticity",
    "rebinding_mqar",
    "recall_by_age",
    "selective_copy",
    "stability",
]

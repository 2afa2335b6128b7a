"""The data of a study: made once a worker, from seeds that no trial can change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dspace.study.schema import StudyFile
from dspace.study.trial import derive_seed

if TYPE_CHECKING:
    from dspace.tasks import Batch


@dataclass(frozen=True)
class Data:
    """Training examples, held-out examples that the search sees, and held-out examples that it never sees."""

    train: Batch
    valid: Batch
    test: Batch

    @property
    def hash(self) -> str:
        """Hash over all three."""
        text = " ".join(batch.hash for batch in (self.train, self.valid, self.test))
        return hashlib.sha256(text.encode()).hexdigest()


def batches(study: StudyFile, draw: str = "") -> Data:
    """The study's data: equal for all trials and workers; ``draw`` names another one of the same kind."""
    return _make(study.task.model_dump_json(), derive_seed(study.seed, draw) if draw else study.seed)


def training_data(study: StudyFile, device: str) -> Callable[[int], Batch]:
    """A function of the epoch that draws fresh training examples, on the GPU where the task can."""
    from dspace.tasks import get_task

    table = study.task
    task = get_task(table.name)

    def draw(epoch: int) -> Batch:
        seed = derive_seed(study.seed, "data", "train", epoch)
        return task.batch(num_examples=table.train_examples, seed=seed, device=device, **table.sizes)

    return draw


@lru_cache(maxsize=2)
def _make(task_json: str, seed: int) -> Data:
    from dspace.study.schema import TaskTable
    from dspace.tasks import get_task

    table = TaskTable.model_validate_json(task_json)
    task = get_task(table.name)

    def draw(what: str, count: int) -> Batch:
        return task.batch(num_examples=count, seed=derive_seed(seed, "data", what), **table.sizes)

    return Data(
        draw("train", table.train_examples), draw("valid", table.valid_examples), draw("test", table.test_examples)
    )

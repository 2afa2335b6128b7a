"""What a run tells of its progress."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspace.study.engine import run
from dspace.study.phase import Phase
from dspace.study.progress import Progress
from dspace.study.reading import loads
from tests.study.conftest import TOY

THREE = TOY.replace("seeds = 2", "seeds = 2\ntop = 1")


def attempt(number: int, arm: str, repeat: int, state: str, **attributes: Any) -> SimpleNamespace:
    told = {"arm": arm, "repeat": repeat, **attributes}
    return SimpleNamespace(
        number=number, state=SimpleNamespace(name=state), user_attrs=told, params={}, datetime_complete=datetime.max
    )


def counters(text: str) -> list[tuple[int, int]]:
    return [(int(done), int(total)) for done, total in re.findall(r"\[(\d+)/(\d+)\]", text)]


def test_a_comparison_counts_the_arms_that_the_search_found(toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy.write_text(THREE)
    run(toy, jobs=1, objective="toys:quick")
    told = counters(capfd.readouterr().err)
    assert told == [(i, 8) for i in range(1, 9)] + [(i, 6) for i in range(1, 7)]


def test_a_repetition_counts_once_and_an_arm_without_trials_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Phase(loads(THREE), "shapes"), 1, float("inf"))
    progress.first = False
    trials = [attempt(i, "round", i, "COMPLETE") for i in range(2)] + [
        attempt(2, "top1", 0, "FAIL"),
        attempt(3, "top1", 1, "FAIL", superfluous=True),
        attempt(4, "top1", 1, "COMPLETE"),
        attempt(5, "top1", 0, "COMPLETE", retry_of=2),
    ]
    progress.update(trials)
    assert counters(capsys.readouterr().err)[-1] == (4, 4), "the search completed no trial of the arm `flat`"

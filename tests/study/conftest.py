"""A small study file in a folder of its own; workers find the toy objectives through the path."""

from __future__ import annotations

from pathlib import Path

import pytest

TOY = """
name = "toy"
title = "A toy"
seed = 7
base = "linear_attention"

[task]
name = "rebinding_mqar"
vocab_size = 66

[budget]
trials = 8

[prune]
on = "accuracy"

[axes.shape.choices.round]
doc = "better"
[axes.shape.choices.flat]

[axes.x]
low = 0.0
high = 1.0
target = "train.learning_rate"

[compare.shapes]
arms = { round = { shape = "round" }, flat = { shape = "flat" } }
seeds = 2
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a study file; the current folder is its folder, so studies land in ``runs/`` there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("TOY_FOLDER", str(tmp_path))
    path = tmp_path / "toy.toml"
    path.write_text(TOY)
    return path

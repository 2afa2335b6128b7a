"""What the chunk form of class c keeps alive at once, counted on the CPU at the full size of a training step."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.memory import SHAPES, Live, peak
from dspace.runtime.compiler import module_text
from dspace.runtime.load import load_file


def test_a_training_step_takes_no_more_memory_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "memory_palimpsa.py"
    path.write_text(module_text("palimpsa"), encoding="utf-8")
    module = load_file(path, path.stem)
    found = peak(module, SHAPES["p760"])
    # Inputs, their gradients, the output and its cotangent are 385 MiB: less would mean that something is not counted.
    assert 385 < found <= 576, found


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    with Live() as live:
        first = torch.empty(1024, dtype=torch.uint8)
        view = first[3:].view(-1)
        second = torch.empty(1, dtype=torch.uint8)  # a block
        assert live.now == 1024 + 512
        del first, second
        assert live.now == 1024  # the view keeps its storage
        del view
        assert (live.now, live.peak) == (0, 1024 + 512)

"""The count of what is alive at once (tests/runtime/test_memory.py holds what a pass takes to what is asked)."""

from __future__ import annotations

import torch

from benchmarks.memory import Live


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

"""What a pass allocates on a GPU, found on a CPU: the host side runs as it is, kernels are not launched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.memory import SHAPES, Live, peak
from dspace.runtime.analysis import module_text
from dspace.runtime.load import load_file


def test_a_long_pass_takes_at_most_half_of_what_its_states_would(tmp_path: Path):
    """palimpsa at B, T, H, K, V = 2, 4096, 16, 96, 192; both states every 16 tokens in float32 are 576 MiB a sequence."""
    pytest.importorskip("triton")
    path = tmp_path / "module.py"
    path.write_text(module_text("palimpsa"), encoding="utf-8")
    most, given, leaves = peak(load_file(path, "palimpsa_memory"), SHAPES["p760"])
    assert all(t.grad is not None for t in leaves)
    assert given < most <= 576, f"{most:.0f} MiB"
    assert most - given > 200  # the states at chunk starts were seen


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

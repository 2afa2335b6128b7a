"""What a pass allocates on a GPU, found on a CPU: the host side runs as it is, kernels are not launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dspace.runtime import offline
from dspace.runtime.compiler import module_text
from dspace.runtime.load import load_file


def test_a_long_pass_takes_at_most_half_of_what_its_states_would(tmp_path: Path):
    """palimpsa at B, T, H, K, V = 2, 4096, 16, 96, 192; both states every 16 tokens in float32 are 576 MiB a sequence."""
    pytest.importorskip("triton")
    path = tmp_path / "module.py"
    path.write_text(module_text("palimpsa"), encoding="utf-8")
    module = load_file(path, "palimpsa_memory")
    module.__dict__["_launch"] = lambda *arguments, **options: None
    module.__dict__["_multiprocessors"] = lambda device: 132
    B, T, H, K, V = 2, 4096, 16, 96, 192
    q, k = (torch.empty(B, T, H, K, dtype=torch.bfloat16) for _ in range(2))
    v, b, cotangent = (torch.empty(B, T, H, V, dtype=torch.bfloat16) for _ in range(3))
    inputs = [t.requires_grad_() for t in (q, k, v, b, torch.empty(B, T, H), torch.empty(H))]
    given = sum(t.numel() * t.element_size() for t in (*inputs, cotangent))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with offline.elsewhere(module):
            module.chunk_palimpsa(*inputs)[0].backward(cotangent)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in trace if e.get("name") == "[memory]")
    now = most = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    assert all(t.grad is not None for t in inputs)
    assert given < given + most <= 576 * 2**20, f"{(given + most) / 2**20:.0f} MiB"
    assert most > 200 * 2**20  # the states at chunk starts were seen

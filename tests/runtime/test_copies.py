"""Generated modules as files that people copy, rename and load more than once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dspace.runtime.analysis import module_text

NAME = "simple_gla"

PROGRAM = """
import importlib.util, sys
import torch
file, name = sys.argv[1:]
specification = importlib.util.spec_from_file_location(name, file)
module = importlib.util.module_from_spec(specification)
sys.modules[name] = module
specification.loader.exec_module(module)
x = torch.ones(1, 4, 1, 3)
print(float(module.recurrent_simple_gla(x, x, x, -x[..., 0])[0].sum()))
print(sum(module._native(module._native_forward_loop).stats.cache_hits.values()))
"""


def load(file: Path, name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "variant.py"
    path.write_text(module_text(NAME), encoding="utf-8")
    return path


def test_a_copy_that_is_loaded_later_takes_no_operators_away(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load(file, "copy_one"), load(file, "copy_two")
    assert first._OPS != second._OPS and first._ID == second._ID

    def fail(*args: object) -> None:
        raise AssertionError("the other copy ran")

    monkeypatch.setitem(second.__dict__, "_native_run", fail)
    x = torch.ones(1, 4, 1, 3, requires_grad=True)
    o, _ = first.recurrent_simple_gla(x, x, x, -x[..., 0])
    assert torch.autograd.grad(o.sum(), x)[0].isfinite().all()
    with pytest.raises(AssertionError, match="the other copy"):
        second.recurrent_simple_gla(x, x, x, -x[..., 0])


def test_compiled_loops_serve_a_file_under_any_name(file: Path) -> None:
    found = []
    for name in ("some_package_of_one_process", "variant"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(file), name], capture_output=True, text=True, cwd=file.parent
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.split())
    assert [hits for _, hits in found] == ["0", "1"] and found[0][0] == found[1][0]

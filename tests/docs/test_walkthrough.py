"""Every fenced block of docs/walkthrough.md is executed: TOML is written, Python and console lines are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WALKTHROUGH = Path(__file__).parents[2] / "docs" / "walkthrough.md"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_console(line: str) -> None:
    command = line.removeprefix("$ ").split()
    assert command[0] == "dspace", f"the walkthrough may only run dspace: {line}"
    done = subprocess.run([sys.executable, "-m", "dspace", *command[1:]], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{line} printed nothing"


def test_walkthrough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(WALKTHROUGH.parents[1]), os.environ.get("PYTHONPATH", "")]))
    namespace: dict = {}
    blocks = BLOCK.findall(WALKTHROUGH.read_text())
    assert {kind for kind, _, _ in blocks} == {"toml", "python", "console"}
    for kind, file, text in blocks:
        if kind == "toml":
            Path(file).write_text(text)
        elif kind == "python":
            exec(compile(text, str(WALKTHROUGH), "exec"), namespace)
        else:
            for line in text.strip().splitlines():
                run_console(line)

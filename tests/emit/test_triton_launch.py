"""Launches without Triton's dispatch give the driver exactly what Triton's dispatch gives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SPECS = ["palimpsa", "palimpsa_folded"]


@pytest.fixture(scope="module")
def recorded() -> dict:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "launch_recorded.py"), *SPECS],
        capture_output=True, text=True, env=environment, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SPECS)
def test_the_driver_gets_the_same_code_and_arguments(recorded: dict, name: str) -> None:
    cases = recorded[name]
    assert len(cases) == 5
    for label, case in cases.items():
        assert len(case["ours"]) >= 6 and case["ours"] == case["theirs"], label
        assert case["before"] > 0 and case["compiled"] == 0, (
            label
        )  # nothing is compiled for a call that was made before
        recorded_call, *again, known = case["repeated"]
        assert all(launches == recorded_call for launches in again) and known >= 4, label
        assert [launch[:3] for launch in recorded_call] == [launch[:3] for launch in case["ours"]], label
    codes = {label: {launch[1] for launch in case["ours"]} for label, case in cases.items()}
    assert codes["as before"] == codes["again"] == codes["longer"]  # T specialises nothing
    assert codes["as before"] - codes["not aligned"] and codes["as before"] - codes["heads"]

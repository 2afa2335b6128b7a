"""Runs one of the programs here under Triton's interpreter: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def interpreted(program: str, orders: Any) -> Any:
    """What ``program`` answers to ``orders``, both JSON, from one process with one thread."""
    path = os.pathsep.join([str(HERE.parents[1]), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / program)],
        input=json.dumps(orders), capture_output=True, text=True, timeout=1500,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)

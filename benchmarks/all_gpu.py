"""Every GPU figure in one go, within a limit of time: checks first, then times, each step a process with a log.

    python benchmarks/all_gpu.py FOLDER [--seconds 540] [--only ratio chunkwise ...] [--list]

Steps run in the order of ``--list``; one that does not end in its share of the time is stopped, and what it had printed
is kept. The folder gets a log and, where the script writes one, a JSON file for each step, and ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# name: seconds at most, arguments of the interpreter; {out} is the folder
STEPS: dict[str, tuple[int, str]] = {
    "doctor": (60, "-m dspace doctor --json"),
    "ratio": (150, "benchmarks/ratio_gpu.py --json {out}/ratio.json"),
    "chunkwise": (150, "benchmarks/chunkwise_gpu.py --json {out}/chunkwise.json"),
    "decode": (90, "benchmarks/decode_gpu.py --json"),
    "forms": (240, "benchmarks/forms_gpu.py --json {out}/forms.json"),
    "host": (120, "benchmarks/host_time.py --json {out}/host.json"),
    "train": (240, "benchmarks/train_gpu.py --trials 1 8 --engine auto graph --profile --json {out}/train.json"),
    "smalltrain": (150, "benchmarks/train_gpu.py --trials 1 8 --batch 8 --json {out}/smalltrain.json"),
    "cold": (240, "benchmarks/cold_start_gpu.py palimpsa simple_gla gla palimpsa_folded kda --json {out}/cold.json"),
    "sanitize": (
        420,
        "benchmarks/sanitize_gpu.py --specs palimpsa,simple_gla,gla,palimpsa_folded --json {out}/sanitize.json",
    ),
    "peers": (420, "benchmarks/chunkwise_gpu.py --peer --json {out}/peers.json"),
}


def run(name: str, out: Path, limit: float) -> dict[str, Any]:
    """One step; its output goes to ``NAME.log``."""
    command = [sys.executable, "-W", "ignore", *STEPS[name][1].format(out=out).split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONUNBUFFERED"] = "1"
    begin = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return {"step": name, "exit": code, "seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all steps together")
    parser.add_argument("--only", nargs="+", choices=STEPS, help="these steps, in this order")
    parser.add_argument("--list", action="store_true", help="the steps, and nothing else")
    asked = parser.parse_args()
    if asked.list or asked.folder is None:
        for name, (limit, arguments) in STEPS.items():
            print(f"{name:10s} {limit:4d} s  python {arguments.format(out='FOLDER')}")
        return 0 if asked.list else 2
    asked.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + asked.seconds
    rows: list[dict[str, Any]] = []
    for name in asked.only or STEPS:
        limit = min(STEPS[name][0], end - time.monotonic())
        if limit < 10:
            rows.append({"step": name, "exit": None, "seconds": 0.0})
            continue
        print(f"--- {name}", flush=True)
        rows.append(run(name, asked.folder.resolve(), limit))
        tail = (asked.folder / f"{name}.log").read_text().splitlines()[-12:]
        print("\n".join(line[:160] for line in tail), flush=True)
        (asked.folder / "summary.json").write_text(json.dumps(rows, indent=1))
    for row in rows:
        verdict = {0: "ok", 124: "stopped at its limit", None: "no time left"}.get(row["exit"], f"exit {row['exit']}")
        print(f"{row['step']:10} {row['seconds']:7} s  {verdict}")
    return max((int(row["exit"] or 0) for row in rows), default=0)


if __name__ == "__main__":
    sys.exit(main())

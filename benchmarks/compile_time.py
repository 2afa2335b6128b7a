"""How long a user waits: cold and warm compile of the built-in specs, `import dspace`, `dspace --help`.

    python benchmarks/compile_time.py [NAME ...] [--repeat 3] [--json FILE]

Every measurement runs in a process of its own. "cold" starts from an empty cache and includes the certificate, with
which the native loops are compiled; "cold, unchecked" is compile(certify=False); "warm" finds everything in the cache.
Imports of PyTorch, SymPy and Numba are done before the clock starts, as the targets say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"cold": 10.0, "cold, unchecked": 5.0, "warm": 0.3, "import dspace": 1.0, "dspace --help": 0.5}

COMPILE = """
import sys, time
import torch, numba, pydantic, sympy
import dspace.runtime.certify
from dspace.emit import emit
from dspace.math import analyse
from dspace.runtime import compile
from dspace.spec import load
begin = time.perf_counter()
compile(sys.argv[1], certify=sys.argv[2] != "unchecked")
print(time.perf_counter() - begin)
"""

WARM = """
import sys, time
import torch
from dspace.runtime import compile
begin = time.perf_counter()
compile(sys.argv[1])
print(time.perf_counter() - begin)
assert "sympy" not in sys.modules, "the warm path imports SymPy"
"""

IMPORT = "import time; begin = time.perf_counter(); import dspace; print(time.perf_counter() - begin)"


def run(program: str, *arguments: str, cache: Path) -> float:
    """Seconds that ``program`` prints, run in a fresh process with ``cache`` as its cache folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DSPACE_CACHE": str(cache)}
    command = [sys.executable, "-c", program, *arguments]
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def help_time(cache: Path) -> float:
    """Wall time of `dspace --help`, less that of an interpreter which does nothing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DSPACE_CACHE": str(cache)}

    def wall(program: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
        return time.perf_counter() - begin

    wanted = "import sys; sys.argv = ['dspace', '--help']; from dspace.cli import main; main()"
    return wall(wanted) - wall("pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="built-in specs (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="medians of so many runs (cold ones run once)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    names = options.names or sorted(p.stem for p in (ROOT / "specs").glob("*.toml"))
    rows: list[tuple[str, str, float]] = []

    def show(what: str, kind: str, seconds: float) -> None:
        rows.append((what, kind, seconds))
        verdict = "ok" if seconds <= TARGETS[kind] else "MISSED"
        print(f"{what:28} {kind:16} {seconds:8.3f} s   target {TARGETS[kind]:5.1f} s   {verdict}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        repeat = range(options.repeat)
        show("", "import dspace", statistics.median(run(IMPORT, cache=cache) for _ in repeat))
        show("", "dspace --help", statistics.median(help_time(cache) for _ in repeat))
        for number, name in enumerate(names):
            show(name, "cold, unchecked", run(COMPILE, name, "unchecked", cache=cache / f"unchecked{number}"))
            own = cache / str(number)
            show(name, "cold", run(COMPILE, name, "cold", cache=own))
            show(name, "warm", statistics.median(run(WARM, name, cache=own) for _ in repeat))
    if options.json:
        record = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "targets": TARGETS,
            "results": [{"spec": w, "kind": k, "seconds": s} for w, k, s in rows],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

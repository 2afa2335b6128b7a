"""From empty caches to the first correct result on a GPU: forward and backward of every built-in spec.

    python benchmarks/cold_start_gpu.py [NAME ...] [--keys 64 --values 64] [--json FILE]

Each variant runs in a process of its own with an empty dspace cache and an empty Triton cache. Seconds: "import" of
PyTorch and dspace, "compile" of the spec into a module without its certificate, "call" the first forward and backward
in bfloat16 (its kernels compiled), "certificate" the short one that dspace.compile runs once for each GPU (kernels
compiled ahead, on all cores), "total" all of them. "correct" compares the first result with the float64 reference.
The target is 15 s. Python's bytecode is no part of it: installers make that, and where none is there or may be written,
a first run that is not timed makes it in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 15.0

PROGRAM = """
import json, sys, time
begin = time.perf_counter()
import torch
import dspace
from dspace.runtime.timing import arguments
torch.cuda.init()
marks = {"import": time.perf_counter()}
name, keys, values = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module = dspace.compile(name, certify=False)
marks["compile"] = time.perf_counter()
leaves, _ = arguments(module.SPEC, (2, 200, 4, keys, values), "bfloat16", "cuda")
leaves = [x.requires_grad_() for x in leaves]
o = getattr(module, f"chunk_{name}")(*leaves)[0]
cotangent = torch.randn_like(o)
grads = torch.autograd.grad(o, leaves, cotangent, allow_unused=True)
torch.cuda.synchronize()
marks["call"] = time.perf_counter()
dspace.compile(name)
marks["certificate"] = time.perf_counter()
wide = [x.detach().double().requires_grad_() for x in leaves]
expected = getattr(module, f"reference_{name}")(*wide)[0]
wanted = torch.autograd.grad(expected, wide, cotangent.double(), allow_unused=True)
error = lambda a, b: float((b.double() - a).norm() / a.norm().clamp(min=1e-9))
pairs = [(expected, o), *((w, g) for w, g in zip(wanted, grads) if w is not None)]
times = [begin, *marks.values()]
rows = {n: b - a for n, a, b in zip(marks, times, times[1:])}
json.dump(rows | {"total": times[-1] - begin, "error": max(error(a, b) for a, b in pairs)}, sys.stdout)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="built-in specs (default: all)")
    parser.add_argument("--keys", type=int, default=64)
    parser.add_argument("--values", type=int, default=64)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    names, rows = asked.names or sorted(p.stem for p in (ROOT / "specs").glob("*.toml")), []
    bytecode = tempfile.TemporaryDirectory()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode.name
    for number, name in enumerate([names[0], *names]):
        with tempfile.TemporaryDirectory() as folder:
            caches = {
                "DSPACE_CACHE": f"{folder}/dspace",
                "TRITON_CACHE_DIR": f"{folder}/triton",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, "-W", "ignore", "-c", PROGRAM, name, str(asked.keys), str(asked.values)]
            done = subprocess.run(command, env={**environment, **caches}, capture_output=True, text=True)
        if number == 0:  # makes bytecode
            continue
        if done.returncode:
            print(f"{name:28} FAILED: {done.stderr.strip().splitlines()[-1][:150]}", flush=True)
            rows.append({"name": name, "total": float("inf")})
            continue
        row = json.loads(done.stdout)
        rows.append({"name": name, **row})
        verdict = "ok" if row["total"] <= TARGET and row["error"] < 2e-2 else "MISSED"
        times = "  ".join(f"{k} {v:5.1f}" for k, v in row.items() if k != "error")
        print(f"{name:28} {times}  error {row['error']:.1e}  {verdict}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    return int(any(not r["total"] <= TARGET for r in rows))


if __name__ == "__main__":
    sys.exit(main())

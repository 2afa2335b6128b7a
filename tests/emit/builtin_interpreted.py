"""Run as a program under TRITON_INTERPRET=1: certificates of the Triton kernels of built-in specs, as JSON.

Standard input is a list of ``{"spec": name, "edits": [[pattern, replacement, count], ...], "case": name, "dtype": name}``,
all but the first optional; edits are made in the emitted text first, so that tests can plant mistakes in kernels, and a
case is one of a full certificate. The forms of the GPU run in place of those of the CPU.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dspace import spec as specs
from dspace.runtime.analysis import module_text
from dspace.runtime.cases import Case, Shape, full_cases
from dspace.runtime.certify import certify_module
from dspace.runtime.load import load_file

PACKED = Case("packed", Shape(1, 43, 1, 2, 10, 6), lengths=(0, 36, 7))
"""More than one chunk of 32 tokens and of 16, an empty sequence, sizes that fill no tile, grouped heads, carried
states, variance."""

ONE = Case("one token", Shape(2, 1, 1, 1, 16, 8), initial=False, final=False, variance=False)


def certificate(order: dict[str, Any], folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    spec = specs.load(order["spec"])
    text = module_text(spec)
    edits = order.get("edits", ())
    for pattern, replacement, count in edits:
        text, made = re.subn(pattern, replacement, text, count=count)
        assert made, f"{pattern} is not in the emitted text any more: plant the mistake elsewhere"
    name = f"{spec.name}_{len(list(folder.iterdir()))}"
    text = re.sub(r"(_ID = 'dspace_\w+)'", rf"\1_{name}'", text)
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    module = load_file(path, name)
    for form in ("chunk", "recurrent"):
        module._CORES["cpu", form] = module._CORES["cuda", form]
    cases = (PACKED,) if edits else (PACKED, ONE)
    if "case" in order:
        cases = tuple(c for c in full_cases("cuda") if c.name == order["case"])
    found = certify_module(spec, module, cases=cases, dtypes=(order.get("dtype", "float32"),), seed=5)
    return {
        "class": module.SPEC["class"],
        "passed": found.passed,
        "checks": [[c.form, c.quantity, c.error, c.status] for c in found.checks],
        "failures": [c.describe() for c in found.failures()],
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        json.dump([certificate(order, Path(folder)) for order in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()

"""Verify many small variants in one process, with the native loops run as plain Python: nothing is compiled.

    NUMBA_DISABLE_JIT=1 python tests/cheap.py FOLDER

emits, imports and certifies in float64, at T = 5, K = 3, V = 2, every spec file of FOLDER, and prints one line of JSON
for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.spec import Spec


def verify(specs: Mapping[str, Spec]) -> list[dict[str, Any]]:
    """What the subprocess says of each spec, in order; the keys name the files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in specs.items():
            Path(folder, f"{name}.toml").write_text(spec.to_toml())
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, __file__, folder], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(folder: Path) -> None:
    import torch

    from dspace.emit import emit
    from dspace.runtime.analysis import analysis_of
    from dspace.runtime.cases import Case, Shape
    from dspace.runtime.certify import certify_module
    from dspace.runtime.load import load_file
    from dspace.spec import load

    torch.set_num_threads(1)
    case = Case("small", Shape(1, 5, 1, 2, 3, 2))
    for path in sorted(folder.glob("*.toml")):
        start = time.process_time()
        report: dict[str, Any] = {"name": path.stem, "class": "", "passed": False, "forms": [], "gradients": []}
        try:
            spec = load(path)
            text = emit(spec, analysis_of(spec))
            module_path = folder / f"{path.stem}_module.py"
            module_path.write_text(text)
            module = load_file(module_path, path.stem)
            found = certify_module(spec, module, dtypes=["float64"], seed=7, cases=[case])
        except Exception as error:  # one variant that does not compile must not hide the others
            report["failures"] = [f"{type(error).__name__}: {error}"]
        else:
            good = [c for c in found.checks if c.status == "ok"]
            report |= {"class": found.letter, "passed": found.passed, "forms": sorted({c.form for c in good})}
            report["gradients"] = sorted({c.quantity for c in good if c.quantity.startswith("d ")})
            report["failures"] = [c.describe() for c in found.failures()[:3]]
        print(json.dumps({**report, "seconds": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

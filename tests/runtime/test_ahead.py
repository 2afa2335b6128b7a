"""Kernels of a certificate are found without running them and compiled together; the GPU is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys, types, warnings
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget

triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
    get_current_stream=lambda device: 0, launcher_cls=None,
))
from dspace import spec
from dspace.runtime import ahead, offline
from dspace.runtime.analysis import module_text
from dspace.runtime.cases import quick_cases
from dspace.runtime.certify import Examiner, certificate_calls
from dspace.runtime.load import load_file

path = Path(sys.argv[1])
path.write_text(module_text("simple_gla"))
module = load_file(path, "ahead_simple_gla")
examiner = Examiner(spec.load("simple_gla"), module, "cpu")
with offline.elsewhere(module):
    calls = certificate_calls(examiner, [(quick_cases("cuda")[0], "bfloat16")])
    warnings.filterwarnings("error", message="kernels were not compiled ahead")
    count = ahead.compile_calls(module, calls, workers=2)
    compiled = {
        name: len(value.device_caches[0][0]) for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value.device_caches
    }
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as caught:
        broken = ahead.compile_calls(module, [lambda: 1 / 0])
json.dump({"count": count, "compiled": compiled, "broken": broken, "warning": str(caught[0].message)}, sys.stdout)
"""

WARM = """
import json, os, sys
from pathlib import Path
from dspace.runtime import warm
from dspace.runtime.absent import AbsentGPU

warm.wait()  # nothing was begun
AbsentGPU.install()
warm.start()
first = warm._thread
warm.start()
warm.wait()
kernels = [path.stem for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")]
json.dump({"kernels": kernels, "once": warm._thread is first, "alive": first.is_alive()}, sys.stdout)
"""

pytest.importorskip("triton")


def report(folder: Path, *program: str) -> Any:
    """What a program prints as JSON, with an empty cache of Triton in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(folder / "c")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *program], capture_output=True, text=True, env=environment, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_kernels_of_a_certificate_are_compiled_together(tmp_path: Path) -> None:
    found = report(tmp_path, "-c", PROGRAM, str(tmp_path / "m.py"))
    assert found["count"] == sum(found["compiled"].values()) >= 8
    assert {"_states_scalar_kernel", "_gradients_scalar_kernel", "_sequential_kernel"} <= set(found["compiled"])
    assert found["broken"] == 0 and "ZeroDivisionError" in found["warning"]


def test_a_first_call_compiles_its_backward_pass_too_in_other_processes(tmp_path: Path) -> None:
    found = report(tmp_path, str(Path(__file__).parent / "first_call.py"), str(tmp_path))
    assert found["armed"] == ["chunk", "recurrent"]
    assert found["left"] == ["recurrent"]
    assert found["here"] == [], "compiled by this process"
    assert {"_states_scalar_kernel", "_gradients_scalar_kernel"} <= set(found["launched"])
    once, twice = found["counts"]
    assert [2 * x for x in once] == twice, "the recording launched kernels, or its saved tensors were seen"
    assert found["noted"] == 1 and found["disarmed"]


def test_what_triton_does_once_is_done_in_a_thread(tmp_path: Path) -> None:
    assert report(tmp_path, "-c", WARM) == {"kernels": ["nothing"], "once": True, "alive": False}

"""The doctor works without a GPU, says what to do, and its probe runs the pattern that it talks of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspace.runtime import diagnose, versions
from dspace.runtime.diagnose import Finding, Report, doctor, version_tuple


def test_report_covers_this_machine():
    report = doctor()
    subjects = {f.subject: f for f in report.findings}
    assert {"python", "torch", "triton", "numba", "cpu", "cache folder", "native loops", "gpu"} <= set(subjects)
    assert subjects["native loops"].status == "ok"
    assert report.healthy and json.loads(json.dumps(report.as_dict()))["healthy"]
    assert all(f.cure for f in report.findings if f.status != "ok")
    assert report.table().row_count == len(report.findings)


def test_what_is_broken_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("DSPACE_CACHE", str(blocked))
    monkeypatch.setattr(versions, "library_versions", lambda: {"torch": "2.1.0", "triton": "none", "numba": "none"})
    found = {f.subject: f for f in doctor().findings}
    assert found["cache folder"].status == "warning" and "DSPACE_CACHE" in found["cache folder"].cure
    assert found["torch"].status == "warning" and found["numba"].status == "broken" and found["triton"].status == "note"
    assert not Report((Finding("x", "y", "broken", "z"),)).healthy


@pytest.mark.parametrize(("triton", "suspect"), [("3.3.1", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False)])
def test_version_list_without_the_probe(monkeypatch: pytest.MonkeyPatch, triton: str, suspect: bool):
    monkeypatch.setattr(versions, "library_versions", lambda: {"triton": triton})
    assert (diagnose._version_list(9, 0)[0].status == "warning") is suspect
    assert diagnose._version_list(8, 0)[0].status == "note"


def test_probe_finding_is_read(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from dspace.runtime import probe

    right = probe.ProbeResult("bfloat16", 64, 4, 2, 1e-3, 1e-3)
    wrong = probe.ProbeResult("bfloat16", 64, 8, 2, 1e-3, 0.5)
    nan = probe.ProbeResult("bfloat16", 64, 8, 2, float("nan"), 1e-3)
    assert not right.wrong and wrong.wrong and nan.wrong
    monkeypatch.setattr(probe, "probe_chained_products", lambda: [right])
    assert diagnose._probe(9, 0)[0].status == "ok"
    monkeypatch.setattr(probe, "probe_chained_products", lambda: [right, wrong])
    finding = diagnose._probe(9, 0)[0]
    assert finding.status == "broken" and "8 warps" in finding.value and "3.7.1" in finding.cure


def test_wrong_machine_code_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from dspace.runtime import probe

    monkeypatch.setattr(probe, "assembler_faults", lambda: ("UIADD3.X UR31, UR31, -0x3ffffff0, URZ, UP0, !UPT",))
    finding = diagnose._assembler()[0]
    assert finding.status == "warning" and "UR31" in finding.value and "3.7.1" in finding.cure
    monkeypatch.setattr(probe, "assembler_faults", lambda: 1 / 0)
    assert diagnose._assembler()[0].status == "broken"


def test_the_provoking_kernel_is_compiled_and_read():
    triton = pytest.importorskip("triton")
    from dspace.runtime.probe import assembler_faults

    version = version_tuple(triton.__version__)
    if version[:2] != (3, 6) and version < diagnose.HOPPER_BAD_TRITON[1]:
        pytest.skip("what this release does is not known: 3.6 is wrong, 3.9 is right")
    assert bool(assembler_faults()) == (version < diagnose.HOPPER_BAD_TRITON[1])


PROBE = """
from dspace.runtime.probe import probe_chained_products
results = probe_chained_products("cpu", quick=True)
assert len(results) == 1 and not results[0].wrong, results
"""


def test_probe_runs_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", PROBE], env=environment, check=True, timeout=600)


def test_versions_compare_as_numbers():
    assert version_tuple("2.13.0+cpu") == (2, 13, 0) > version_tuple("2.9")
    assert version_tuple("3.10.0rc1") == (3, 10, 0)

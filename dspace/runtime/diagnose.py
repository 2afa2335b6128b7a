"""The doctor: what this machine can run, what is broken in it, and what to do about it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from dspace.runtime import versions
from dspace.runtime.cache import ENVIRONMENT, default_dir, writable

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "note", "warning", "broken"]

OLDEST = {"torch": (2, 9), "triton": (3, 6), "numba": (0, 61)}
"""What dspace is tested with, at least."""

HOPPER_BAD_TRITON = ((3, 4), (3, 7, 1))
"""Releases in which the pattern of :mod:`dspace.runtime.probe` was reported wrong on sm_90: first bad, first good."""


@dataclass(frozen=True)
class Finding:
    """One thing found: ``subject`` and ``value``, how bad it is, and the ``cure`` where there is one."""

    subject: str
    value: str
    status: Status = "ok"
    cure: str = ""


@dataclass(frozen=True)
class Report:
    """All findings; ``healthy`` unless something is broken."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return all(f.status != "broken" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON sees it."""
        return {"healthy": self.healthy, "findings": [asdict(f) for f in self.findings]}

    def table(self) -> Table:
        """A table for the terminal."""
        from rich.table import Table

        table = Table(title="dspace doctor: " + ("healthy" if self.healthy else "something is broken"))
        for column in ("what", "found", "", "what to do"):
            table.add_column(column, overflow="fold")
        styles = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}
        for f in self.findings:
            table.add_row(f.subject, f.value, f"[{styles[f.status]}]{f.status}[/]", f.cure)
        return table


def doctor(probe: bool = True) -> Report:
    """Examine this machine. ``probe`` runs small kernels on the GPU, if there is one (about half a minute)."""
    findings = [_python(), *_libraries(), *_cpu(), _cache(), _numba()]
    findings += _gpu(probe)
    return Report(tuple(findings))


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", found)


def _libraries() -> list[Finding]:
    findings = []
    for name, found in versions.library_versions().items():
        oldest = OLDEST[name]
        wanted = ".".join(map(str, oldest))
        if found == "none":
            status: Status = "note" if name == "triton" else "broken"
            cure = "no GPU kernels without it" if name == "triton" else f"install {name} {wanted} or newer"
            findings.append(Finding(name, "not installed", status, cure))
        elif version_tuple(found) < oldest:
            findings.append(Finding(name, found, "warning", f"tested with {wanted} and newer"))
        else:
            findings.append(Finding(name, found))
    return findings


def _cpu() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    import torch

    threads = torch.get_num_threads()
    finding = Finding("cpu", f"{versions.cpu_name()}, {cores} usable cores, torch uses {threads} threads")
    if threads > cores:
        cure = f"more threads than cores slow the native loops down: set OMP_NUM_THREADS={cores}"
        return [Finding(finding.subject, finding.value, "warning", cure)]
    return [finding]


def _cache() -> Finding:
    folder = default_dir()
    if writable(folder):
        return Finding("cache folder", str(folder))
    cure = f"every process compiles anew into a temporary folder; set {ENVIRONMENT} to a folder that can be written"
    return Finding("cache folder", f"{folder} cannot be written", "warning", cure)


def _numba() -> Finding:
    """Numba compiles and runs a parallel loop."""
    try:
        import numpy
        from numba import njit, prange

        def total(x):  # type: ignore[no-untyped-def]
            result = 0.0
            for i in prange(x.shape[0]):
                result += x[i]
            return result

        value = njit(parallel=True)(total)(numpy.ones(64))
    except Exception as error:  # whatever breaks Numba, this is the place that reports it
        cure = "the CPU kernels cannot be compiled here: reinstall numba; reference_NAME works without it"
        return Finding("native loops", f"{type(error).__name__}: {str(error)[:120]}", "broken", cure)
    if value != 64:
        return Finding("native loops", f"a sum of 64 ones gave {value}", "broken", "reinstall numba and llvmlite")
    from numba import get_num_threads, threading_layer

    return Finding("native loops", f"numba compiles and runs, {get_num_threads()} threads ({threading_layer()})")


def _gpu(probe: bool) -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built is None:
            cure = "everything runs on the CPU; for a GPU install a torch that is built for it"
            return [Finding("gpu", "none: this torch is built for the CPU only", "note", cure)]
        cure = "if there is one, look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"
        return [Finding("gpu", f"none that torch (built for {built}) can use", "note", cure)]
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    platform_version = torch.version.cuda or torch.version.hip
    findings = [
        Finding("gpu", f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB"),
        Finding("driver", f"{_driver()}, runtime {platform_version}"),
    ]
    if torch.version.cuda and major < 8:
        findings.append(
            Finding("gpu age", f"sm_{major}{minor}", "warning", "no bf16 matrix units: use float16 or float32")
        )
    if versions.library_versions()["triton"] == "none":
        return [*findings, Finding("gpu kernels", "triton is missing", "broken", "install triton 3.6 or newer")]
    if not probe:
        return findings + _version_list(major, minor)
    return findings + _probe(major, minor) + (_assembler() if (major, minor) == (9, 0) else [])


def _version_list(major: int, minor: int) -> list[Finding]:
    """What the version alone says, where nothing was run."""
    triton = versions.library_versions()["triton"]
    if (major, minor) == (9, 0) and HOPPER_BAD_TRITON[0] <= version_tuple(triton) < HOPPER_BAD_TRITON[1]:
        cure = "run `dspace doctor` with its probe: some of these releases give wrong gradients on Hopper"
        return [Finding("chained products", f"not probed; triton {triton} is suspect on sm_90", "warning", cure)]
    return [Finding("chained products", "not probed", "note", "run the probe to know")]


def _probe(major: int, minor: int) -> list[Finding]:
    from dspace.runtime.probe import probe_chained_products

    results = probe_chained_products()
    wrong = [r for r in results if r.wrong]
    triton = versions.library_versions()["triton"]
    tried = f"{len(results)} configurations of dot(trans(dot(a, b)), c) on sm_{major}{minor} with triton {triton}"
    if not wrong:
        return [Finding("chained products", f"right in all {tried}")]
    first = wrong[0]
    detail = first.raised or f"relative error {max(first.plain_error, first.transposed_error):.1e}"
    where = f"{first.dtype}, {first.size} x {first.size}, {first.warps} warps, {first.stages} stages: {detail}"
    cure = (
        "this Triton miscompiles products of transposed products: install triton 3.7.1 or newer. dspace certifies "
        "every kernel before use, so that a wrong one is refused, but hand-written kernels of others are not"
    )
    return [Finding("chained products", f"WRONG in {len(wrong)} of {tried}; {where}", "broken", cure)]


def _assembler() -> list[Finding]:
    """What the assembler makes of a kernel that provokes its mistake; compiled, not run."""
    from dspace.runtime.probe import assembler_faults

    triton = versions.library_versions()["triton"]
    try:
        faults = assembler_faults()
    except Exception as error:  # a compiler that raises is a finding
        first = next(iter(str(error).splitlines()), "")
        return [Finding("matrix operands", f"{type(error).__name__}: {first[:120]}", "broken", "reinstall triton")]
    if not faults:
        return [Finding("matrix operands", f"addressed rightly in a provoking kernel, triton {triton}")]
    cure = (
        "install triton 3.7.1 or newer for kernels of others; dspace's own avoid the instructions, are searched for "
        "the mistake in its tests, and are certified before use"
    )
    value = f"{len(faults)} wrong addresses in machine code that triton {triton} made for sm_90: {faults[0][:80]}"
    return [Finding("matrix operands", value, "warning", cure)]


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "version unknown"
    return next(iter(done.stdout.split()), "version unknown")


def version_tuple(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"2.13.0+cpu"`` is ``(2, 13, 0)``."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)

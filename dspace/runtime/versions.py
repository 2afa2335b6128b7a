"""What a module and its certificate depend on: the compiler's own text, libraries, the device."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
from pathlib import Path

from dspace.runtime.cache import digest

COMPILER_PACKAGES = ("spec", "math", "plan", "emit")
"""The packages whose text decides what a spec compiles to."""

LIBRARIES = ("torch", "triton", "numba")
"""The libraries that turn an emitted module into machine code."""


@functools.cache
def emitter_version() -> str:
    """``EMITTER_VERSION`` and a hash of the compiler's own text, such as ``1+0f3a...``.

    The constant alone would depend on a person who remembers to raise it. It is read as text, since importing
    the emitter would import SymPy, and this is on the warm path.
    """
    package = Path(__file__).parent.parent
    parts: list[bytes] = []
    for name in COMPILER_PACKAGES:
        for path in sorted((package / name).rglob("*.py")):
            parts += [path.relative_to(package).as_posix().encode(), path.read_bytes()]
    base = (package / "emit" / "base.py").read_text(encoding="utf-8")
    constant = re.search(r'^EMITTER_VERSION = "([^"]*)"', base, re.MULTILINE)
    return f"{constant.group(1) if constant else '0'}+{digest(*parts)[:16]}"


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of :data:`LIBRARIES` by name, ``"none"`` where one is missing; imports none of them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@functools.cache
def device_name(device: str) -> str:
    """The hardware behind ``device`` ("cpu" or "cuda") by name: part of a certificate's key."""
    if device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return f"{cpu_name()} ({platform.machine()})"


@functools.cache
def cpu_name() -> str:
    """The CPU's model name, as far as the operating system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"

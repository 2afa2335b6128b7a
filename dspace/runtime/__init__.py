"""From a spec to a module that can be trusted: cache, compile, oracle, certificates, doctor.

compile(source)        the imported module of a variant, certified on this machine
verify(source, ...)    a Certificate: every form of the module against the float64 oracle
generate(source, ...)  the module as a file to read and to keep
doctor()               what this machine can run, what is broken in it, what to do
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.runtime.certificate import Certificate
    from dspace.runtime.compiler import compile
    from dspace.runtime.diagnose import doctor
    from dspace.runtime.generation import check, generate
    from dspace.runtime.verification import verify

_HOME = {
    "Certificate": "certificate",
    "check": "generation",
    "compile": "compiler",
    "doctor": "diagnose",
    "generate": "generation",
    "verify": "verification",
}

__all__ = ["Certificate", "check", "compile", "doctor", "generate", "verify"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, when it is asked for: the parts need torch or SymPy, the package does not."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"dspace.runtime.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dspace.runtime' has no attribute {name!r}")

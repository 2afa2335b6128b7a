"""dspace: declarative design-space exploration for linear attention.

A variant is a page of TOML; its mathematics, kernels, gradients, proofs, layers and studies are derived from it.

    import dspace
    op = dspace.compile("my_variant.toml")      # a module: chunk_NAME, recurrent_NAME, reference_NAME, SPEC
    layer = dspace.nn.Mixer("my_variant.toml", hidden_size=768, num_heads=16)

Importing this package is cheap: PyTorch, SymPy, Numba, Triton and Optuna load when something needs them.
"""

from __future__ import annotations

from dspace.interrupt import leave_at_once

leave_at_once()  # before anything is imported

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from dspace.errors import (  # noqa: E402
    CertificationError,
    CompilerBug,
    DspaceError,
    ProblemsError,
    SpecError,
    StudyError,
    UserError,
)

if TYPE_CHECKING:
    from dspace import math, nn, runtime, spec, study, tasks
    from dspace.runtime import compile, verify

__version__ = "0.1.0"

_SUBPACKAGES = ("emit", "math", "nn", "plan", "runtime", "spec", "study", "tasks")
_FUNCTIONS = {"compile": "dspace.runtime", "verify": "dspace.runtime", "generate": "dspace.runtime"}

__all__ = [
    "CertificationError",
    "CompilerBug",
    "DspaceError",
    "ProblemsError",
    "SpecError",
    "StudyError",
    "UserError",
    "compile",
    "math",
    "nn",
    "runtime",
    "spec",
    "study",
    "tasks",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load subpackages and the main functions on first use."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"dspace.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'dspace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})

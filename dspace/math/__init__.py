"""The mathematics: Spec -> Recurrence -> normal form, class, gradients, ranges, cost.

analysis = dspace.math.analyse(dspace.spec.load("my_variant.toml"))
print(dspace.math.show.text(analysis))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.math import ir, show
    from dspace.math.classes import classify
    from dspace.math.gradients import adjoint
    from dspace.math.lowering import lower
    from dspace.math.pipeline import analyse

# No module is named like a function of this package: importing it would hide the function.
_HOME = {"analyse": "pipeline", "lower": "lowering", "adjoint": "gradients", "classify": "classes"}
_MODULES = ("coordinates", "cost", "functions", "ir", "ranges", "show", "simplify")

__all__ = ["adjoint", "analyse", "classify", "ir", "lower", "show"]


def __getattr__(name: str) -> Any:
    """SymPy loads when something of it is needed."""
    if name in _HOME:
        return getattr(importlib.import_module(f"dspace.math.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"dspace.math.{name}")
    raise AttributeError(f"module 'dspace.math' has no attribute {name!r}")

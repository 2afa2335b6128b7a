"""The mathematics: Spec -> Recurrence -> normal form, class, gradients, ranges, cost.

analysis = dspace.math.analyse(dspace.spec.load("my_variant.toml"))
print(dspace.math.show.text(analysis))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.math import ir, show
    from dspace.math.canonical import canonical_hash
    from dspace.math.classes import classify
    from dspace.math.gradients import adjoint
    from dspace.math.lowering import lower
    from dspace.math.map import build_map
    from dspace.math.pipeline import analyse
    from dspace.math.reductions import reduce

# No module is named like a function of this package: importing it would hide the function.
_HOME = {
    "analyse": "pipeline",
    "lower": "lowering",
    "adjoint": "gradients",
    "classify": "classes",
    "reduce": "reductions",
    "build_map": "map",
    "canonical_hash": "canonical",
}
_MODULES = (
    "coordinates",
    "cost",
    "explain",
    "functions",
    "ir",
    "map",
    "ranges",
    "reductions",
    "roofline",
    "show",
    "simplify",
    "stability",
)

__all__ = ["adjoint", "analyse", "build_map", "canonical_hash", "classify", "ir", "lower", "reduce", "show"]


def __getattr__(name: str) -> Any:
    """SymPy loads when something of it is needed."""
    if name in _HOME:
        return getattr(importlib.import_module(f"dspace.math.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"dspace.math.{name}")
    raise AttributeError(f"module 'dspace.math' has no attribute {name!r}")

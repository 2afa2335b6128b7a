"""The design space: structural choices -> points -> composed specs; which are valid, which coincide, what they cost.

found = dspace.space.load_or_build(folder)
for entry in found.sample(10, seed=0):
    spec = dspace.space.compose(entry.point)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.space.catalogue import Catalogue, Entry, build, load_or_build
    from dspace.space.composing import compose
    from dspace.space.points import AXES, Point, all_points, coincides, parse_point, why_not

_HOME = {
    "AXES": "points",
    "Point": "points",
    "all_points": "points",
    "coincides": "points",
    "parse_point": "points",
    "why_not": "points",
    "compose": "composing",
    "Catalogue": "catalogue",
    "Entry": "catalogue",
    "build": "catalogue",
    "load_or_build": "catalogue",
}

__all__ = [
    "AXES",
    "Catalogue",
    "Entry",
    "Point",
    "all_points",
    "build",
    "coincides",
    "compose",
    "load_or_build",
    "parse_point",
    "why_not",
]


def __getattr__(name: str) -> Any:
    """Load a name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'dspace.space' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dspace.space.{_HOME[name]}"), name)

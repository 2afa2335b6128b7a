"""The Triton target: the section for a GPU of whichever class a variant belongs to."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from dspace.emit.base import Section
from dspace.emit.triton import features
from dspace.math.ir import Analysis

_OTHERS = ("dspace.emit.triton.ratio",)
"""Modules with a ``section`` of their own, asked in this order after the chunkwise one."""


def section(analysis: Analysis) -> Section | None:
    """Section of classes a, b and fold (chunkwise) or c (ratio); None where a GPU has no form of its own."""
    made = features.section(analysis)
    for name in _OTHERS:
        if made is None and find_spec(name) is not None:
            made = importlib.import_module(name).section(analysis)
    return made

"""The Triton target: the section for a GPU of whichever class a variant belongs to."""

from __future__ import annotations

import dataclasses
import importlib
from importlib.util import find_spec

from dspace.emit.base import Section
from dspace.emit.triton import features, sequential
from dspace.math.ir import Analysis
from dspace.math.ranges import grows

_OTHERS = ("dspace.emit.triton.ratio", "dspace.emit.triton.segments")
"""Modules with a ``section`` of their own, asked in this order after the chunkwise one."""


def section(analysis: Analysis) -> Section:
    """Chunk form of classes a, b and fold (chunkwise) or c (ratio), and the sequential form, which serves any class.

    Where no plan gives a chunk form, the sequential one stands in for it; so it does where a decay exceeds 1, as chunk
    forms take no exponential of a positive number.
    """
    if grows(analysis.recurrence):
        return sequential.section(analysis)
    made = features.section(analysis)
    for name in _OTHERS:
        if made is None and find_spec(name) is not None:
            made = importlib.import_module(name).section(analysis)
    return sequential.section(analysis) if made is None else joined(made, analysis)


def joined(made: Section, analysis: Analysis) -> Section:
    """``made`` with the sequential form beside its own, if it has none."""
    if made.recurrent is not None:
        return made
    last = sequential.section(analysis, common="def _kernel(" not in made.code)
    imports = tuple(dict.fromkeys((*made.imports, *last.imports)))
    code = f"{made.code.rstrip()}\n\n\n{last.code}"
    return dataclasses.replace(made, imports=imports, code=code, recurrent=last.recurrent)

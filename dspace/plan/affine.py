"""Classes a, b and fold: what a chunkwise form needs to know of an affine recurrence with linear reads.

The recurrence is split at its matrix states. Everything else is elementwise in the inputs and becomes features
of a token: a log decay, keys and values of each write, queries of each read (THEORY.md section 3a, 3b). States
without both axes ("vector states": a normaliser, a precision over k) are evaluated at every token, after which
they are features as well; that is how a folded precision divides the query (identity E15).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from dspace.math.ir import AffineState, Analysis, Readout

SCALAR_CHUNK = 64
"""Tokens a chunk when the decay is one number per token: the intra-chunk work is matmuls."""
CHANNEL_CHUNK = 16
"""Tokens a chunk when it is one per channel: decays inside a chunk are C*C*K numbers."""

LETTERS = ("a", "b", "fold")


@dataclass(frozen=True)
class AffinePlan:
    """States in the order of evaluation, and the tokens a chunk.

    ``probes``: what a matrix state is read with before its write, on k, to be added to the value that it writes.
    """

    vector_states: tuple[AffineState, ...]
    matrix_states: tuple[AffineState, ...]
    readout: Readout
    exclusive: bool
    chunk: int
    probes: Mapping[str, sympy.Expr] = field(default_factory=dict)


def affine_plan(analysis: Analysis) -> AffinePlan | None:
    """The plan, or None where the class, a decay or a read has no chunkwise form."""
    known = analysis.classification
    if known.letter not in LETTERS or known.affine is None or known.readout is None:
        return None
    matrix = tuple(s for s in known.affine if s.axes == "kv")
    vector = tuple(s for s in known.affine if s.axes != "kv")
    if any(s.log_decay is None or s.decay_axes == "kv" for s in known.affine):
        return None
    if any(read.queries is None for read in known.readout.reads):
        return None
    per_channel = any(s.decay_axes for s in known.affine)
    return AffinePlan(
        vector_states=vector,
        matrix_states=matrix,
        readout=known.readout,
        exclusive=analysis.recurrence.read == "before",
        chunk=CHANNEL_CHUNK if per_channel else SCALAR_CHUNK,
    )


def kind(state: AffineState) -> str:
    """What decays: "none", "scalar" (one number per token) or "key" (one for each key channel)."""
    if state.log_decay == 0 or state.decay == 1:
        return "none"
    return "key" if state.decay_axes == "k" else "scalar"

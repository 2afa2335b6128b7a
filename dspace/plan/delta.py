"""Class d: a rank-one transition as the plan of classes a and b, with one more thing known of a write.

The state of ``S_t = decay S_(t-1) + key_t (value_t + probe_t S_(t-1))`` is that of linear attention with the values
``u_t = value_t + probe_t S_(t-1)``. These follow from the tokens of a chunk and the state at its start by a triangular
system (THEORY.md section 3d); then everything else is class a or b.
"""

from __future__ import annotations

import sympy

from dspace.math.ir import AffineState, Analysis, Axes, axes_of
from dspace.math.logdecay import log_decay
from dspace.math.rank import rank_one
from dspace.math.separate import writes
from dspace.plan.affine import CHANNEL_CHUNK, SCALAR_CHUNK, AffinePlan


def delta_plan(analysis: Analysis) -> AffinePlan | None:
    """The plan, or None where the class, a decay, a read or the direction of the write has no such form.

    What is erased and what is written must lie along one key, up to a number per token; then both are one write.
    """
    known, r = analysis.classification, analysis.recurrence
    if known.letter != "d" or known.readout is None or any(read.queries is None for read in known.readout.reads):
        return None
    if len(r.states) != 1:
        return None  # others would have to be known at every token before the system is
    (state,) = r.states
    found, table = rank_one(r), r.axes_table()
    decay = log_decay(found.decay, r)
    terms = writes(found.write, state.axes, table)
    if decay is None or axes_of(found.decay, table) not in ("", "k") or not terms or len(terms) != 1:
        return None
    (write,) = terms
    size = sympy.cancel(found.erase / write.key)
    if axes_of(size, table) != "" or state.symbol in size.free_symbols | write.key.free_symbols:
        return None
    axes: Axes = axes_of(found.decay, table)
    return AffinePlan(
        vector_states=(),
        matrix_states=(AffineState(state.name, state.axes, found.decay, decay, axes, terms),),
        readout=known.readout,
        exclusive=r.read == "before",
        chunk=CHANNEL_CHUNK if axes else SCALAR_CHUNK,
        probes={state.name: size * found.probe},
    )

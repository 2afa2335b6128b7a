"""Class d: a rank-one transition as the plan of classes a and b, with one more thing known of a write.

The state of ``S_t = decay S_(t-1) + key_t (value_t + probe_t S_(t-1))`` is that of linear attention with the values
``u_t = value_t + probe_t S_(t-1)``. These follow from the tokens of a chunk and the state at its start by a triangular
system (THEORY.md section 3d); then everything else is class a or b.
"""

from __future__ import annotations

from dspace.math.ir import Analysis
from dspace.math.rank import delta_rule
from dspace.plan.affine import CHANNEL_CHUNK, SCALAR_CHUNK, AffinePlan


def delta_plan(analysis: Analysis) -> AffinePlan | None:
    """The plan, or None where the class, a read or the rule has no such form."""
    known = analysis.classification
    if known.letter != "d" or known.readout is None or any(read.queries is None for read in known.readout.reads):
        return None
    rule = delta_rule(analysis.recurrence)
    if rule is None:
        return None
    return AffinePlan(
        vector_states=(),
        matrix_states=(rule.state,),
        readout=known.readout,
        exclusive=analysis.recurrence.read == "before",
        chunk=CHANNEL_CHUNK if rule.state.decay_axes else SCALAR_CHUNK,
        probes={rule.state.name: rule.probe},
    )

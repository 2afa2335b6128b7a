"""States that compose: what all chunks need to run at once, token by token, where no matmul form exists.

Every state is ``S_t = decay_t S_(t-1) + write_t``, elementwise, with neither factor of the states. So a chunk takes
``S`` to ``product S + end``, where ``product`` multiplies its decays and ``end`` is what it makes of zeros: both come
from the tokens of the chunk alone (THEORY.md section 3c, with a decay per channel). The same holds of cotangents, the
other way round. Decays and writes may have any axes, and the readout any form.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dspace.math.ir import AffineState, Analysis, Axes, Recurrence, State
from dspace.math.separate import separable

CHUNK = 32
"""Least tokens a chunk: with fewer, states at chunk borders take more memory than what a chunk's tokens are worth."""


@dataclass(frozen=True)
class SegmentPlan:
    """``within`` is the recurrence of a chunk that starts from zeros: the states, then the products of decays.

    ``products`` are the axes of the latter; ``forgets`` says which of them a state has, None where it keeps everything.
    ``separable``: what makes the states, if matmuls over a chunk's tokens give what it makes of zeros, else empty.
    """

    within: Recurrence
    products: tuple[Axes, ...]
    forgets: tuple[int | None, ...]
    separable: tuple[AffineState, ...]


def segment_plan(analysis: Analysis) -> SegmentPlan | None:
    """The plan, or None where a state is not affine, or depends on others."""
    r, affine = analysis.recurrence, analysis.classification.affine
    if not affine or {a.name for a in affine} != {s.name for s in r.states}:
        return None
    known = {a.name: a for a in affine}
    decays: list[tuple[sympy.Expr, Axes]] = []
    forgets: list[int | None] = []
    for s in r.states:
        decay = (known[s.name].decay, known[s.name].decay_axes)
        decays += [] if decay[0] == 1 or decay in decays else [decay]
        forgets.append(None if decay[0] == 1 else decays.index(decay))
    taken = {v.name for v in r.variables} | {s.name for s in r.states}
    products = []
    for i, (decay, axes) in enumerate(decays):
        name = f"product_{i}"
        while name in taken:
            name += "_"
        symbol = State(name, axes, sympy.Integer(1), sympy.Integer(1)).symbol
        products.append(State(name, axes, sympy.Integer(1), symbol * decay))
    within = r.replace(states=(*r.states, *products), output=sympy.Integer(0), variance=None)
    matmuls = all(separable(known[s.name], r.axes_table()) for s in r.states)
    parts = tuple(known[s.name] for s in r.states) if matmuls else ()
    return SegmentPlan(within, tuple(axes for _, axes in decays), tuple(forgets), parts)

"""Source of kernels with a chunk of a head a program, over tiles of key channels: what those of the fold share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from dspace.emit.triton.vector_group import Fold, VectorGroup
from dspace.emit.triton.vector_kernels import LOG2E, Kernels
from dspace.math.ir import AffineState, Variable

PAD = " " * 12
"""Before the lines of the loop."""

PLACE = """
        o_c = tl.arange(0, C)
        live = o_c < (end - begin).to(tl.int32)
        corner = begin * H + i_h
        at = o_c * H  # offsets in a chunk are 32 bit wide, from a start that is 64
        at_chunk = i_c.to(tl.int64) * H + i_h
""".strip("\n").splitlines()
"""Tokens of chunk ``i_c`` of head ``i_h``, from ``begin`` to ``end``, and where they are."""

LOOP = """
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            tile = at[:, None] * K + o_k[None, :]
""".strip("\n").splitlines()
"""Head of the loop over tiles of key channels, with the places of a tile behind the chunk's ``corner``."""


class ChunkKernels(Kernels):
    """Writes kernels in which no variable of a spec has its own name, so that it meets no other."""

    def __init__(self, group: VectorGroup, names: Mapping[str, str]) -> None:
        super().__init__(group, {n: v if n == "scale" else f"x_{v}" for n, v in names.items()})

    def rows(self, variables: Iterable[Variable]) -> list[str]:
        """Loads of inputs and parameters without channels."""
        lines = []
        for v in variables:
            name = self.names[v.name]
            if self.group.wide(v):
                continue
            if v in self.group.parameters:
                lines.append(f"        {name} = tl.load({name}_in + i_h).to(tl.float32)")
            else:
                lines.append(
                    f"        {name}_row = tl.load({name}_in + corner + at, mask=live, other=0.0).to(tl.float32)"
                )
                lines.append(f"        {name} = {name}_row[:, None]")
        return lines

    def wide(self, variables: Iterable[Variable]) -> list[str]:
        """Loads of a tile of inputs and parameters with channels."""
        lines = []
        for v in variables:
            name = self.names[v.name]
            if not self.group.wide(v):
                continue
            if v in self.group.parameters:
                load = f"tl.load({name}_in + i_h * K + o_k, mask=m_k, other=1.0).to(tl.float32)[None, :]"
            else:
                load = f"tl.load({name}_in + corner * K + tile, mask=m_ck, other=0.0).to(tl.float32)"
            lines.append(f"{PAD}{name} = {load}")
        return lines


class FoldKernels(ChunkKernels):
    """Writes kernels that run after the matrix state's sums of decays were made, and take them where decays are alike."""

    def __init__(self, fold: Fold, names: Mapping[str, str]) -> None:
        super().__init__(fold.group, names)
        self.fold = fold

    def rows(self, variables: Iterable[Variable]) -> list[str]:
        """Without an input that is only a decay whose sums are there."""
        fold, states = self.fold, self.group.states
        others = [self.group.write(s) for s in states] + [s.log_decay for s in states if not fold.shared(s)]
        needed = set().union(*(sympy.sympify(e).free_symbols for e in (fold.query, *others)))
        return super().rows(v for v in variables if v != fold.retention or v.symbol in needed)

    def decay_sums(self, state: AffineState) -> list[str]:
        """Those of the matrix state, if its decay is the same."""
        if not self.fold.shared(state):
            return super().decay_sums(state)
        s = self.names[state.name]
        return [f"        {s}_sums = {LOG2E} * tl.load(of_sums + corner + at, mask=live, other=0.0)"]

    def decay_of_chunk(self, state: AffineState) -> str:
        if not self.fold.shared(state):
            return super().decay_of_chunk(state)
        return f"{LOG2E} * tl.load(of_sums + corner + (end - begin - 1).to(tl.int32) * H)"

"""All chunks at once, token by token: affine states whose decays or writes have no matmul form.

Four passes stand on the kernels of the sequential plan, with chunks as their sequences: what every chunk makes of zeros
and the products of its decays; a scan over chunks, elementwise; the tokens from the states at their chunk's start.
Backward: cotangents at the start of every chunk from its own tokens, the same scan from the last chunk, and then those of
inputs and parameters. Where a sequence a program fills the GPU already, the sequential form does less work and stands in.
"""

from __future__ import annotations

from dspace.emit.base import Section
from dspace.emit.cpu.loops import forward_token
from dspace.emit.triton import launching
from dspace.emit.triton.segments_host import host_source
from dspace.emit.triton.sequential import Body, Kernels, splits
from dspace.emit.triton.sequential_host import host_source as sequential_source
from dspace.emit.triton.tiles import TILES, indented, stored
from dspace.math.ir import Analysis, Recurrence
from dspace.plan.segments import segment_plan

LINKS = '''
@_kernel(do_not_specialize=["H"])
def _links_kernel(
    ends, products, initial, final, firsts, H,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, DECAYS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):
    """In place of what each chunk makes of zeros, what it starts from: S' = product S + end.

    A state has SIZE numbers a head, its decay DECAYS, of which number i takes the one of i / STRIDE. REVERSE: from the last
    chunk, cotangents at its end in place of those that its own tokens leave at its start.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    first = tl.load(firsts + i_nh // H)
    count = (tl.load(firsts + i_nh // H + 1) - first).to(tl.int32)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = o < SIZE
    o_d = o // STRIDE % DECAYS
    if initial is None:
        S = tl.zeros([BLOCK], tl.float32)
    else:
        S = tl.load(initial + i_nh * SIZE + o, mask=live, other=0.0).to(tl.float32)
    for i in range(0, count):
        if REVERSE:
            chunk = first + count - 1 - i
        else:
            chunk = first + i
        row = chunk * H + i_nh % H
        end = tl.load(ends + row * SIZE + o, mask=live, other=0.0)
        tl.store(ends + row * SIZE + o, S, mask=live)
        if products is not None:
            S = S * tl.load(products + row * DECAYS + o_d, mask=live, other=0.0)
        S += end
    if final is not None:
        tl.store(final + i_nh * SIZE + o, S, mask=live)
'''


def section(analysis: Analysis) -> Section | None:
    """The section with both forms, or None where :func:`dspace.plan.segments.segment_plan` has no plan."""
    plan = segment_plan(analysis)
    if plan is None:
        return None
    r = analysis.recurrence
    parts = [launching.COMMON, launching.MULTIPROCESSORS, TILES, *Kernels(r, chunks=True).all(analysis.adjoint)]
    parts += [_Within(plan.within).ends(r), LINKS, sequential_source(r, splits(r), chunks=True), host_source(r, plan)]
    return Section(
        device="cuda",
        imports=(*launching.IMPORTS, "import math"),
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk="_chunk_triton_core",
        recurrent="_recurrent_triton_core",
    )


class _Within(Kernels):
    """Writes the kernel that runs the tokens of every chunk from zeros, without reading anything out."""

    def ends(self, r: Recurrence) -> str:
        names = self.names
        arrays = self.leaves((*r.inputs, *r.parameters))
        ends = {s.name: self.namer(f"{names[s.name]}_end") for s in self.r.states}
        doc = "States at the end of every sequence that starts from zeros, and the products of its decays."
        lines = self.signature("_ends_kernel", doc, [*arrays.values(), *ends.values()], "H", "PACKED: tl.constexpr,")
        self.carried = {s.name: names[s.name] for s in self.r.states}
        body = Body(forward_token(self.r, False, readout=False), self.local(), self.namer)
        body.stores = [s for s in body.stores if s.name in body.scheduler.previous]
        used = body.uses()
        loads, shapes = self.parameters(used, arrays)
        before, inside = self.tokens(used, arrays)
        own = {s.name for s in r.states}
        starts = [f"{names[s.name]} = zero_{s.axes}{'' if s.name in own else ' + 1.0'}" for s in self.r.states]
        lines += self.walk([*loads, *before, *starts, *shapes], inside)
        lines += indented([*body.until(body.stores), *self.advance(body)], 2)
        results = {s: stored(ends[s.name], s.axes, "i_nh", names[s.name]) for s in self.r.states}
        return "\n".join([*lines, *indented(self.once(results), 1)]) + "\n"

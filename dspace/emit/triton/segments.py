"""All chunks at once, token by token: affine states whose decays or writes have no matmul form.

What every chunk makes of zeros, by matmuls where writes are products, and the products of its decays; a scan over chunks,
elementwise; the tokens from the states at their chunk's start. Backward: cotangents at the start of every chunk from its
own tokens, the same scan from the last chunk, and then those of inputs and parameters. Where a sequence a program fills the GPU already, the sequential form does less work and stands in.
"""

from __future__ import annotations

from dspace.emit.base import Section
from dspace.emit.triton import launching
from dspace.emit.triton.segment_ends import STEP, Ends
from dspace.emit.triton.segment_kernels import Chunks
from dspace.emit.triton.segments_host import host_source
from dspace.emit.triton.sequential import Kernels, splits
from dspace.emit.triton.sequential_host import host_source as sequential_source
from dspace.emit.triton.tiled import CHANNELS, TILE
from dspace.emit.triton.tiles import TILES
from dspace.math.ir import Analysis
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
    kernels, chunks = Kernels(r), Chunks(r)
    parts = [
        launching.COMMON,
        launching.MULTIPROCESSORS,
        launching.EXACT,
        TILES,
        *kernels.all(analysis.adjoint),
        CHANNELS,
    ]
    parts += [STEP, Ends(plan).kernel()] if plan.separable else [Chunks(plan.within).ends(r.states)]
    parts += [LINKS, chunks.outputs(), *(chunks.chunk_backward(analysis.adjoint, v) for v in kernels.asked())]
    parts += [sequential_source(r, splits(r)), TILE, host_source(r, plan)]
    return Section(
        device="cuda",
        imports=(*launching.IMPORTS, "import math"),
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk="_chunk_triton_core",
        recurrent="_recurrent_triton_core",
    )

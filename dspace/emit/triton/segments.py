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
from dspace.emit.triton.sequential import BACKWARD, SHARED, Body, Kernels, Reverse, splits
from dspace.emit.triton.sequential_host import host_source as sequential_source
from dspace.emit.triton.tiles import TILES, given_end, indented, load, place_of, raw, shaped, stored
from dspace.math.gradients import new_symbol
from dspace.math.ir import Adjoint, Analysis, Recurrence
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

_AT = "            at = (first + tl.minimum(count - 1, i_t)) * H + i_h"


def section(analysis: Analysis) -> Section | None:
    """The section with both forms, or None where :func:`dspace.plan.segments.segment_plan` has no plan."""
    plan = segment_plan(analysis)
    if plan is None:
        return None
    r = analysis.recurrence
    parts = [launching.COMMON, launching.MULTIPROCESSORS, TILES, *Kernels(r, chunks=True).all(analysis.adjoint)]
    parts += [_Chunks(plan.within).ends(r), LINKS]
    parts += [_Chunks(r).chunk_backward(analysis.adjoint, variance) for variance in Kernels(r).asked()]
    parts += [sequential_source(r, splits(r), chunks=True), host_source(r, plan)]
    return Section(
        device="cuda",
        imports=(*launching.IMPORTS, "import math"),
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk="_chunk_triton_core",
        recurrent="_recurrent_triton_core",
    )


class _Chunks(Kernels):
    """Writes the kernels that have no use for sequences: a chunk from zeros, and a chunk backward."""

    def ends(self, r: Recurrence) -> str:
        """The tokens of every chunk from zeros, nothing read out: of ``r`` and the products of its decays."""
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

    def chunk_backward(self, adjoint: Adjoint, variance: bool) -> str:
        """Tokens of a chunk in reverse, EVERY at a time: unrolled, with all their states in registers.

        States that are written and read once a token, as sequences have them, would be most of what this takes: eight
        times the bytes of everything else. Behind the last token it is run again and again, and what it does is left out.
        """
        r, names, x = self.r, self.names, self.reverse(adjoint, variance)
        arguments = [*x.arrays.values(), *x.saved.values(), *x.d_arrays.values(), *x.d_end.values()]
        arguments += [*x.d_out.values(), *x.d_start.values()]
        doc = "Cotangents of a chunk's inputs with INPUTS, of parameters then, and of its start where that is not None."
        name = "_segment_backward_variance_kernel" if variance else "_segment_backward_kernel"
        flags = "PACKED: tl.constexpr, EVERY: tl.constexpr,\n    INPUTS: tl.constexpr,"
        lines = [*self.signature(name, doc, arguments, "TOTAL, SUB, H", flags), *SHARED]
        loads, shapes = self.parameters(x.used | x.read, x.arrays)
        lines += indented([*loads, *shapes], 1)
        for s in r.states:
            end, local = x.d_end[s.name], x.d_local[s.name]
            value = [
                f"if {end} is None:",
                f"    {local} = zero_{s.axes}",
                "else:",
                f"    {local} = {given_end(s, end)}",
            ]
            lines += indented(value, 1)
        lines += [f"    {x.sums[p.name]} = zero_{p.axes}" for p in r.parameters]
        lines += [*BACKWARD, "        slot = (i_n * SUB + segment) * H + i_h"]
        lines += [f"        {names[s.name]} = {load(x.saved[s.name], s.axes, 'slot')}" for s in r.states]
        again, back, rows = self.rows(x)
        pasts = [x.past[s.name] for s in r.states]
        lines += [f"        {row} = ()" for row in (*rows, *pasts)]
        lines += ["        for i_t in tl.static_range(EVERY):  # everything is loaded before it is used", _AT]
        lines += indented((f"{row} = {row} + ({text},)" for row, text in rows.items()), 3)
        lines += ["        for i_t in tl.static_range(EVERY):", _AT]
        lines += indented((f"{x.past[s.name]} = {x.past[s.name]} + ({names[s.name]},)" for s in r.states), 3)
        lines += indented([*again, *x.again.until(x.again.stores), *self.advance(x.again)], 3)
        lines += ["        for i_t in tl.static_range(EVERY - 1, -1, -1):", _AT, "            live = count > i_t"]
        lines += indented((f"{x.old[s.name]} = {x.past[s.name]}[i_t]" for s in r.states), 3)
        lines += indented([*back, *x.back.until(x.back.stores)], 3)
        self.carried = {f"d_{s.name}": x.d_local[s.name] for s in r.states}
        results = []
        for store in x.back.stores:
            if store.add:
                total = x.sums[store.name.removeprefix("d_")]
                results.append(f"{total} += tl.where(live, {x.back.full(store)}, 0.0)")
            elif store.name not in self.carried:
                array, row = self.result_of(store, x)
                results.append(stored(array, store.axes, row, x.back.full(store), "live"))
        lines += indented(["if INPUTS:", *indented(results, 1)] if results else [], 3)
        lines += indented(self.advance(x.back, "live"), 3)
        lines += indented((f"{names[s.name]} = {x.old[s.name]}" for s in r.states if new_symbol(s) in x.read), 3)
        totals = self.totals(x)
        lines += indented(["if INPUTS:", *indented(totals, 1)] if totals else [], 1)
        for s in r.states:
            start = x.d_start[s.name]
            lines += [
                f"    if {start} is not None:",
                *indented([stored(start, s.axes, place_of(s.axes), x.d_local[s.name])], 2),
            ]
        return "\n".join(lines) + "\n"

    def rows(self, x: Reverse) -> tuple[list[str], list[str], dict[str, str]]:
        """What gives a token its inputs in the two loops, and the tuples these are loaded into: name, load of one.

        A ``kv`` input is loaded when it is used: tiles of it would crowd out the states.
        """
        again, back, rows = [], [], {}
        wanted = [(v.symbol, self.names[v.name], x.arrays[v.name], v.axes) for v in self.r.inputs]
        wanted += [(c.symbol, x.d_given[c.name], x.d_arrays[c.name], c.axes) for c in x.given]
        for symbol, name, array, axes in wanted:
            if axes == "kv":
                line = f"{name} = {load(array, axes, 'at')}"
            elif symbol in x.used | x.read:
                row = self.namer(f"{name}_rows")
                rows[row] = raw(array, axes, "at")
                line = f"{name} = {row}[i_t]{shaped(axes)}"
            again += [line] if symbol in x.used else []
            back += [line] if symbol in x.read else []
        return again, back, rows

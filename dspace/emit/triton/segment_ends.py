"""What a chunk makes of zeros, by matmuls: states at its end are sums over its tokens of decayed keys times values.

Tokens are taken from the last one on, so that decays behind a token are sums that start there: none is a difference of
large ones, and none of the exponents is positive.
"""

from __future__ import annotations

import sympy

from dspace.emit.triton.printer import TritonPrinter
from dspace.emit.triton.sequential import Kernels
from dspace.emit.triton.tiles import indented
from dspace.math.ir import AffineState, Axes, Variable, axes_of
from dspace.plan.segments import CHUNK, SegmentPlan

STEP = '''
@_kernel
def _steps(log_decay, live):
    """Log decays; exp(-40) is nothing beside 1, and a longer step would only cost the sums their digits. NaN stays."""
    log_decay = tl.where(log_decay < -40.0, -40.0, log_decay)
    return tl.where(live, tl.where(log_decay > 0.0, 0.0, log_decay), 0.0)
'''

_HEAD = """    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = pid // NV % NK
    i_n = (pid // (NV * NK) // H).to(tl.int64)
    i_h = pid // (NV * NK) % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    o_k = i_k * BK + tl.arange(0, BK)[None, :]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    m_k, m_v = o_k < K, o_v < V
    t_kv = (i_k * BK + tl.arange(0, BK))[:, None] * V + o_v
    m_kv = ((i_k * BK + tl.arange(0, BK))[:, None] < K) & m_v"""

_TILE: dict[Axes, tuple[str, str, str]] = {
    "": ("", "", "1"),
    "k": (" * K + o_k", " & m_k", "BK"),
    "v": (" * V + o_v", " & m_v", "BV"),
}
_WRITER: dict[Axes, str] = {"": "if i_k + i_v == 0:", "k": "if i_v == 0:", "v": "if i_k == 0:"}


class Ends(Kernels):
    """Writes the kernel of a plan whose states are separable."""

    head = _HEAD

    def __init__(self, plan: SegmentPlan) -> None:
        super().__init__(plan.within)
        self.plan = plan

    def kernel(self) -> str:
        r, plan, names = self.r, self.plan, self.names
        arrays = self.leaves((*r.inputs, *r.parameters))
        ends = [self.namer(f"{names[s.name]}_end") for s in r.states]
        doc = f"States at the end of every chunk that starts from zeros, by matmuls over {CHUNK} tokens; products of its decays."
        flags = "PACKED: tl.constexpr, PRECISION: tl.constexpr,"
        lines = self.signature("_ends_kernel", doc, [*arrays.values(), *ends], "H", flags)
        used = {x for s in plan.separable for e in _parts(s) for x in e.free_symbols}
        lines += indented((self.loaded(p, arrays[p.name], "i_h", "") for p in r.parameters if p.symbol in used), 1)
        lines += [f"    {names[s.name]} = tl.zeros([BK, BV], tl.float32)" for s in plan.separable]
        behind = [self.namer(f"behind_{i}") for i in range(len(plan.products))]
        lines += [
            f"    {b} = tl.zeros([1, {_TILE[a][2]}], tl.float32)" for b, a in zip(behind, plan.products, strict=True)
        ]
        lines += [
            f"    for back in range(0, tl.cdiv(steps, {CHUNK})):",
            f"        place = steps - 1 - back * {CHUNK} - tl.arange(0, {CHUNK})[:, None]  # the last token first",
            "        live = place >= 0",
            "        at = (begin + tl.maximum(place, 0)) * H + i_h",
        ]
        lines += indented((self.loaded(v, arrays[v.name], "at", "live") for v in r.inputs if v.symbol in used), 2)
        kept = [self.namer(f"kept_{i}") for i in range(len(plan.products))]
        for i, axes in enumerate(plan.products):
            log_decay = next(s.log_decay for s, f in zip(plan.separable, plan.forgets, strict=True) if f == i)
            assert log_decay is not None  # else the plan would not have it separable
            lines += indented(self.decay(behind[i], kept[i], self.spread(log_decay, axes)), 2)
        key, value = self.namer("key"), self.namer("value")
        for s, forgets in zip(plan.separable, plan.forgets, strict=True):
            weights = {"k": "", "v": ""}
            if forgets is not None:
                weights["v" if plan.products[forgets] == "v" else "k"] = f" * {kept[forgets]}"
            for w in s.writes:
                lines += [
                    f"        {key} = tl.where(live, ({self.spread(w.key, 'k')}){weights['k']}, 0.0)",
                    f"        {value} = tl.where(live, ({self.spread(w.value, 'v')}){weights['v']}, 0.0)",
                    f"        {names[s.name]} = tl.dot(tl.trans({key}), {value}, {names[s.name]}, input_precision=PRECISION)",
                ]
        for array, state in zip(ends, plan.separable, strict=False):
            lines.append(f"    tl.store({array} + i_nh * K * V + t_kv, {names[state.name]}, mask=m_kv)")
        for array, b, axes in zip(ends[len(plan.separable) :], behind, plan.products, strict=True):
            part, mask, _ = _TILE[axes]
            product = f"tl.exp({b}), mask={mask.removeprefix(' & ')}" if axes else f"tl.sum(tl.exp({b}))"
            lines += [f"    {_WRITER[axes]}", f"        tl.store({array} + i_nh{part}, {product})"]
        return "\n".join(lines) + "\n"

    def decay(self, behind: str, kept: str, log_decay: str) -> list[str]:
        """What of a token's write there is at the end, from the log decays behind it, of later tokens taken together."""
        step, total = self.namer("step"), self.namer("total")
        return [
            f"{step} = _steps({log_decay}, live)",
            f"{total} = tl.cumsum({step}, axis=0)",
            f"{kept} = tl.exp({behind} + ({total} - {step}))",
            f"{behind} += tl.sum({step}, axis=0)[None, :]",
        ]

    def loaded(self, v: Variable, array: str, row: str, live: str) -> str:
        """A line that loads a variable's tile: tokens are rows."""
        part, mask, _ = _TILE[v.axes]
        mask = (live + mask).removeprefix(" & ")
        text = f"tl.load({array} + {row}{part}, mask={mask}, other=0.0)" if mask else f"tl.load({array} + {row})"
        return f"{self.names[v.name]} = {text}.to(tl.float32)"

    def spread(self, expr: sympy.Expr, axes: Axes) -> str:
        """``expr`` as a tile of tokens and all channels of ``axes``; numbers of a token or a head are spread."""
        text = TritonPrinter(self.names)(expr)
        own = any(v.symbol in expr.free_symbols for v in self.r.inputs)
        whole = own and axes_of(expr, self.r.axes_table()) == axes
        return text if whole else f"{text} + tl.zeros([{CHUNK}, {_TILE[axes][2]}], tl.float32)"


def _parts(state: AffineState) -> list[sympy.Expr]:
    """Everything that a state is made of."""
    found = [e for w in state.writes for e in (w.key, w.value)]
    return found if state.log_decay is None else [*found, state.log_decay]

"""States with one axis or none, on a GPU: evaluated at every token, with the features made of them.

A vector state (a normaliser, a precision over k) is a feature of every token, most often inside a query that it
divides. Three passes over tiles of channels: what each chunk does to the state (its decay and its own writes, all
chunks at once), the states at chunk borders (a scan over chunks), then all chunks at once again, each scanning
``S_t = decay_t S_(t-1) + write_t`` in float32 from its border and storing only the features that need it. The backward
pass does the same with cotangents in reverse; its expressions are the symbolic derivatives of the same maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dspace.emit.triton.printer import TritonPrinter
from dspace.emit.triton.vector_host import host
from dspace.math.ir import AffineState, Axes, Variable


@dataclass(frozen=True)
class VectorGroup:
    """States on the same axis, and the features on that axis that are computed with them.

    ``raw`` states are also stored themselves, for expressions outside the kernel.
    """

    axes: Axes
    states: tuple[AffineState, ...]
    symbols: Mapping[str, sympy.Symbol]
    inputs: tuple[Variable, ...]
    parameters: tuple[Variable, ...]
    features: Mapping[str, sympy.Expr]

    @property
    def tag(self) -> str:
        return self.axes or "scalar"

    def write(self, state: AffineState) -> sympy.Expr:
        return sympy.Add(*(w.key * w.value for w in state.writes))


COMPOSE = '''
@_kernel
def _compose(decay_a, write_a, decay_b, write_b):
    """One step S -> decay S + write after another."""
    return decay_a * decay_b, write_a * decay_b + write_b
'''

CARRY = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _carry_vector_kernel(
    total, local, start, border, final, offsets, bases, T, NT, H,
    W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr,
):
    """Values at chunk borders from what each chunk does: value' = total value + local, in either direction."""
    NW: tl.constexpr = (W + BW - 1) // BW
    pid = tl.program_id(0)
    i_nh = (pid // NW).to(tl.int64)
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_w = (pid % NW) * BW + tl.arange(0, BW)
    m_w = o_w < W
    chunks = tl.cdiv(end - begin, C)
    value = tl.load(start + i_nh * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    first = chunks - 1 if REVERSE else chunks * 0
    tl.store(border + ((base + first) * H + i_h) * W + o_w, value, mask=o_w < tl.where(begin < end, W, 0))
    for i in range(0, chunks, BN):
        step = i + tl.arange(0, BN)
        chunk = chunks - 1 - step if REVERSE else step
        at = ((base + chunk) * H + i_h)[:, None] * W + o_w[None, :]
        mask = (step < chunks)[:, None] & m_w[None, :]
        decay = tl.load(total + at, mask=mask, other=1.0)
        write = tl.load(local + at, mask=mask, other=0.0)
        decay, write = tl.associative_scan((decay, write), 0, _compose)
        after = decay * value[None, :] + write
        there = at - H * W if REVERSE else at + H * W
        tl.store(border + there, after, mask=mask & (step + 1 < chunks)[:, None])
        value = tl.sum(tl.where(tl.arange(0, BN)[:, None] == BN - 1, after, 0.0), axis=0)
    tl.store(final + i_nh * W + o_w, value, mask=m_w)
'''

BEFORE = '''
def _before(values, initial, offsets):
    """Values before each token, from those after it and the initial ones."""
    if offsets is None:
        return torch.cat([initial[:, None], values[:, :-1]], 1)
    rows = torch.arange(values.shape[1], device=values.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    first = (rows == offsets[sequence]).view(1, -1, *(1,) * (values.dim() - 2))
    return torch.where(first, initial[sequence][None], torch.cat([values[:, :1], values[:, :-1]], 1))
'''


def source(group: VectorGroup, names: Mapping[str, str]) -> str:
    """Kernels, launches, operators and the function ``_vector_TAG`` of one group."""
    return "\n".join(
        [
            _sums_kernel(group, names),
            _forward_kernel(group, names),
            _backward_kernel(group, names, whole=False),
            _backward_kernel(group, names, whole=True),
            host(group),
        ]
    )


def _statements(exprs: Mapping[str, sympy.Expr], names: Mapping[str, str], indent: str) -> list[str]:
    """Assignments of ``exprs``, with common subexpressions named first."""
    show = TritonPrinter(names)
    shared, results = sympy.cse(
        list(exprs.values()), symbols=(sympy.Symbol(f"c{i}", real=True) for i in range(10**6)), order="none"
    )
    lines = [f"{indent}{symbol.name} = {show(value)}" for symbol, value in shared]
    return lines + [f"{indent}{name} = {show(value)}" for name, value in zip(exprs, results, strict=True)]


def _load(group: VectorGroup, names: Mapping[str, str], variable: Variable, at: str, mask: str) -> str:
    name = names[variable.name]
    if variable.axes and group.axes:
        return f"tl.load({name}_in + ({at})[:, None] * W + o_w[None, :], mask=({mask})[:, None] & m_w[None, :], other=0.0).to(tl.float32)"
    return f"tl.load({name}_in + {at}, mask={mask}, other=0.0).to(tl.float32)[:, None]"


_HEAD = """    NW: tl.constexpr = (W + BW - 1) // BW
    pid = tl.program_id(0)
    i_w = pid % NW
    i_h = (pid // NW) % H
    i_c = pid // (NW * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    o_w = i_w * BW + tl.arange(0, BW)
    m_w = o_w < W
    o_c = tl.arange(0, C)
    at_border = (i_c.to(tl.int64) * H + i_h) * W + o_w"""


def _parameters(group: VectorGroup, names: Mapping[str, str]) -> list[str]:
    lines = []
    for p in group.parameters:
        name = names[p.name]
        if p.axes and group.axes:
            lines.append(
                f"    {name} = tl.load({name}_in + i_h * W + o_w, mask=m_w, other=1.0).to(tl.float32)[None, :]"
            )
        else:
            lines.append(f"    {name} = tl.load({name}_in + i_h).to(tl.float32)")
    return lines


def _signature(kernel: str, arguments: list[str]) -> list[str]:
    return [
        '@_kernel(do_not_specialize=["T", "NT", "H", "TOTAL"])'
        if "TOTAL" in arguments
        else '@_kernel(do_not_specialize=["T", "NT", "H"])',
        f"def {kernel}(",
        f"    {', '.join(arguments)},",
        "    spans, scale, T, NT, H,",
        "    W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, RAW: tl.constexpr, PACKED: tl.constexpr,",
        "):",
    ]


def _scan(group: VectorGroup, names: Mapping[str, str]) -> list[str]:
    """Lines that compute every state before (``S_before``) and after (``S``) each token of a chunk."""
    pad = " " * 8
    lines = [f"{pad}# the decays and writes of the token before, so that the scan ends just before each token"]
    earlier = {v.name: names[v.name] + "_" for v in group.inputs}
    shifted = {**names, **earlier}
    for v in group.inputs:
        lines.append(f"{pad}{earlier[v.name]} = " + _load(group, names, v, "at - H", "inner"))
    for s in group.states:
        name = names[s.name]
        lines += _statements({"decay": s.decay, "write": group.write(s)}, shifted, pad)
        lines += [
            f"{pad}decay = tl.where(inner[:, None] & m_w[None, :], decay, 1.0)",
            f"{pad}write = tl.where(inner[:, None] & m_w[None, :], write, 0.0)",
            f"{pad}decay, write = tl.associative_scan((decay, write), 0, _compose)",
            f"{pad}{name}_before = decay * {name}_start[None, :] + write",
        ]
    for v in group.inputs:
        lines.append(f"{pad}{names[v.name]} = " + _load(group, names, v, "at", "live"))
    for s in group.states:
        name = names[s.name]
        lines += _statements({f"{name}_decay": s.decay, "write": group.write(s)}, names, pad)
        lines += [
            f"{pad}{name}_decay = tl.where(live[:, None] & m_w[None, :], {name}_decay, 1.0)",
            f"{pad}{name} = {name}_decay * {name}_before + tl.where(live[:, None] & m_w[None, :], write, 0.0)",
        ]
    return lines


_CHUNK = """    if begin < end:
        row = begin + o_c
        live = row < end
        inner = (row <= end) & (o_c > 0)  # the token before is one of this chunk
        at = row * H + i_h
        wide = at[:, None] * W + o_w[None, :]
        m_cw = live[:, None] & m_w[None, :]"""


def _sums_kernel(group: VectorGroup, names: Mapping[str, str]) -> str:
    states = [names[s.name] for s in group.states]
    arguments = [f"{names[v.name]}_in" for v in (*group.inputs, *group.parameters)]
    arguments += [f"{s}_{part}" for part in ("total", "local") for s in states]
    lines = _signature(f"_vector_{group.tag}_sums_kernel", arguments)
    lines += ['    """What a chunk does to each state: S\' = total S + local."""', _HEAD]
    lines += [*_parameters(group, names), _CHUNK]
    for v in group.inputs:
        lines.append(f"        {names[v.name]} = " + _load(group, names, v, "at", "live"))
    for s in group.states:
        name = names[s.name]
        lines += _statements({"decay": s.decay, "write": group.write(s)}, names, " " * 8)
        lines += [
            "        decay = tl.where(m_cw, decay, 1.0)",
            "        write = tl.where(m_cw, write, 0.0)",
            "        decay, write = tl.associative_scan((decay, write), 0, _compose)",
            "        ending = o_c[:, None] == C - 1",
            f"        tl.store({name}_total + at_border, tl.sum(tl.where(ending, decay, 0.0), axis=0), mask=m_w)",
            f"        tl.store({name}_local + at_border, tl.sum(tl.where(ending, write, 0.0), axis=0), mask=m_w)",
        ]
    return "\n".join(lines) + "\n"


def _forward_kernel(group: VectorGroup, names: Mapping[str, str]) -> str:
    states = [names[s.name] for s in group.states]
    arguments = [f"{names[v.name]}_in" for v in (*group.inputs, *group.parameters)]
    arguments += [f"{f}_out" for f in group.features]
    arguments += [f"{s}_{part}" for part in ("out", "border") for s in states]
    lines = _signature(f"_vector_{group.tag}_kernel", arguments)
    about = "; ".join(f"{s.name} = {s.decay} {s.name} + {group.write(s)}" for s in group.states)
    lines += [f'    """{about}; features of every token."""', _HEAD, *_parameters(group, names)]
    lines += [_CHUNK]
    lines += [f"        {s}_start = tl.load({s}_border + at_border, mask=m_w, other=0.0)" for s in states]
    lines += _scan(group, names)
    lines += _statements({f"{f}_now": e for f, e in group.features.items()}, names, " " * 8)
    for f in group.features:
        lines.append(f"        tl.store({f}_out + wide, ({f}_now).to({f}_out.dtype.element_ty), mask=m_cw)")
    lines.append("        if RAW:")
    lines += [f"            tl.store({s}_out + wide, {s}, mask=m_cw)" for s in states]
    return "\n".join(lines) + "\n"


def _backward_kernel(group: VectorGroup, names: Mapping[str, str], whole: bool) -> str:
    """The kernel of all cotangents (``whole``), or of what a chunk does to those of the states."""
    states = [names[s.name] for s in group.states]
    leaves = (*group.inputs, *group.parameters)
    arguments = [f"{names[v.name]}_in" for v in leaves] + [f"{s}_border" for s in states]
    arguments += [f"d_{f}_in" for f in group.features] + [f"d_{s}_in" for s in states]
    if whole:
        arguments += [f"d_{s}_border" for s in states] + [f"d_{names[v.name]}_out" for v in leaves] + ["TOTAL"]
        about = "Cotangents of the inputs, and of the parameters from each chunk."
    else:
        arguments += [f"{s}_{part}" for part in ("total", "local") for s in states]
        about = "What a chunk does to the cotangent of each state, last token first: dS' = total dS + local."
    lines = _signature(f"_vector_{group.tag}_{'backward' if whole else 'back_sums'}_kernel", arguments)
    lines += [f'    """{about}"""', _HEAD, *_parameters(group, names), _CHUNK]
    lines += [f"        {s}_start = tl.load({s}_border + at_border, mask=m_w, other=0.0)" for s in states]
    if whole:
        lines += [f"        {s}_carry = tl.load(d_{s}_border + at_border, mask=m_w, other=0.0)" for s in states]
    lines += _scan(group, names)
    for f in group.features:
        lines.append(f"        d_{f} = tl.load(d_{f}_in + wide, mask=m_cw, other=0.0).to(tl.float32)")
    cotangent = {f: sympy.Symbol(f"d_{f}", real=True) for f in group.features}
    local = {**names, **{c.name: c.name for c in cotangent.values()}}
    through = {
        f"{names[s.name]}_in_token": sympy.Add(
            *(cotangent[f] * sympy.diff(e, group.symbols[s.name]) for f, e in group.features.items())
        )
        for s in group.states
    }
    lines += _statements(through, local, " " * 8)
    lines.append("        if RAW:")
    lines += [
        f"            {s}_in_token += tl.load(d_{s}_in + wide, mask=m_cw, other=0.0)"
        if group.features
        else f"            {s}_in_token = tl.load(d_{s}_in + wide, mask=m_cw, other=0.0)"
        for s in states
    ]
    lines += ["        # cotangent of a state = its own part of this token + next token's decay times next cotangent"]
    later = {v.name: names[v.name] + "_" for v in group.inputs}
    for v in group.inputs:
        lines.append(
            f"        {later[v.name]} = " + _load(group, names, v, "at + H", "live & (o_c < C - 1) & (row + 1 < end)")
        )
    for s in group.states:
        name = names[s.name]
        lines += _statements({"decay": s.decay}, {**names, **later}, " " * 8)
        lines += [
            "        follows = live & (o_c < C - 1) & (row + 1 < end)",
            "        decay = tl.where(follows[:, None] & m_w[None, :], decay, 1.0)",
            f"        write = tl.where(m_cw, {name}_in_token, 0.0)",
            "        decay, write = tl.associative_scan((decay, write), 0, _compose, reverse=True)",
        ]
        if whole:
            lines.append(f"        d_{name} = decay * {name}_carry[None, :] + write")
            continue
        lines += [
            "        starting = o_c[:, None] == 0",
            f"        decay = tl.sum(tl.where(starting, {name}_decay * decay, 0.0), axis=0)",
            f"        write = tl.sum(tl.where(starting, {name}_decay * write, 0.0), axis=0)",
            f"        tl.store({name}_total + at_border, decay, mask=m_w)",
            f"        tl.store({name}_local + at_border, write, mask=m_w)",
        ]
    if not whole:
        return "\n".join(lines) + "\n"
    gradients = {}
    for v in leaves:
        terms = [cotangent[f] * sympy.diff(e, v.symbol) for f, e in group.features.items()]
        for s in group.states:
            incoming = sympy.Symbol(f"d_{names[s.name]}", real=True)
            before = sympy.Symbol(f"{names[s.name]}_before", real=True)
            terms.append(incoming * (sympy.diff(group.write(s), v.symbol) + before * sympy.diff(s.decay, v.symbol)))
        gradients[f"grad_{names[v.name]}"] = sympy.Add(*terms)
    lines += _statements(gradients, local, " " * 8)
    for v in group.inputs:
        name = names[v.name]
        if v.axes and group.axes:
            lines.append(
                f"        tl.store(d_{name}_out + wide, tl.where(m_cw, grad_{name}, 0.0).to(d_{name}_out.dtype.element_ty), mask=m_cw)"
            )
        else:
            lines.append(
                f"        tl.store(d_{name}_out + i_w * TOTAL + at, tl.sum(tl.where(m_cw, grad_{name}, 0.0), axis=1), mask=live)"
            )
    for p in group.parameters:
        name = names[p.name]
        lines.append(
            f"        tl.store(d_{name}_out + at_border, tl.sum(tl.where(m_cw, grad_{name}, 0.0), axis=0), mask=m_w)"
        )
    return "\n".join(lines) + "\n"

"""Kernels of class c, backward, through chunks: adjoints at chunk ends, and the gradients that come through them."""

from __future__ import annotations

from dspace.emit.triton.ratio_backward import along, chain
from dspace.emit.triton.ratio_text import OPTIONS, RatioPrinter, Words, key_lines, signature


def carry_kernel(words: Words) -> str:
    """Scan over the chunks of a sequence, last to first."""
    plan, states = words.plan, words.states
    count = len(states)
    pointers = ["chunks", "adjoints", *words.sums, *(f"d_{s}_end" for s in states), *(f"d_{s}_start" for s in states)]
    pointers += ["products", "offsets", "bases"]
    lines = signature(
        "_carry_kernel",
        pointers,
        "T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr",
    )
    lines += '''
    """What each chunk hands over becomes, in place, the adjoint at the chunk's end; products: <start state, adjoint>."""
    parts = tl.num_programs(0)
    i_e = tl.program_id(0)
    i_n = tl.program_id(1) // H
    i_h = tl.program_id(1) % H
    begin, end, base = _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED)
    NK: tl.constexpr = (K + BK - 1) // BK
    o_k = i_e % NK * BK + tl.arange(0, BK)
    o_v = i_e // NK * BV + tl.arange(0, BV)
    m_e = (o_v < V)[:, None] & (o_k < K)[None, :]
    tile = o_v[:, None] * K + o_k[None, :]
    user = (i_n.to(tl.int64) * H + i_h) * K * V + (o_k[None, :] * V + o_v[:, None])
    chunks_here = tl.cdiv(end - begin, 16)
'''.strip("\n").splitlines()
    for s in states:
        lines.append(f"    d_{s} = tl.load(d_{s}_end + user, mask=m_e, other=0.0).to(tl.float32)")
    lines += [
        "    for i_r in range(0, chunks_here):",
        "        i_c = chunks_here - 1 - i_r",
        f"        slot = ((base + i_c) * H + i_h) * {count} * V * K",
        "        last = (tl.minimum(begin + i_c * 16 + 16, end) - 1) * H + i_h",
    ]
    for i in range(count):
        lines += [
            f"        handed_{i} = tl.load(adjoints + slot + {i} * V * K + tile, mask=m_e, other=0.0).to(tl.float32)",
            f"        start_{i} = tl.load(chunks + slot + {i} * V * K + tile, mask=m_e, other=0.0).to(tl.float32)",
        ]
    for i, s in enumerate(states):
        group = plan.states[i].group
        lines += [
            f"        tl.store(adjoints + slot + {i} * V * K + tile, d_{s}.to(adjoints.dtype.element_ty), mask=m_e)",
            f"        d_{s} = handed_{i} + tl.exp(tl.load(sums_{group} + last)) * d_{s}",
        ]
    for d in range(len(plan.decays)):
        inner = " + ".join(f"start_{i} * d_{s}" for i, s in enumerate(states) if plan.states[i].group == d)
        at = f"(((base + i_c) * H + i_h) * {len(plan.decays)} + {d}) * parts + i_e"
        lines.append(f"        tl.store(products + {at}, tl.sum(tl.sum({inner}, 1), 0))")
    lines += [f"    tl.store(d_{s}_start + user, d_{s}, mask=m_e)" for s in states]
    return "\n".join(lines) + "\n"


def settle_kernel(words: Words) -> str:
    """The part of the gradients that comes through the adjoint at the chunk's end, added to the chunk's own part."""
    plan = words.plan
    keyed, valued = words.tensors("k", plan.keys), words.tensors("v", plan.values)
    both = words.tensors("k", [*plan.keys, *plan.bodies])
    channels = words.tensors("v", [*plan.values, *plan.bodies])
    pointers = [*(f"{n}_in" for n in (*keyed, *valued)), *words.sums, "adjoints", "products"]
    pointers += along(words)
    pointers += [*(f"d_{n}_part" for n in (*both, *channels)), *(f"d_{n}_out" for n in (*both, *channels))]
    pointers += [f"d_decay_{d}" for d in range(len(plan.decays))] + ["spans"]
    lines = signature(
        "_settle_kernel",
        pointers,
        "T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,\n"
        f"    PARTS: tl.constexpr, BP: tl.constexpr, {OPTIONS}",
    )
    lines += '''
    """Final gradients of one chunk of one head; BK covers all key channels."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    o_c = tl.arange(0, 16)
    o_p = tl.arange(0, BP)
    o_k = tl.arange(0, BK)
    start = begin * H + i_h
    own = i_c.to(tl.int64) * 16 * H + i_h
    slot = i_c.to(tl.int64) * H + i_h
    at = o_c * H
    live = begin + o_c < end
    m_k = o_k < K
    m_ck = live[:, None] & m_k[None, :]
    at_k = at[:, None] * K + o_k[None, :]
'''.strip("\n").splitlines()
    for d in range(len(plan.decays)):
        lines += [
            f"    whole = tl.load(sums_{d} + (end - 1) * H + i_h, mask=begin < end, other=0.0)",
            f"    part = tl.load(sums_{d} + start + at, mask=live, other=0.0)",
            f"    until_{d} = tl.where(live, tl.exp(tl.minimum(whole - part, 0.0)), 0.0)",
        ]
    lines += [f"    {a}_t = tl.load({a} + own + at, mask=live, other=0.0)" for a in along(words)]
    for n in keyed:
        lines += [
            f"    raw_{n} = tl.load({n}_in + start * K + at_k, mask=m_ck, other=0.0)",
            f"    {n} = raw_{n}.to(tl.float32)",
        ]
    lines += key_lines(words, "", 4)
    lines += [f"    d_key_{j} = tl.zeros([16, BK], tl.float32)" for j in range(len(plan.keys))]
    show = RatioPrinter(words.names)
    lines += """
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_cv = live[:, None] & m_v[None, :]
        at_v = at[:, None] * V + o_v[None, :]
        tile = o_v[:, None] * K + o_k[None, :]
        m_tile = m_v[:, None] & m_k[None, :]
""".strip("\n").splitlines()
    for n in valued:
        lines.append(f"        {n} = tl.load({n}_in + start * V + at_v, mask=m_cv, other=0.0).to(tl.float32)")
    lines += [f"        value_{j} = {show(e)}" for j, e in enumerate(plan.values)]
    grads: dict[int, list[str]] = {}
    for i, s in enumerate(plan.states):
        state = words.of(s.symbol)
        lines.append(
            f"        d_{state} = tl.load(adjoints + (slot * {len(plan.states)} + {i}) * V * K + tile, mask=m_tile, other=0.0).to(OT)"
        )
        for m, w in enumerate(s.writes):
            rows, weight = f"d_rows_{i}_{m}", f"until_{s.group}[:, None]"
            lines += [
                f"        {rows} = tl.dot(key_{w.key}, tl.trans(d_{state}), input_precision=PRECISION) * {weight}",
                f"        weighted = (value_{w.value} * {weight}).to(OT)",
                f"        d_key_{w.key} = tl.dot(weighted, d_{state}, d_key_{w.key}, input_precision=PRECISION)",
                f"        wrote = tl.sum({rows} * value_{w.value}, 1)",
                f"        along_{s.group}_t -= wrote",
            ]
            if plan.exclusive:
                lines.append(f"        wrote_{s.group}_t += wrote")
            grads.setdefault(w.value, []).append(rows)
    lines += [f"        d_value_{j} = {' + '.join(g)}" for j, g in grads.items()]
    for t in plan.tensors:
        if t.axes == "v":
            n = words.of(t)
            terms = chain(plan.values, t.symbol, "d_value_", show)
            lines += [
                f"        inner = tl.load(d_{n}_part + own * V + at_v, mask=m_cv, other=0.0)",
                f"        tl.store(d_{n}_out + start * V + at_v, ({' + '.join(['inner', *terms])}).to(d_{n}_out.dtype.element_ty), mask=m_cv)",
            ]
    for t in plan.tensors:
        if t.axes == "k":
            n = words.of(t)
            terms = chain(plan.keys, t.symbol, "d_key_", show)
            lines += [
                f"    inner = tl.load(d_{n}_part + own * K + at_k, mask=m_ck, other=0.0)",
                f"    tl.store(d_{n}_out + start * K + at_k, ({' + '.join(['inner', *terms])}).to(d_{n}_out.dtype.element_ty), mask=m_ck)",
            ]
    for d in range(len(plan.decays)):
        here = f"tl.load(products + (slot * {len(plan.decays)} + {d}) * PARTS + o_p, mask=o_p < PARTS, other=0.0)"
        lines.append(f"    product = tl.sum({here}, 0)")
        # S_t = a S_(t-1) + write is read after the write, or, if reads come first, one token later
        shift = f"- wrote_{d}_t" if plan.exclusive else f"+ along_{d}_t"
        lines.append(f"    tl.store(d_decay_{d} + start + at, product - tl.cumsum(along_{d}_t, 0) {shift}, mask=live)")
    return "\n".join(lines) + "\n"

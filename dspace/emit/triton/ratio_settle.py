"""Kernels of class c, backward, through chunks: the adjoints at chunk ends and the gradients that come through them.

``carry``: an elementwise scan turns what each chunk hands to earlier ones into the adjoint at the end of each chunk.
``settle``: all chunks in parallel, the gradients that come through that adjoint, added to the chunk's own.

The log-decay gradient needs no other product of the size of a state. With S' the adjoint of S, dlog a_t = <a_t S_(t-1),
S'_t> obeys dlog a_(t+1) = dlog a_t + <write_t, S'_t> - <S_t, what S'_t gets straight from reads>, both of them sums that
are at hand; its first value in a chunk is the product of start state and adjoint, so that errors do not pile up over
chunks (THEORY.md section 3c, identities G1 and G2).
"""

from __future__ import annotations

from dspace.emit.triton.ratio_backward import chain, kept_sums
from dspace.emit.triton.ratio_expressions import RatioPrinter
from dspace.emit.triton.ratio_text import OPTIONS, Words, operands, signature


def carry_kernel(words: Words) -> str:
    """Scan over the chunks of a sequence, last to first."""
    plan, states = words.plan, words.states
    count, groups = len(states), range(len(plan.decays))
    pointers = [
        "chunks",
        "adjoints",
        *words.sums,
        *(f"d_{s}_end" for s in states),
        *(f"d_{s}_start" for s in states),
    ]
    parameters = [name for p in words.parameters for name in (f"d_{p}_part", f"d_{p}")]
    lines = signature(
        "_carry_kernel",
        [*pointers, "products", *parameters, "offsets", "bases"],
        "T, LOW, HIGH, NT, ROWS, H" if parameters else "T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, PACKED: tl.constexpr",
    )
    lines += '''
    """What each chunk hands over becomes, in place, the adjoint at the chunk's end; products: <start state, adjoint>."""
    i_e = tl.program_id(0)
    i_n = tl.program_id(1) // H
    i_h = tl.program_id(1) % H
    begin, end, base = _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED)
    many = tl.cdiv(end - begin, 16)
    o_e = i_e * BE + tl.arange(0, BE)  # of [V, K]
    m_e = o_e < V * K
    user = (i_n.to(tl.int64) * H + i_h) * K * V + o_e % K * V + o_e // K
'''.strip("\n").splitlines()
    if parameters:
        lines += _parameter_sums(words.parameters)
    for s in states:
        lines += [
            f"    if d_{s}_end is None:  # zero",
            f"        d_{s} = tl.zeros([BE], tl.float32)",
            "    else:",
            f"        d_{s} = tl.load(d_{s}_end + user, mask=m_e, other=0.0).to(tl.float32)",
        ]

    def fetch(which: str, suffix: str, pad: str) -> list[str]:
        inner = [
            f"slot = ((base + {which}) * H + i_h) * {count} * V * K",
            f"here = m_e & (o_e * 0 + {which} >= 0)",
            f"last = (tl.minimum(begin + {which} * 16 + 16, end) - 1) * H + i_h",
        ]
        for i in range(count):
            inner += [
                f"handed_{i}{suffix} = tl.load(adjoints + slot + {i} * V * K + o_e, mask=here, other=0.0)",
                f"start_{i}{suffix} = tl.load(chunks + slot + {i} * V * K + o_e, mask=here, other=0.0)",
            ]
        inner += [f"whole_{d}{suffix} = tl.load(sums_{d} + last, mask={which} >= 0, other=0.0)" for d in groups]
        return [pad + line for line in inner]

    fetched = [f"{x}_{i}" for i in range(count) for x in ("handed", "start")] + [f"whole_{d}" for d in groups]
    lines += fetch("(many - 1)", "", "    ")
    lines += ["    for i_r in range(0, many):", "        i_c = many - 1 - i_r"]
    lines.append("        # of the next turn, so that its latency hides behind this one")
    lines += fetch("(i_c - 1)", "_next", " " * 8)
    lines.append(f"        slot = ((base + i_c) * H + i_h) * {count} * V * K")
    for i, s in enumerate(states):
        at = f"adjoints + slot + {i} * V * K + o_e"
        lines += [
            f"        tl.store({at}, d_{s}.to(adjoints.dtype.element_ty), mask=m_e)",
            f"        d_{s} = handed_{i}.to(tl.float32) + tl.exp(whole_{plan.states[i].group}) * d_{s}",
        ]
    for d in groups:
        inner = " + ".join(
            f"start_{i}.to(tl.float32) * d_{s}" for i, s in enumerate(states) if plan.states[i].group == d
        )
        at = f"(((base + i_c) * H + i_h) * {len(plan.decays)} + {d}) * tl.num_programs(0) + i_e"
        lines.append(f"        tl.store(products + {at}, tl.sum({inner}, 0))")
    lines += [f"        {n} = {n}_next" for n in fetched]
    for s in states:
        lines += [f"    if d_{s}_start is not None:", f"        tl.store(d_{s}_start + user, d_{s}, mask=m_e)"]
    return "\n".join(lines) + "\n"


def _parameter_sums(parameters: list[str]) -> list[str]:
    """Gradients of parameters: what the programs of the local adjoints found, on top of the windows behind."""
    lines = ["    if (i_e == 0) & (i_n == 0):"]
    lines += [f"        sum_{p} = tl.zeros([256], tl.float32)" for p in parameters]
    lines += ["        for i_r in range(0, tl.cdiv(ROWS, 256)):", "            o_r = i_r * 256 + tl.arange(0, 256)"]
    lines += [
        f"            sum_{p} += tl.load(d_{p}_part + o_r * H + i_h, mask=o_r < ROWS, other=0.0)" for p in parameters
    ]
    for p in parameters:
        behind = f"tl.load(d_{p} + i_h, mask=HIGH < T, other=0.0)"
        lines.append(f"        tl.store(d_{p} + i_h, {behind} + tl.sum(sum_{p}, 0))")
    return lines


def settle_kernel(words: Words) -> str:
    """The part of the gradients that comes through the adjoint at the chunk's end, added to the chunk's own part."""
    plan, states = words.plan, words.states
    count, groups, pairs = len(states), range(len(plan.decays)), words.rows()
    keyed, valued = words.tensors("k", plan.keys), words.tensors("v", plan.values)
    channels, parts = words.tensors("v", [*plan.values, *plan.bodies]), kept_sums(words)
    pointers = [*(f"{n}_in" for n in (*keyed, *valued)), *words.sums, "adjoints", "products"]
    pointers += [*(f"{n}_part" for n in parts), *(f"direct_{d}_part" for d in groups), *(f"d_{n}_part" for n in keyed)]
    pointers += [f"d_{n}_out" for n in (*keyed, *channels)] + [f"d_decay_{d}" for d in groups] + ["spans"]
    lines = signature(
        "_settle_kernel",
        pointers,
        "T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLABS: tl.constexpr,\n"
        f"    PARTS: tl.constexpr, BP: tl.constexpr, {OPTIONS}",
    )
    lines += '''
    """Final gradients of one chunk of one head; BK covers all key channels."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_c, i_h = _place(H, NT, False, PACKED)
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    o_c = tl.arange(0, 16)
    o_p = tl.arange(0, BP)
    o_k = tl.arange(0, BK)
    start = begin * H + i_h
    slot = tl.program_id(0).to(tl.int64)
    slots = tl.num_programs(0).to(tl.int64)
    at = o_c * H
    live = begin + o_c < end
    m_k = o_k < K
    m_ck = live[:, None] & m_k[None, :]
    at_k = at[:, None] * K + o_k[None, :]
'''.strip("\n").splitlines()
    for d in groups:
        lines += [
            f"    whole = tl.load(sums_{d} + (end - 1) * H + i_h, mask=begin < end, other=0.0)",
            f"    part_{d} = tl.load(sums_{d} + start + at, mask=live, other=0.0)",
            f"    until_{d} = tl.where(live, tl.exp(tl.minimum(whole - part_{d}, 0.0)), 0.0)",
            f"    wrote_{d} = tl.zeros([16], tl.float32)",
            f"    direct_{d} = tl.zeros([16], tl.float32)",
        ]
    for n in keyed:
        lines += [
            f"    raw_{n} = tl.load({n}_in + start * K + at_k, mask=m_ck, other=0.0)",
            f"    {n} = raw_{n}.to(tl.float32)",
        ]
    lines += [" " * 4 + line for line in operands(words)]
    lines += [f"    d_key_{j} = tl.zeros([16, BK], tl.float32)" for j in range(len(plan.keys))]
    lines += """
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_cv = live[:, None] & m_v[None, :]
        at_v = at[:, None] * V + o_v[None, :]
        at_part = slot * V * 16 + o_v[None, :] * 16 + o_c[:, None]
        tile = o_v[:, None] * K + o_k[None, :]
        m_tile = m_v[:, None] & m_k[None, :]
""".strip("\n").splitlines()
    show = RatioPrinter(words.names)
    for n in valued:
        lines.append(f"        {n} = tl.load({n}_in + start * V + at_v, mask=m_cv, other=0.0).to(tl.float32)")
    lines += [f"        value_{j} = {show(e)}" for j, e in enumerate(plan.values)]
    for j, d in pairs:
        lines.append(f"        weighted_{j}_{d} = (value_{j} * until_{d}[:, None]).to(OT)")
    begun: set[str] = set()
    for i, s in enumerate(plan.states):
        adjoint = f"adjoints + (slot * {count} + {i}) * V * K + tile"
        lines.append(f"        d_{states[i]} = tl.load({adjoint}, mask=m_tile, other=0.0).to(OT)")
        for w in s.writes:
            rows = f"tl.dot(key_{w.key}, tl.trans(d_{states[i]}), input_precision=PRECISION)"
            name = f"d_value_{w.value}_{s.group}"
            more = f"{name} + " if name in begun else ""
            begun.add(name)
            lines += [
                f"        {name} = {more}{rows} * until_{s.group}[:, None]",
                f"        d_key_{w.key} = tl.dot(weighted_{w.value}_{s.group}, d_{states[i]}, d_key_{w.key}, input_precision=PRECISION)",
            ]
    lines += [f"        {n} = tl.zeros([16, BV], tl.float32)" for n in parts if n not in begun]
    lines.append("        for i_s in tl.static_range(SLABS):")
    for n in parts:
        lines.append(f"            {n} += tl.load({n}_part + i_s * slots * V * 16 + at_part, mask=m_cv, other=0.0)")
    values: dict[int, list[str]] = {}
    for j, d in pairs:
        lines.append(f"        wrote_{d} += tl.sum(d_value_{j}_{d} * value_{j}, 1)")
        values.setdefault(j, []).append(f"d_value_{j}_{d}")
    lines += [f"        d_value_{j} = {' + '.join(x)}" for j, x in values.items()]
    for t in plan.tensors:
        if t.axes == "v":
            n = words.of(t)
            terms = [f"beside_{n}"] if f"beside_{n}" in parts else []
            terms += chain(plan.values, t.symbol, "d_value_{}", show)
            store = f"tl.store(d_{n}_out + start * V + at_v, ({' + '.join(terms)}).to(d_{n}_out.dtype.element_ty), mask=m_cv)"
            lines.append(" " * 8 + store)
    for t in plan.tensors:
        n = words.of(t)
        if n in keyed:
            inner = f"tl.load(d_{n}_part + slot * 16 * K + o_c[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)"
            total = " + ".join([inner, *chain(plan.keys, t.symbol, "d_key_{}", show)])
            lines.append(
                f"    tl.store(d_{n}_out + start * K + at_k, ({total}).to(d_{n}_out.dtype.element_ty), mask=m_ck)"
            )
    for d in groups:
        here = f"tl.load(products + (slot * {len(plan.decays)} + {d}) * PARTS + o_p, mask=o_p < PARTS, other=0.0)"
        # S_t = a S_(t-1) + write is read after the write, or, if reads come first, one token later
        shift = f"- wrote_{d}" if plan.exclusive else "+ along"
        lines += [
            "    for i_s in range(SLABS):",
            f"        direct_{d} += tl.load(direct_{d}_part + (i_s * slots + slot) * 16 + o_c, mask=live, other=0.0)",
            f"    along = direct_{d} - wrote_{d}",
            f"    product = tl.sum({here}, 0)",
            f"    d_decay = product - tl.cumsum(along, 0) {shift}",
            "    # of a decay that leaves nothing it is a difference of equal sums: nothing, to the last digit of either",
            f"    before = tl.load(sums_{d} + start + at - H, mask=live & (o_c > 0), other=0.0)",
            f"    d_decay = tl.where(part_{d} - before < -16.0, 0.0, d_decay)",
            f"    tl.store(d_decay_{d} + start + at, d_decay, mask=live)",
        ]
    return "\n".join(lines) + "\n"

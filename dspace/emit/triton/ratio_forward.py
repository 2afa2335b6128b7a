"""Kernels of class c, forward: states at chunk starts, then all chunks in parallel."""

from __future__ import annotations

from dspace.emit.triton.ratio_text import (
    OPTIONS,
    RatioPrinter,
    Words,
    chunk_start,
    fetch,
    key_lines,
    signature,
    state_lines,
    statements,
    value_block,
    whole,
)

SLABS = 4
"""Slabs of key channels that the forward kernel spells out: up to 4 * BK channels."""


def states_kernel(words: Words) -> str:
    """States at the start of every chunk, from each sequence's first state; one tile [BV, BK] a program."""
    plan = words.plan
    keys, values = words.tensors("k", plan.keys), words.tensors("v", plan.values)
    initial = [f"{s}_start" for s in words.states]
    final = [f"{s}_end" for s in words.states]
    pointers = [*(f"{n}_in" for n in (*keys, *values)), *words.sums, *initial, "chunks", *final, "offsets", "bases"]
    lines = signature(
        "_states_kernel",
        pointers,
        "T, LOW, HIGH, NT, H",
        f"K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STORE: tl.constexpr, {OPTIONS}",
    )
    lines += '''
    """S at the start of every chunk of 16 tokens, kept as [chunk, head, state, V, K] in the operand type."""
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    i_n = tl.program_id(2) // H
    i_h = tl.program_id(2) % H
    begin, end, base = _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED)
    o_c = tl.arange(0, 16)
    m_v = o_v < V
    m_k = o_k < K
    m_tile = m_v[:, None] & m_k[None, :]
    user = (i_n.to(tl.int64) * H + i_h) * K * V + o_k[None, :] * V + o_v[:, None]
    tile = o_v[:, None] * K + o_k[None, :]
'''.strip("\n").splitlines()
    for s in words.states:
        lines.append(f"    {s} = tl.load({s}_start + user, mask=m_tile, other=0.0).to(tl.float32)")
    lines += [
        "    for i_c in range(0, tl.cdiv(end - begin, 16)):",
        f"        slot = chunks + ((base + i_c) * H + i_h) * {len(plan.states)} * V * K + tile",
    ]
    for i, s in enumerate(words.states):
        if i == 0:
            lines.append("        if STORE:")
        lines.append(f"            tl.store(slot + {i} * V * K, {s}.to(chunks.dtype.element_ty), mask=m_tile)")
    lines += """
        row = begin + i_c * 16 + o_c
        live = row < end
        at = row * H + i_h
        last = (tl.minimum(begin + i_c * 16 + 16, end) - 1) * H + i_h
""".strip("\n").splitlines()
    for d in range(len(plan.decays)):
        lines += [
            f"        whole_{d} = tl.load(sums_{d} + last)",
            f"        part = tl.load(sums_{d} + at, mask=live, other=0.0)",
            f"        until_{d} = tl.where(live, tl.exp(tl.minimum(whole_{d} - part, 0.0)), 0.0)",
        ]
    for n in keys:
        lines += [
            f"        raw_{n} = tl.load({n}_in + at[:, None] * K + o_k[None, :], mask=live[:, None] & m_k[None, :], other=0.0)",
            f"        {n} = raw_{n}.to(tl.float32)",
        ]
    for n in values:
        lines.append(
            f"        {n} = tl.load({n}_in + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0).to(tl.float32)"
        )
    lines += key_lines(words, "", 8)
    show = RatioPrinter(words.names)
    for state in plan.states:
        name = words.of(state.symbol)
        lines.append(f"        {name} = {name} * tl.exp(whole_{state.group})")
        for w in state.writes:
            value = f"(({show(plan.values[w.value])}) * until_{state.group}[:, None]).to(OT)"
            lines.append(f"        {name} = tl.dot(tl.trans({value}), key_{w.key}, {name}, input_precision=PRECISION)")
    lines += [f"    tl.store({s}_end + user, {s}, mask=m_tile)" for s in words.states]
    return "\n".join(lines) + "\n"


def reads_kernel(words: Words) -> str:
    """The reads of every token of a chunk: all value channels of one head in turn."""
    plan = words.plan
    reads = [r.name for r in plan.reads]
    used = words.tensors("k", [*plan.keys, *plan.bodies])
    queried = words.tensors("k", plan.bodies)
    channels = words.tensors("v", [*plan.values, *plan.bodies])
    beside = words.tensors("v", plan.bodies)
    pointers = [*(f"{n}_in" for n in (*used, *channels)), *words.sums, *(f"{p}_in" for p in words.parameters)]
    pointers += ["chunks", *(f"{r}_out" for r in reads), "spans"]
    lines = signature(
        "_reads_kernel",
        pointers,
        "scale, T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,\n"
        f"    VARIANCE: tl.constexpr, {OPTIONS}",
    )
    lines += ['    """' + "; ".join(f"{r} = sum_k {b}" for r, b in zip(reads, plan.bodies, strict=True)) + '."""']
    lines += ["    NK: tl.constexpr = (K + BK - 1) // BK", "    NV: tl.constexpr = (V + BV - 1) // BV"]
    lines += chunk_start(words)
    for i in range(SLABS):
        pad = 4 if i == 0 else 8
        block = [f"    if NK > {i}:"] if i else []
        inner = [f"m_{i} = live[:, None] & ({i} * BK + o_k < K)[None, :]"]
        for n in used:
            inner.append(
                f"raw_{n}_{i} = tl.load({n}_in + start * K + at[:, None] * K + ({i} * BK + o_k)[None, :], mask=m_{i}, other=0.0)"
            )
            inner.append(f"{n}_{i} = raw_{n}_{i}.to(tl.float32)")
        block += [" " * pad + line for line in inner]
        block += key_lines(words, f"_{i}", pad)
        lines += block
    for n in channels:
        lines.append(f"    {n}_next = {fetch(n, '0', 'o_v < V')}")
    lines.append("    for i_v in range(NV):")
    lines += value_block(words, channels, 8)
    lines.append(
        f"        tile = chunks + (i_c.to(tl.int64) * H + i_h) * {len(plan.states)} * V * K + (block[:, None] * K + o_k[None, :])"
    )
    count = plan.output_reads
    for i in range(SLABS):
        pad = 8 if i == 0 else 12
        if i:
            lines.append(f"        if NK > {i}:")
        lines.append(" " * pad + f"m_tile = (block < V)[:, None] & ({i} * BK + o_k < K)[None, :]")
        lines += state_lines(words, "tile", f"_{i}", f"{i} * BK", pad)
        local = dict(words.names) | {}
        local.update({t.name: f"{words.of(t)}_{i}[None, :, :]" for t in plan.tensors if words.of(t) in queried})
        local.update({t.name: f"{words.of(t)}[:, :, None]" for t in plan.tensors if words.of(t) in beside})
        for guard, part in (("", range(count)), ("if VARIANCE:", range(count, len(reads)))):
            if not part:
                continue
            inner_pad = pad
            if guard:
                lines.append(" " * pad + guard)
                inner_pad += 4
            lines += statements({f"y_{reads[j]}": words.body(j) for j in part}, local, inner_pad)
            for j in part:
                y = f"y_{reads[j]}"
                lines += [
                    " " * inner_pad + "if K % BK != 0:",
                    " " * inner_pad + f"    {y} = tl.where(({i} * BK + o_k < K)[None, None, :], {y}, 0.0)",
                    " " * inner_pad
                    + f"{y} = tl.sum(tl.reshape({whole(words, words.body(j), y)}, [BV * 16, BK // 8, 8]), 1)",
                    " " * inner_pad + (f"sum_{reads[j]} = {y}" if i == 0 else f"sum_{reads[j]} += {y}"),
                ]
    lines.append("        m_out = live[None, :] & m_v[:, None]")
    lines.append("        at_v = at[None, :] * V + (first + o_v)[:, None]")
    for j, r in enumerate(reads):
        space = "        "
        if j >= count:
            lines.append(space + "if VARIANCE:")
            space += "    "
        lines += [
            space + f"total = tl.reshape(tl.sum(sum_{r}, 1), [BV, 16]) * ({RatioPrinter()(words.coefficient(j))})",
            space + f"tl.store({r}_out + start * V + at_v, total.to({r}_out.dtype.element_ty), mask=m_out)",
        ]
    return "\n".join(lines) + "\n"

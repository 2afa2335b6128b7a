"""Kernels of class c, forward: states at chunk starts, then all chunks in parallel."""

from __future__ import annotations

from dspace.emit.triton.ratio_expressions import RatioPrinter, statements
from dspace.emit.triton.ratio_text import (
    OPTIONS,
    Words,
    chunk_start,
    key_lines,
    octet,
    operands,
    signature,
    start_lines,
    state_lines,
    tuples,
    write_lines,
)


def states_kernel(words: Words) -> str:
    """States at the start of every chunk, from each sequence's first state; one tile [BV, BK] a program."""
    plan = words.plan
    keys, values = words.tensors("k", plan.keys), words.tensors("v", plan.values)
    pointers = [
        *(f"{n}_in" for n in (*keys, *values)),
        *words.sums,
        *(f"{s}_start" for s in words.states),
        "chunks",
    ]
    pointers += [*(f"{s}_end" for s in words.states), "offsets", "bases"]
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
    m_v, m_k = o_v < V, o_k < K
    m_tile = m_v[:, None] & m_k[None, :]
    user = (i_n.to(tl.int64) * H + i_h) * K * V + o_k[None, :] * V + o_v[:, None]
    tile = o_v[:, None] * K + o_k[None, :]
'''.strip("\n").splitlines()
    for s in words.states:
        lines += [
            f"    if {s}_start is None:  # zero",
            f"        {s} = tl.zeros([BV, BK], tl.float32)",
            "    else:",
            f"        {s} = tl.load({s}_start + user, mask=m_tile, other=0.0).to(tl.float32)",
        ]
    last = "(tl.minimum(begin + {} * 16 + 16, end) - 1) * H + i_h"
    for d in range(len(plan.decays)):
        lines.append(f"    next_{d} = tl.load(sums_{d} + {last.format(0)}, mask=begin < end, other=0.0)")
    lines += [
        "    for i_c in range(0, tl.cdiv(end - begin, 16)):",
        f"        slot = chunks + ((base + i_c) * H + i_h) * {len(plan.states)} * V * K + tile",
        "        if STORE:",
    ]
    for i, s in enumerate(words.states):
        lines.append(f"            tl.store(slot + {i} * V * K, {s}.to(chunks.dtype.element_ty), mask=m_tile)")
    lines += """
        token = begin + i_c * 16 + o_c
        live = token < end
        at = token * H + i_h
""".strip("\n").splitlines()
    for d in range(len(plan.decays)):
        lines += [
            f"        whole_{d} = next_{d}",
            f"        next_{d} = tl.load(sums_{d} + {last.format('(i_c + 1)')})  # of the next turn; behind the end, the last",
            f"        part = tl.load(sums_{d} + at, mask=live, other=0.0)",
            f"        until_{d} = tl.where(live, tl.exp(tl.minimum(whole_{d} - part, 0.0)), 0.0)",
        ]
    for n, axis in [*((n, "k") for n in keys), *((n, "v") for n in values)]:
        at = f"{n}_in + at[:, None] * {axis.upper()} + o_{axis}[None, :]"
        lines.append(f"        raw_{n} = tl.load({at}, mask=live[:, None] & m_{axis}[None, :], other=0.0)")
        lines.append(f"        {n} = raw_{n}.to(tl.float32)")
    lines += [" " * 8 + line for line in operands(words)]
    show = RatioPrinter(words.names)
    for state in plan.states:
        name = words.of(state.symbol)
        lines.append(f"        {name} = {name} * tl.exp(whole_{state.group})")
        for w in state.writes:
            value = f"(({show(plan.values[w.value])}) * until_{state.group}[:, None]).to(OT)"
            lines.append(f"        {name} = tl.dot(tl.trans({value}), key_{w.key}, {name}, input_precision=PRECISION)")
    for s in words.states:
        lines += [f"    if {s}_end is not None:", f"        tl.store({s}_end + user, {s}, mask=m_tile)"]
    return "\n".join(lines) + "\n"


def reads_kernel(words: Words) -> str:
    """The reads of every token of a chunk: all value channels of one head in turn."""
    plan = words.plan
    reads = [r.name for r in plan.reads]
    queried = words.tensors("k", plan.bodies)
    used = words.tensors("k", [*plan.keys, *plan.bodies])
    channels = words.tensors("v", [*plan.values, *plan.bodies])
    valued, beside = words.tensors("v", plan.values), words.tensors("v", plan.bodies)
    pointers = [
        *(f"{n}_in" for n in (*used, *channels)),
        *(f"{d}_in" for d in words.decays),
        *(f"{p}_in" for p in words.parameters),
    ]
    pointers += ["chunks", *(f"{r}_out" for r in reads), "spans"]
    lines = signature(
        "_reads_kernel",
        pointers,
        "scale, T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, I: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,\n"
        f"    FAST: tl.constexpr, VARIANCE: tl.constexpr, {OPTIONS}",
    )
    lines += ['    """' + "; ".join(f"{r} = sum_k {b}" for r, b in zip(reads, plan.bodies, strict=True)) + "."]
    lines += ["", "    Tiles: rows are tokens t, columns key channels, N times I of them (a slab) at once.", '    """']
    lines += ["    NK: tl.constexpr = (K + 16 * I * N - 1) // (16 * I * N)"]
    lines += chunk_start(words, False)
    lines.append("    o_k = 16 * tl.arange(0, I)[:, None, None, None, None]")

    def slab(indent: int, first: str) -> list[str]:
        inner = [f"first_k = {first}", *tuples((*queried, *(f"key_{j}" for j in range(len(plan.keys)))), 0)]
        inner += ["for i_s in tl.static_range(N):", "    channel = first_k + i_s * 16 * I + o_k + row"]
        inner += key_lines(words, [], 4)
        if queried:
            inner.append("    channel_t = first_k + i_s * 16 * I + o_k + column")
        for n in queried:
            at = f"{n}_in + start * K + row * H * K + channel_t"
            inner.append(f"    {n} = {n} + (_get({at}, live_row & (channel_t < K)).to(tl.float32),)")
        return [" " * indent + line for line in inner]

    names = [f"{s}_0" for s in words.states]
    lines += ["    if NK == 1:", *slab(8, "0")]
    if valued:
        lines += ["    if NK == 1 and AHEAD >= 1:", *octet(words, valued, 8, "0", "next_")]
    lines += ["    if NK == 1 and AHEAD >= 2:", *start_lines(words, 8, "0", "next_")]
    lines += ["    for i_v in range((V + 7) // 8):", "        first_g = i_v * 8"]
    sums = [f"sum_{r}" for r in reads]
    lines += [f"        {n} = tl.zeros([1, 1, 2, 2, 32], tl.float32)  # columns: value channels" for n in sums]
    lines += ["        for i_k in range(NK):", "            if NK > 1:", *slab(16, "i_k * 16 * I * N")]
    lines += ["            if NK == 1 and AHEAD >= 2:  # loads are under way while others are at work"]
    lines += [f"                {n} = next_{n}" for n in names] + start_lines(words, 16, "(first_g + 8)", "next_")
    lines += ["            else:", *start_lines(words, 16)]
    if valued:
        lines += ["            if NK == 1 and AHEAD >= 1:", *(" " * 16 + f"{n}_8 = next_{n}_8" for n in valued)]
        lines += octet(words, valued, 16, "(first_g + 8)", "next_")
        lines += ["            else:", *octet(words, valued, 16)]
    lines += [
        "            for i_u in range(0, tl.minimum(8 // UNROLL, tl.cdiv(V - first_g, UNROLL))):",
        "                for i_j in tl.static_range(UNROLL):",
        "                    i_g = UNROLL * i_u + i_j",
    ]
    lines += write_lines(words, True, 20)
    for n in beside:
        at = f"{n}_in + start * V + row * H * V + first_g + i_g"
        lines.append(" " * 20 + f"{n}_t = _get({at}, live_row).to(tl.float32)")
    lines += [" " * 20 + "for i_s in tl.static_range(N):"]
    lines += state_lines(words, False, 24)
    local = dict(words.names)
    local |= {t.name: f"{words.of(t)}[i_s]" for t in plan.tensors if words.of(t) in queried}
    local |= {t.name: f"{words.of(t)}_t" for t in plan.tensors if words.of(t) in beside}
    count = plan.output_reads
    for guard, part in ((0, range(count)), (1, range(count, len(reads)))):
        if not part:
            continue
        pad = 24 + 4 * guard
        if guard:
            lines.append(" " * 24 + "if VARIANCE:")
        lines += statements({f"y_{reads[j]}": words.shown(words.body(j)) for j in part}, local, pad)
        for r in (reads[j] for j in part):
            if not words.whole(words.body(reads.index(r))):
                lines.append(" " * pad + f"y_{r} = y_{r} + zero")
            lines += [
                " " * pad + "if K % (16 * I) != 0:",
                " " * pad + f"    y_{r} = tl.where(first_k + i_s * 16 * I + o_k + column < K, y_{r}, 0.0)",
                " " * pad
                + "if V % UNROLL != 0:  # what is not finite beyond the last channel would spread in the sums",
                " " * pad + f"    y_{r} = tl.where(first_g + i_g < V, y_{r}, 0.0)",
                " " * pad + f"total_{r} = y_{r} if i_s == 0 else total_{r} + y_{r}",
            ]
    for j, r in enumerate(reads):
        if j == count:
            lines.append(" " * 20 + "if VARIANCE:")
        pad = 20 + 4 * (j >= count)
        lines.append(" " * pad + f"sum_{r} = _sum_columns_into(sum_{r}, total_{r}, i_g, OT, FAST)")
    lines += [
        "        at_v = start * V + row * H * V + first_g + column_8",
        "        m_out = live_row & (first_g + column_8 < V)",
    ]
    for j, r in enumerate(reads):
        pad = 8
        if j >= count:
            lines.append("        if VARIANCE:")
            pad = 12
        factor = words.coefficient(j)
        value = f"sum_{r}" if factor == 1 else f"sum_{r} * ({RatioPrinter()(factor)})"
        lines.append(" " * pad + f"_put({r}_out + at_v, {value}, m_out)")
    return "\n".join(lines) + "\n"

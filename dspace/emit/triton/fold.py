"""The fold without a tensor of divided queries: what divides a query is evaluated inside the kernel of the outputs.

Where nothing is differentiated, the vector states are needed at chunk starts only, from the keys alone: programs beside
those of the matrix state walk over the same keys at the same time. Inside a chunk they are one more product of the
matrix of decays, beside the scores. So a forward pass reads every input once more at most and writes the outputs alone.
With gradients the divided queries are stored, since the backward pass reads them twice (:mod:`dspace.emit.triton.vector`).
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from dspace.emit.triton.printer import inverses_of
from dspace.emit.triton.vector_group import VectorGroup
from dspace.emit.triton.vector_kernels import Kernels

LOCAL = frozenset(
    "keys_in values_in sums_in states_in out_at o_k o_v m_k m_v m_ck scores out query causal corner at_border seen matrix key_tile value_tile of_key of_value of_decay of_start want_final key value keys values sums start states final offsets bases i_nh i_k i_v i_h o_w m_w tile chunks first left live m_cw step write place config ends kept leaves packed o state_stages state_warps tile_k tile_v K V BK BV NK NV OT".split()
)
"""Names of the kernel that no variable of a spec may have."""


def source(group: VectorGroup, names: Mapping[str, str], query: sympy.Expr, decay: str) -> str:
    """The kernels and function ``_fold`` of one query; ``decay`` of the matrix state: "none" or "scalar"."""
    writer, scalar = Kernels(group, names), decay == "scalar"
    return "\n\n".join(
        [_walk(writer), _states_of_all(writer, decay), _kernel(writer, query, scalar), _host(group, names, decay)]
    )


def _walk(writer: Kernels) -> str:
    """The vector states of one tile of channels at the start of every chunk."""
    group, names = writer.group, writer.names
    pointers = [f"{names[v.name]}_in" for v in writer.leaves]
    pointers += [f"{s}_{part}" for part in ("start", "border", "final") for s in writer.states]
    lines = f'''
@_kernel
def _fold_walk(
    {", ".join(pointers)},
    begin, end, base, i_nh, i_h, o_w, scale, H, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, STAGES: tl.constexpr,
):
    """{"; ".join(f"{s.name} = {s.decay} {s.name} + {group.write(s)}" for s in group.states)} at chunk starts."""
    m_w = o_w < W
    o_c = tl.arange(0, C)
    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    tile = (o_c * (H * W))[:, None] + o_w[None, :]
'''.strip("\n").splitlines()
    lines += writer.parameters()
    at = "{0}_start + i_nh * W + o_w, mask=m_w, other=0.0"
    lines += [f"    {s} = tl.load({at.format(s)}).to(tl.float32)" for s in writer.states]
    lines += writer.loop(writer.used([e for s in group.states for e in (s.decay, group.write(s))]), False, None)
    lines.append("        place = ((base + i) * H + i_h) * W + o_w")
    for state, s in zip(group.states, writer.states, strict=True):
        lines += [f"        tl.store({s}_border + place, {s}, mask=m_w)", *writer.decays(state)]
        lines += writer.statements({"write": group.write(state)}, names)
        lines.append("        write = tl.where(m_cw, write, 0.0)")
        lines.append(f"        {s} = tl.exp2({s}_past) * {s} + tl.sum({s}_until[:, None] * write, axis=0)")
    lines += [f"    tl.store({s}_final + i_nh * W + o_w, {s}, mask=m_w)" for s in writer.states]
    return "\n".join(lines) + "\n"


def _states_of_all(writer: Kernels, decay: str) -> str:
    """All states at chunk starts: programs behind those of a head's tiles of values have its vector states."""
    vectors = [f"{writer.names[v.name]}_in" for v in writer.leaves]
    vectors += [f"{s}_{part}" for part in ("start", "border", "final") for s in writer.states]
    matrix = [
        "of_key",
        "of_value",
        *(["of_sums"] if decay == "scalar" else []),
        "start",
        "states",
        "final",
        "offsets",
        "bases",
    ]
    return (
        f'''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _fold_states_kernel(
    {", ".join(vectors)},
    {", ".join(matrix)}, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
):
    """States at the start of every chunk, one tile a program, beside the vector states."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_v = pid % (NV + 1)
    i_k = (pid // (NV + 1)) % NK
    i_nh = (pid // ((NV + 1) * NK)).to(tl.int64)
    if i_v < NV:
        _state_tile_{decay}({", ".join(matrix)}, i_nh, i_k, i_v, T, NT, H, K, V, C, BK, BV, OT, PRECISION, PACKED)
    else:
        begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
        _fold_walk(
            {", ".join(vectors)},
            begin, end, base, i_nh, i_nh % H, i_k * BK + tl.arange(0, BK), scale, H, K, C, BK, STAGES,
        )
'''.strip("\n")
        + "\n"
    )


def _kernel(writer: Kernels, query: sympy.Expr, decays: bool) -> str:
    group, names = writer.group, writer.names
    pointers = [f"{names[v.name]}_in" for v in writer.leaves] + [f"{s}_border" for s in writer.states]
    pointers += ["keys_in", "values_in", *(["sums_in"] if decays else []), "states_in", "out_at", "spans"]
    lines = f'''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _fold_kernel(
    {", ".join(pointers)},
    scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, PACKED: tl.constexpr,
):
    """o_t = scale (sum_s (x_t exp(G_t - G_s) k_s) v_s + (x_t exp(G_t)) S) with x = {query}."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_h = (pid // NV) % H
    i_c = pid // (NV * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        live = o_c < (end - begin).to(tl.int32)
        corner = begin * H + i_h
        at = o_c * H  # offsets in a chunk are 32 bit wide, from a start that is 64
        at_border = i_c.to(tl.int64) * H + i_h
        o_v = (pid % NV) * BV + tl.arange(0, BV)
        m_v = o_v < V
        causal = o_c[:, None] >= o_c[None, :]
'''.strip("\n").splitlines()
    narrow = [v for v in writer.leaves if not group.wide(v)]
    for v in narrow:
        name = names[v.name]
        if v in group.parameters:
            lines.append(f"        {name} = tl.load({name}_in + i_h).to(tl.float32)")
        else:
            lines.append(f"        {name}_row = tl.load({name}_in + corner + at, mask=live, other=0.0).to(tl.float32)")
            lines.append(f"        {name} = {name}_row[:, None]")
    for state, s in zip(group.states, writer.states, strict=True):
        lines += writer.decay_sums(state)
        lines.append(
            f"        {s}_gap = tl.exp2(tl.where(causal, tl.minimum({s}_sums[:, None] - {s}_sums[None, :], 0.0), -float('inf')))"
        )
        lines.append(f"        {s}_since = tl.exp2({s}_sums)[:, None]")
    lines += """
        scores = tl.zeros([C, C], dtype=tl.float32)
        out = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
""".strip("\n").splitlines()
    pad = " " * 12
    for v in writer.leaves:
        if not group.wide(v):
            continue
        name = names[v.name]
        if v in group.parameters:
            lines.append(
                f"{pad}{name} = tl.load({name}_in + i_h * K + o_k, mask=m_k, other=1.0).to(tl.float32)[None, :]"
            )
        else:
            at = f"{name}_in + corner * K + (at[:, None] * K + o_k[None, :])"
            lines.append(f"{pad}{name} = tl.load({at}, mask=m_ck, other=0.0).to(tl.float32)")
    for state, s in zip(group.states, writer.states, strict=True):
        lines += writer.statements({"write": group.write(state)}, names, 12)
        lines += [
            f"{pad}write = tl.where(m_ck, write, 0.0)",
            f"{pad}{s}_start = tl.load({s}_border + at_border * K + o_k, mask=m_k, other=0.0)",
            f"{pad}{s} = {s}_since * {s}_start[None, :]",
            f"{pad}{s} = tl.dot({s}_gap.to(OT), write.to(OT), {s}, input_precision=PRECISION)",
        ]
    changed, inverse = inverses_of({"query": query})
    lines += [" " * 4 + line for line in writer.inverses(inverse, names)]
    lines += writer.statements(changed, names, 12)
    lines += """
            query = tl.where(m_ck, query, 0.0).to(OT)
            tile = o_k[:, None] * V + o_v[None, :]
            matrix = tl.load(states_in + at_border * (K * V) + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
            key_tile = tl.load(keys_in + corner * K + (at[None, :] * K + o_k[:, None]), mask=m_k[:, None] & live[None, :], other=0.0)
            scores = tl.dot(query, key_tile.to(OT), scores, input_precision=PRECISION)
            out = tl.dot(query, matrix.to(OT), out, input_precision=PRECISION)
        value_tile = tl.load(values_in + corner * V + (at[:, None] * V + o_v[None, :]), mask=live[:, None] & m_v[None, :], other=0.0)
""".strip("\n").splitlines()
    if not decays:
        lines.append("        scores = tl.where(causal, scores, 0.0)")
    else:
        lines += """
        seen = tl.load(sums_in + corner + at, mask=live, other=0.0)
        out = out * tl.exp(seen)[:, None]
        gap = tl.minimum(seen[:, None] - seen[None, :], 0.0)
        scores = scores * tl.exp(tl.where(causal & live[:, None], gap, -float("inf")))
""".strip("\n").splitlines()
    lines += """
        out = tl.dot(scores.to(OT), value_tile.to(OT), out, input_precision=PRECISION) * scale
        tl.store(out_at + corner * V + (at[:, None] * V + o_v[None, :]), out.to(out_at.dtype.element_ty), mask=live[:, None] & m_v[None, :])
""".strip("\n").splitlines()
    return "\n".join(lines) + "\n"


def _host(group: VectorGroup, names: Mapping[str, str], decay: str) -> str:
    leaves = [names[v.name] for v in (*group.inputs, *group.parameters)]
    states = [names[s.name] for s in group.states]
    scalar = decay == "scalar"
    lists = [f"[{', '.join(x)}]" for x in (leaves, states)]
    return f'''
def _fold_proposals(K, V, dtype):
    """(k tile, v tile, warps, stages); the first, by default, is that of the outputs without a fold."""
    first = _config_{decay}(K, V, dtype)[2]
    if dtype != torch.bfloat16 or min(K, V) < 64:
        return [first]
    return [first, (_tile(K, 64), _tile(V, 128), 8, 2), (32, _tile(V, 128), 4, 2), (32, _tile(V, 128), 8, 2)]


def _fold({", ".join([*leaves, *states])}, of_key, of_value, {"of_decay, " if scalar else ""}of_start, scale, offsets, want_final):
    """The read of every token and the final states, the matrix state's first; nothing is kept for a backward pass."""
    leaves, starts = ([t.contiguous() for t in x] for x in ({lists[0]}, {lists[1]}))
    key, value = of_key.contiguous(), of_value.contiguous()
    B, T, H, K = key.shape
    V = value.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config_{decay}(K, V, key.dtype)
    C = config[0]
    BK, BV, warps, stages = _chosen(_fold_proposals, "fold", K, V, key.dtype)
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    packed, fast = offsets is not None, _fast(key)
    borders = [torch.empty((chunks, H, K), dtype=torch.float32, device=key.device) for _ in starts]
    ends = [torch.empty_like(t) for t in starts]
    {f"sums = _decay_sums_scalar(of_decay.contiguous(), spans, T, NT, chunks, C){chr(10)}    " if scalar else ""}kept = key.dtype if key.dtype == torch.bfloat16 else torch.float32
    states = torch.empty((chunks, H, K, V), dtype=kept, device=key.device)
    final = torch.empty((N, H, K, V), dtype=torch.float32, device=key.device) if want_final else None
    OT, precision = _operands(key.dtype)
    tile_k, tile_v, state_warps, state_stages = config[1]
    _launch(
        _fold_states_kernel, (_cdiv(K, tile_k) * (_cdiv(V, tile_v) + 1) * N * H, 1, 1),
        (
            *leaves, *starts, *borders, *ends, key, value,
            {"sums, " if scalar else ""}None if of_start is None else of_start.contiguous(), states, final, offsets, bases,
        ),
        (scale, T, NT, H), (), K=K, V=V, C=C, BK=tile_k, BV=tile_v, OT=OT, PRECISION=precision, STAGES=state_stages,
        PACKED=packed, num_warps=state_warps, num_stages=state_stages,
    )
    o = torch.empty_like(value)
    _launch(
        _fold_kernel, (_cdiv(V, BV) * H * chunks, 1, 1),
        (*leaves, *borders, key, value, {"sums, " if scalar else ""}states, o, spans), (scale, T, NT, H), (),
        K=K, V=V, C=C, BK=BK, BV=BV, OT=OT, PRECISION=precision, FAST=fast, PACKED=packed, num_warps=warps, num_stages=stages,
    )
    return o, final, *ends


def _kept_by_nobody(*tensors):
    """Whether no gradient of these will be asked for."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]))
'''

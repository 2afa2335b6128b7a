"""The fold: what divides a query is evaluated inside the kernel of the outputs, and of the gradients.

The vector states are needed at chunk starts only, from the keys alone: programs beside those of the matrix state read
the same keys at about the same time, one chunk each, and a scan joins what they found. Inside a chunk they are one
more product of the matrix of decays, beside the scores. So a forward pass reads every input once more at most and
writes the outputs alone, with gradients also the queries as divided (:mod:`dspace.emit.triton.fold_gradient`), which
the backward pass reads twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from dspace.emit.triton import fold_gradient, fold_host
from dspace.emit.triton.chunk_kernels import LOOP, PAD, PLACE, ChunkKernels, FoldKernels
from dspace.emit.triton.printer import inverses_of
from dspace.emit.triton.vector_group import Fold, VectorGroup
from dspace.plan.affine import AffinePlan, kind


def folding(plan: AffinePlan, groups: Sequence[VectorGroup]) -> Fold | None:
    """The fold, if the only query and nothing else that is read or written needs vector states, products on its axis."""
    reads = plan.readout.reads
    if len(groups) != 1 or len(plan.matrix_states) != 1 or len(reads) != 1 or plan.exclusive:
        return None
    group, state = groups[0], plan.matrix_states[0]
    query = (reads[0].queries or {}).get(state.name)
    if group.axes != "k" or not group.products or query is None or list(group.features.values()) != [query]:
        return None
    if len(state.writes) != 1 or kind(state) == "key" or len(reads[0].queries or {}) != 1:
        return None
    (w,), own = state.writes, {group.symbols[s.name] for s in group.states}
    if any(sympy.sympify(e).free_symbols & own for e in (state.log_decay, w.key, w.value)):
        return None
    key = next((v for v in group.inputs if v.symbol == w.key and v.axes == "k"), None)
    retention = next((v for v in group.inputs if v.symbol == state.log_decay and not v.axes), None)
    return Fold(group, query, kind(state), key, retention)


def source(fold: Fold, names: Mapping[str, str]) -> str:
    """The kernels and the function ``_fold`` of one query."""
    return "\n\n".join(
        [
            _states_of_all(ChunkKernels(fold.group, names), fold.decay),
            _kernel(FoldKernels(fold, names), fold.query, fold.decay == "scalar"),
            fold_gradient.gradients(fold, names),
            fold_host.host(fold),
        ]
    )


def _states_of_all(writer: ChunkKernels, decay: str) -> str:
    """Matrix states at chunk starts, and behind the programs that make them those of the vector states' chunks."""
    group = writer.group
    written = set().union(*(group.write(s).free_symbols | group.log_decay(s).free_symbols for s in group.states))
    used = [v for v in writer.leaves if v.symbol in written]
    vectors = [f"{writer.names[v.name]}_in" for v in used]
    vectors += [f"{s}_{part}" for part in ("total", "local") for s in writer.states]
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
    lines = f'''
@_kernel(do_not_specialize=["MATRIX", "T", "NT", "H"])
def _fold_states_kernel(
    {", ".join(vectors)},
    {", ".join(matrix)}, spans, scale, MATRIX, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """Matrix states at the start of every chunk, one tile a program; behind those, what a chunk does to vector states:

    {"; ".join(f"{s.name} = {s.decay} {s.name} + {group.write(s)}" for s in group.states)}.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    if pid < MATRIX:
        i_nh = (pid // (NV * NK)).to(tl.int64)
        _state_tile_{decay}({", ".join(matrix)}, i_nh, (pid // NV) % NK, pid % NV, T, NT, H, K, V, C, BK, BV, OT, PRECISION, PACKED)
    else:
        i_h = (pid - MATRIX) % H
        i_c = (pid - MATRIX) // H
        if not PACKED:  # the same chunk of all sequences, as those of the matrix go
            sequences = (tl.num_programs(0) - MATRIX) // (H * NT)
            i_c = (i_c % sequences) * NT + i_c // sequences
        begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
'''.strip("\n").splitlines()
    lines += [*PLACE, *writer.rows(used)]
    for state in group.states:
        lines += writer.decays(state)
    lines += [*LOOP, *writer.wide(used)]
    for state, s in zip(group.states, writer.states, strict=True):
        lines += writer.statements({"write": group.write(state)}, writer.names, 12)
        lines += [
            f"{PAD}write = tl.where(m_ck, write, 0.0)",
            f"{PAD}tl.store({s}_local + at_chunk * K + o_k, tl.sum({s}_until[:, None] * write, axis=0), mask=m_k)",
            f"{PAD}tl.store({s}_total + at_chunk * K + o_k, tl.zeros([BK], dtype=tl.float32) + tl.exp2({s}_past), mask=m_k)",
        ]
    return "\n".join(lines) + "\n"


def _kernel(writer: FoldKernels, query: sympy.Expr, decays: bool) -> str:
    group, names = writer.group, writer.names
    pointers = [f"{names[v.name]}_in" for v in writer.leaves] + [f"{s}_border" for s in writer.states]
    pointers += ["keys_in", "values_in", *(["of_sums"] if decays else []), "states_in", "out_at"]
    pointers += ["query_out", *(f"{s}_out" for s in writer.states), "spans"]
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
'''.strip("\n").splitlines()
    lines += PLACE
    lines += """
        o_v = (pid % NV) * BV + tl.arange(0, BV)
        m_v = o_v < V
        causal = o_c[:, None] >= o_c[None, :]
""".strip("\n").splitlines()
    lines += writer.rows(writer.leaves)
    for state, s in zip(group.states, writer.states, strict=True):
        lines += writer.decay_sums(state)
        lines.append(
            f"        {s}_gap = tl.exp2(tl.where(causal, tl.minimum({s}_sums[:, None] - {s}_sums[None, :], 0.0), -float('inf')))"
        )
        lines.append(f"        {s}_since = tl.exp2({s}_sums)[:, None]")
    lines += """
        scores = tl.zeros([C, C], dtype=tl.float32)
        out = tl.zeros([C, BV], dtype=tl.float32)
""".strip("\n").splitlines()
    lines += [*LOOP, *writer.wide(writer.leaves)]
    for state, s in zip(group.states, writer.states, strict=True):
        lines += writer.statements({"write": group.write(state)}, names, 12)
        lines += [
            f"{PAD}write = tl.where(m_ck, write, 0.0)",
            f"{PAD}{s}_start = tl.load({s}_border + at_chunk * K + o_k, mask=m_k, other=0.0)",
            f"{PAD}{s} = {s}_since * {s}_start[None, :]",
            f"{PAD}{s} = tl.dot({s}_gap.to(OT), write.to(OT), {s}, input_precision=PRECISION)",
            f"{PAD}if {s}_out is not None:",
            f"{PAD}    if pid % NV == 0:",
            f"{PAD}        tl.store({s}_out + corner * K + tile, {s}, mask=m_ck)",
        ]
    changed, inverse = inverses_of({"query": query})
    lines += [" " * 4 + line for line in writer.inverses(inverse, names)]
    lines += writer.statements(changed, names, 12)
    lines += """
            query = tl.where(m_ck, query, 0.0).to(OT)
            if query_out is not None:
                if pid % NV == 0:
                    tl.store(query_out + corner * K + tile, query.to(query_out.dtype.element_ty), mask=m_ck)
            square = o_k[:, None] * V + o_v[None, :]
            matrix = tl.load(states_in + at_chunk * (K * V) + square, mask=m_k[:, None] & m_v[None, :], other=0.0)
            key_tile = tl.load(keys_in + corner * K + (at[None, :] * K + o_k[:, None]), mask=m_k[:, None] & live[None, :], other=0.0)
            scores = tl.dot(query, key_tile.to(OT), scores, input_precision=PRECISION)
            out = tl.dot(query, matrix.to(OT), out, input_precision=PRECISION)
        value_tile = tl.load(values_in + corner * V + (at[:, None] * V + o_v[None, :]), mask=live[:, None] & m_v[None, :], other=0.0)
""".strip("\n").splitlines()
    alike = [s for state, s in zip(group.states, writer.states, strict=True) if writer.fold.shared(state)]
    if alike:
        lines += [f"        out = out * {alike[0]}_since", f"        scores = scores * {alike[0]}_gap"]
    elif not decays:
        lines.append("        scores = tl.where(causal, scores, 0.0)")
    else:
        lines += """
        seen = tl.load(of_sums + corner + at, mask=live, other=0.0)
        out = out * tl.exp(seen)[:, None]
        gap = tl.minimum(seen[:, None] - seen[None, :], 0.0)
        scores = scores * tl.exp(tl.where(causal & live[:, None], gap, -float("inf")))
""".strip("\n").splitlines()
    lines += """
        out = tl.dot(scores.to(OT), value_tile.to(OT), out, input_precision=PRECISION) * scale
        tl.store(out_at + corner * V + (at[:, None] * V + o_v[None, :]), out.to(out_at.dtype.element_ty), mask=live[:, None] & m_v[None, :])
""".strip("\n").splitlines()
    return "\n".join(lines) + "\n"

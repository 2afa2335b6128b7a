"""Triton source of the sequential passes: decay sums inside chunks, states and their cotangents at chunk borders.

Text with ``#if FLAG`` / ``#else`` / ``#endif`` lines that :func:`dspace.emit.triton.printer.specialise`
resolves, so that a generated module holds only the lines its variant needs. Flags: ``decay`` (the state
forgets), ``key`` (its decay has a value per key channel, else one per head), ``before`` (the readout sees the
state before the token's own write).
"""

from __future__ import annotations

SPAN = '''
@_kernel
def _sequence(offsets, bases, i_n, T, NT, PACKED: tl.constexpr):
    """First token, end token and first chunk of sequence ``i_n``."""
    if PACKED:
        begin = tl.load(offsets + i_n).to(tl.int64)
        end = tl.load(offsets + i_n + 1).to(tl.int64)
        base = tl.load(bases + i_n).to(tl.int64)
    else:
        begin = i_n.to(tl.int64) * T
        end = begin + T
        base = i_n.to(tl.int64) * NT
    return begin, end, base


@_kernel
def _chunk(spans, i_c, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """First and end token of chunk ``i_c``; empty for the spare chunks of a packed batch."""
    if PACKED:
        begin = tl.load(spans + 2 * i_c).to(tl.int64)
        end = tl.load(spans + 2 * i_c + 1).to(tl.int64)
    else:
        sequence = (i_c // NT).to(tl.int64)
        begin = sequence * T + (i_c % NT).to(tl.int64) * C
        end = tl.minimum(begin + C, sequence * T + T)
    return begin, end
'''

DECAY_SUMS = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _decay_sums_kernel(g, G, spans, T, NT, H, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr):
    """G[t] = sum of log decays from the start of t's chunk to t, float32; W values a head."""
    i_c = tl.program_id(0)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    row = begin + tl.arange(0, C)
    here = (row < end)[:, None] & (column < H * W)[None, :]
    at = row[:, None] * (H * W) + column[None, :]
    step = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
    # exp(-40) is nothing beside 1: a longer step would only cost the sums their digits.
    step = tl.minimum(tl.maximum(step, -40.0), 0.0)
    tl.store(G + at, tl.cumsum(step, axis=0), mask=here)
'''

STATES = '''
@_kernel
def _state_tile(
    k, v,
#if decay
    G,
#endif
    initial, states, final, offsets, bases, i_nh, i_k, i_v, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """One tile of S at the start of every chunk: S' = exp(G_C) S + sum_s exp(G_C - G_s) k_s v_s."""
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k = o_k < K
    m_v = o_v < V
    tile = o_k[:, None] * V + o_v[None, :]
    m_tile = m_k[:, None] & m_v[None, :]
    if initial is None:  # zero
        S = tl.zeros([BK, BV], tl.float32)
    else:
        S = tl.load(initial + i_nh * K * V + tile, mask=m_tile, other=0.0).to(tl.float32)
    for i_c in range(0, tl.cdiv(end - begin, C)):
        tl.store(states + ((base + i_c) * H + i_h) * K * V + tile, S.to(states.dtype.element_ty), mask=m_tile)
        row = begin + i_c * C + o_c
        live = row < end
        last = tl.minimum(begin + i_c * C + C, end) - 1
        at = row * H + i_h
        key = tl.load(k + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        value = tl.load(v + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
#if decay
#if key
        whole = tl.load(G + (last * H + i_h) * K + o_k, mask=m_k, other=0.0)
        part = tl.load(G + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        weight = tl.exp(tl.minimum(whole[:, None] - part, 0.0))
        S = S * tl.exp(whole)[:, None]
        key = key * weight
#else
        whole = tl.load(G + last * H + i_h)
        part = tl.load(G + at, mask=live, other=0.0)
        weight = tl.exp(tl.minimum(whole - part, 0.0))
        S = S * tl.exp(whole)
        key = key * weight[None, :]
#endif
#endif
        S = tl.dot(key.to(OT), value.to(OT), S, input_precision=PRECISION)
    if final is not None:
        tl.store(final + i_nh * K * V + tile, S, mask=m_tile)


@_kernel(do_not_specialize=["T", "NT", "H"])
def _states_kernel(
    k, v,
#if decay
    G,
#endif
    initial, states, final, offsets, bases, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """S at the start of every chunk, one tile a program."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    _state_tile(
        k, v,
#if decay
        G,
#endif
        initial, states, final, offsets, bases, (pid // (NV * NK)).to(tl.int64), (pid // NV) % NK, pid % NV, T, NT, H,
        K, V, C, BK, BV, OT, PRECISION, PACKED,
    )
'''

COTANGENTS = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _cotangents_kernel(
    q, d_o,
#if decay
    G,
#endif
    d_final, d_states, d_initial, offsets, bases, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dS at the end of every chunk, backwards: dS' = exp(G_C) dS + scale sum_t exp(Gq_t) q_t do_t."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_nh = (pid // (NV * NK)).to(tl.int64)
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k = o_k < K
    m_v = o_v < V
    tile = o_k[:, None] * V + o_v[None, :]
    m_tile = m_k[:, None] & m_v[None, :]
    if d_final is None:  # zero
        dS = tl.zeros([BK, BV], tl.float32)
    else:
        dS = tl.load(d_final + i_nh * K * V + tile, mask=m_tile, other=0.0).to(tl.float32)
    chunks = tl.cdiv(end - begin, C)
    for i_r in range(0, chunks):
        i_c = chunks - 1 - i_r
        tl.store(d_states + ((base + i_c) * H + i_h) * K * V + tile, dS.to(d_states.dtype.element_ty), mask=m_tile)
        row = begin + i_c * C + o_c
        live = row < end
        last = tl.minimum(begin + i_c * C + C, end) - 1
        at = row * H + i_h
        query = tl.load(q + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
#if decay
#if before
        seen = live & (o_c > 0)
        at_q = at - H
#else
        seen = live
        at_q = at
#endif
#if key
        whole = tl.load(G + (last * H + i_h) * K + o_k, mask=m_k, other=0.0)
        part = tl.load(G + at_q[None, :] * K + o_k[:, None], mask=m_k[:, None] & seen[None, :], other=0.0)
        weight = tl.exp(part) * scale
        dS = dS * tl.exp(whole)[:, None]
        query = query * weight
#else
        whole = tl.load(G + last * H + i_h)
        part = tl.load(G + at_q, mask=seen, other=0.0)
        weight = tl.exp(part) * scale
        dS = dS * tl.exp(whole)
        query = query * weight[None, :]
#endif
#else
        query = query * scale
#endif
        dS = tl.dot(query.to(OT), d_out.to(OT), dS, input_precision=PRECISION)
    if d_initial is not None:
        tl.store(d_initial + i_nh * K * V + tile, dS, mask=m_tile)
'''

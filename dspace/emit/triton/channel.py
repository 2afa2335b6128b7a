"""Triton source for a decay per key channel: scores inside a chunk, and gradients.

exp(Gq_t - G_s) does not factor into a bounded query part and a bounded key part over a whole chunk, but it does for
t in the upper and s in the lower half of an aligned block: through the decay sum R at the block's middle,
exp(Gq_t - R) exp(R - G_s), both exponents <= 0. Every pair s < t is split by exactly one block of size 2, 4, .. C,
so log2(C) masked matmuls cover all pairs; the diagonal has no decay. The same feature, a query above the middle and
a key below it, serves both operands.
"""

from __future__ import annotations

_LEVEL = """
            for level in range(LEVELS):
                block = 1 << level
                upper = ((o_c & block) != 0)[:, None]
                middle = begin + (o_c | (2 * block - 1)) - block
                at_mid = tl.minimum(middle, end - 1) * H + i_h
                mid = tl.load(G + at_mid[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                weight = tl.exp(tl.minimum(tl.where(upper, seen - mid, mid - part), 0.0))
                own = tl.where(upper, query, key).to(tl.float32)
"""


def _less(text: str) -> str:
    """``text`` one step to the left."""
    return "\n".join(line[4:] if line.startswith("    ") else line for line in text.split("\n"))


_ROWS = """        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        apart = o_c[:, None] ^ o_c[None, :]
"""

_FEATURES = """            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if before
            seen = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & (o_c > 0)[:, None], other=0.0)
#else
            seen = part
#endif"""

SCORES = f'''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _scores_kernel(
    q, k, G, A, spans, T, NT, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """A[t, s] = sum_k q_t exp(Gq_t - G_s) k_s, one chunk a program."""
    NK: tl.constexpr = (K + BK - 1) // BK
    LEVELS: tl.constexpr = tl.constexpr(C.bit_length() - 1)
    pid = tl.program_id(0)
    i_h = pid % H
    begin, end = _chunk(spans, pid // H, T, NT, C, PACKED)
    if begin < end:
{_ROWS}        scores = tl.zeros([C, C], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_ck = live[:, None] & (o_k < K)[None, :]
{_FEATURES}{_LEVEL}                scaled = (own * weight).to(OT)
                pairs = (apart >= block) & (apart < 2 * block) & (o_c[:, None] > o_c[None, :])
                scores += tl.where(pairs, tl.dot(scaled, tl.trans(scaled), input_precision=PRECISION), 0.0)
#if before
#else
            scores += tl.where(apart == 0, tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)[:, None], 0.0)
#endif
        tl.store(A + at[:, None] * C + o_c[None, :], scores.to(A.dtype.element_ty), mask=live[:, None])
'''

VALUES = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _values_kernel(
    k, d_o, G, A, d_states, dv, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dv_s = scale sum_t A[t, s] do_t + (k_s exp(G_C - G_s)) dS, one chunk and value tile a program."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_c = pid // (NV * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_cv = live[:, None] & m_v[None, :]
        scores = tl.load(A + at[None, :] * C + o_c[:, None], mask=live[None, :], other=0.0)
        d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
        acc = tl.dot(scores.to(OT), d_out.to(OT), input_precision=PRECISION) * scale
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            whole = tl.load(G + ((end - 1) * H + i_h) * K + o_k, mask=m_k, other=0.0)
            key = key * tl.exp(tl.minimum(whole[None, :] - part, 0.0))
            tile = (i_c.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
            dS = tl.load(d_states + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
            acc = tl.dot(key.to(OT), dS.to(OT), acc, input_precision=PRECISION)
        tl.store(dv + at[:, None] * V + o_v[None, :], acc.to(dv.dtype.element_ty), mask=m_cv)
'''

KEYS = f'''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _keys_kernel(
    q, k, v, d_o, G, dg, states, d_states, dq, dk, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dq, dk and the log-decay gradient, one chunk and tile of key channels a program.

    dg_r is a sum over the pairs (t, s) whose decay contains r, and is added up as such: terms of queries from r on,
    of keys before r. Nothing large is subtracted.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    LEVELS: tl.constexpr = tl.constexpr(C.bit_length() - 1)
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    i_c = pid // (NK * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
{_ROWS}        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_ck = live[:, None] & m_k[None, :]
        at_state = (i_c.to(tl.int64) * H + i_h) * K * V
        d_scores = tl.zeros([C, C], dtype=tl.float32)
        d_scores_t = tl.zeros([C, C], dtype=tl.float32)
        acc_q = tl.zeros([C, BK], dtype=tl.float32)
        acc_k = tl.zeros([C, BK], dtype=tl.float32)
        carried = tl.zeros([BK], dtype=tl.float32)
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = o_v < V
            m_cv = live[:, None] & m_v[None, :]
            d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0).to(OT)
            value = tl.load(v + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0).to(OT)
            tile = o_k[None, :] * V + o_v[:, None]
            m_tile = m_v[:, None] & m_k[None, :]
            S = tl.load(states + at_state + tile, mask=m_tile, other=0.0)
            dS = tl.load(d_states + at_state + tile, mask=m_tile, other=0.0)
            d_scores = tl.dot(d_out, tl.trans(value), d_scores, input_precision=PRECISION)
            d_scores_t = tl.dot(value, tl.trans(d_out), d_scores_t, input_precision=PRECISION)
            acc_q = tl.dot(d_out, S.to(OT), acc_q, input_precision=PRECISION)
            acc_k = tl.dot(value, dS.to(OT), acc_k, input_precision=PRECISION)
            carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)
        # symmetric: [r, c] = scale do_max . v_min serves dq above and dk below the middle of a block
        mixed = (tl.where(o_c[None, :] > o_c[:, None], d_scores_t, d_scores) * scale).to(OT)
        same = tl.sum(tl.where(apart == 0, d_scores, 0.0), axis=1) * scale
        whole = tl.load(G + ((end - 1) * H + i_h) * K + o_k, mask=m_k, other=0.0)
{_less(_FEATURES)}
#if before
        after = o_c[None, :] > o_c[:, None]
#else
        after = o_c[None, :] >= o_c[:, None]
#endif
        earlier = o_c[None, :] < o_c[:, None]
        acc_q *= tl.exp(seen) * scale
        acc_k *= tl.exp(tl.minimum(whole[None, :] - part, 0.0))
        acc_g = tl.dot(tl.where(after, 1.0, 0.0).to(OT), (acc_q * query).to(OT), input_precision=PRECISION)
        acc_g = tl.dot(tl.where(earlier, 1.0, 0.0).to(OT), (acc_k * key).to(OT), acc_g, input_precision=PRECISION)
        acc_g += (carried * tl.exp(whole))[None, :]
{_less(_LEVEL)}            pairs = (apart >= block) & (apart < 2 * block)
            operand = (own * weight).to(OT)
            change = tl.dot(tl.where(pairs, mixed, 0.0).to(OT), operand, input_precision=PRECISION) * weight
            acc_q += tl.where(upper, change, 0.0)
            acc_k += tl.where(upper, 0.0, change)
            around = ((apart < block) & ((upper & after) | ((o_c[:, None] & block) == 0) & earlier))
            around = tl.where(around, 1.0, 0.0).to(OT)
            acc_g = tl.dot(around, (change * own).to(OT), acc_g, input_precision=PRECISION)
#if before
#else
        acc_q += same[:, None] * key
        acc_k += same[:, None] * query
#endif
        at_k = at[:, None] * K + o_k[None, :]
        tl.store(dg + at_k, acc_g, mask=m_ck)
        tl.store(dq + at_k, acc_q.to(dq.dtype.element_ty), mask=m_ck)
        tl.store(dk + at_k, acc_k.to(dk.dtype.element_ty), mask=m_ck)
'''

"""Triton source of the chunk-parallel passes: outputs, and gradients for a decay of one number per token.

Same conditional lines as :mod:`dspace.emit.triton.boundary`. Notation: chunk rows t (queries) and s (keys),
``G`` the decay sums inside the chunk, ``Gq`` the sum that a query sees (one token earlier when the readout
comes before the write). Only exponentials of numbers <= 0 are taken. With a decay per key channel the scores
come from :mod:`dspace.emit.triton.channel`.
"""

from __future__ import annotations

OUTPUTS = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _outputs_kernel(
    q, k, v,
#if decay
    G,
#endif
#if key
    A,
#endif
    states, o, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """o_t = scale (sum_s (q_t exp(Gq_t - G_s) k_s) v_s + (q_t exp(Gq_t)) S), one chunk and value tile a program."""
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
#if key
        scores = tl.load(A + at[:, None] * C + o_c[None, :], mask=live[:, None], other=0.0)
#else
        scores = tl.zeros([C, C], dtype=tl.float32)
#endif
        out = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            tile = o_k[:, None] * V + o_v[None, :]
            S = tl.load(states + (i_c.to(tl.int64) * H + i_h) * K * V + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
#if key
#if before
            part = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & (o_c > 0)[:, None], other=0.0)
#else
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#endif
            out = tl.dot((query * tl.exp(part)).to(OT), S.to(OT), out, input_precision=PRECISION)
#else
            key = tl.load(k + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
            scores = tl.dot(query.to(OT), key.to(OT), scores, input_precision=PRECISION)
            out = tl.dot(query.to(OT), S.to(OT), out, input_precision=PRECISION)
#endif
        value = tl.load(v + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
#if key
#else
#if before
        causal = o_c[:, None] > o_c[None, :]
#else
        causal = o_c[:, None] >= o_c[None, :]
#endif
#if decay
        part = tl.load(G + at, mask=live, other=0.0)
#if before
        seen = tl.load(G + at - H, mask=live & (o_c > 0), other=0.0)
#else
        seen = part
#endif
        out = out * tl.exp(seen)[:, None]
        gap = tl.minimum(seen[:, None] - part[None, :], 0.0)
        scores = scores * tl.exp(tl.where(causal & live[:, None], gap, -float("inf")))
#else
        scores = tl.where(causal, scores, 0.0)
#endif
#endif
        out = tl.dot(scores.to(OT), value.to(OT), out, input_precision=PRECISION) * scale
        tl.store(o + at[:, None] * V + o_v[None, :], out.to(o.dtype.element_ty), mask=live[:, None] & m_v[None, :])
'''

CHUNK_GRADIENTS = '''
@_kernel
def _chunk_gradients(
    q, k, v, d_o,
#if decay
    G, dg,
#endif
    states, d_states, dq, dk, dv, spans, i_c, i_h, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dq, dk, dv and the log-decay gradient of one chunk, from S at its start and dS at its end.

    dg_r is a sum over the pairs (t, s) whose decay contains r, and is added up as such: terms of queries after
    r, of keys before r, and of pairs around r. Nothing large is subtracted.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        at_state = (i_c.to(tl.int64) * H + i_h) * K * V
#if decay
        last = (end - 1) * H + i_h
        inner = live & (o_c > 0)
#endif
        # d_scores[t, s] = do_t . v_s, and its transpose [s, t] by a dot of its own (a transposed dot result
        # as operand is what Triton before 3.7.1 miscompiles on Hopper).
        d_scores = tl.zeros([C, C], dtype=tl.float32)
        d_scores_t = tl.zeros([C, C], dtype=tl.float32)
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = o_v < V
            m_cv = live[:, None] & m_v[None, :]
            d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0).to(OT)
            value = tl.load(v + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0).to(OT)
            d_scores = tl.dot(d_out, tl.trans(value), d_scores, input_precision=PRECISION)
            d_scores_t = tl.dot(value, tl.trans(d_out), d_scores_t, input_precision=PRECISION)
        # scores_t[s, t] = q_t . k_s with its decay
        scores_t = tl.zeros([C, C], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            query_t = tl.load(q + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
            scores_t = tl.dot(key.to(OT), query_t.to(OT), scores_t, input_precision=PRECISION)
#if before
        causal = o_c[:, None] > o_c[None, :]
        causal_t = o_c[None, :] > o_c[:, None]
#else
        causal = o_c[:, None] >= o_c[None, :]
        causal_t = o_c[None, :] >= o_c[:, None]
#endif
#if decay
        part = tl.load(G + at, mask=live, other=0.0)
        whole = tl.load(G + last)
#if before
        seen = tl.load(G + at - H, mask=inner, other=0.0)
#else
        seen = part
#endif
        gap = tl.minimum(seen[:, None] - part[None, :], 0.0)
        gap_t = tl.minimum(seen[None, :] - part[:, None], 0.0)
        decay = tl.exp(tl.where(causal & live[:, None], gap, -float("inf"))) * scale
        decay_t = tl.exp(tl.where(causal_t & live[None, :], gap_t, -float("inf"))) * scale
        to_query = tl.exp(seen) * scale
        to_end = tl.exp(tl.minimum(whole - part, 0.0))
        scores_t *= decay_t
        # pairs around r: sum over t from r on and s before r of scores * d_scores
        around = tl.where(o_c[None, :] > o_c[:, None], scores_t * d_scores_t, 0.0)
        of_queries = tl.sum(around, axis=0)
        of_keys = tl.sum(around, axis=1)
        d_scores *= decay
        d_scores_t *= decay_t
#else
        scores_t = tl.where(causal_t, scores_t, 0.0) * scale
        d_scores = tl.where(causal, d_scores, 0.0) * scale
        d_scores_t = tl.where(causal_t, d_scores_t, 0.0) * scale
#endif
        d_scores = d_scores.to(OT)
        d_scores_t = d_scores_t.to(OT)
        scores_t = scores_t.to(OT)
        # dv_s = sum_t scores[t, s] do_t + (k_s exp(G_C - G_s)) dS
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = o_v < V
            m_cv = live[:, None] & m_v[None, :]
            acc = tl.zeros([C, BV], dtype=tl.float32)
            for i_k in range(NK):
                o_k = i_k * BK + tl.arange(0, BK)
                m_k = o_k < K
                m_ck = live[:, None] & m_k[None, :]
                key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                tile = o_k[:, None] * V + o_v[None, :]
                dS = tl.load(d_states + at_state + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
                acc = tl.dot(key.to(OT), dS.to(OT), acc, input_precision=PRECISION)
#if decay
            acc *= to_end[:, None]
#endif
            d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
            acc = tl.dot(scores_t, d_out.to(OT), acc, input_precision=PRECISION)
            tl.store(dv + at[:, None] * V + o_v[None, :], acc.to(dv.dtype.element_ty), mask=m_cv)
        # dq_t = sum_s d_scores[t, s] k_s + exp(Gq_t) do_t S';  dk_s = sum_t d_scores[t, s] q_t + exp(G_C - G_s) v_s dS'
#if decay
        carried = 0.0
        along_query = tl.zeros([C], dtype=tl.float32)
        along_key = tl.zeros([C], dtype=tl.float32)
#endif
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            acc_q = tl.zeros([C, BK], dtype=tl.float32)
            acc_k = tl.zeros([C, BK], dtype=tl.float32)
            for i_v in range(NV):
                o_v = i_v * BV + tl.arange(0, BV)
                m_v = o_v < V
                m_cv = live[:, None] & m_v[None, :]
                tile = o_k[None, :] * V + o_v[:, None]
                m_tile = m_v[:, None] & m_k[None, :]
                S = tl.load(states + at_state + tile, mask=m_tile, other=0.0)
                dS = tl.load(d_states + at_state + tile, mask=m_tile, other=0.0)
                d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
                value = tl.load(v + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
                acc_q = tl.dot(d_out.to(OT), S.to(OT), acc_q, input_precision=PRECISION)
                acc_k = tl.dot(value.to(OT), dS.to(OT), acc_k, input_precision=PRECISION)
#if decay
                carried += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0), axis=0)
#endif
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if decay
            acc_q *= to_query[:, None]
            acc_k *= to_end[:, None]
            along_query += tl.sum(acc_q * query, axis=1)
            along_key += tl.sum(acc_k * key, axis=1)
#else
            acc_q *= scale
#endif
            acc_q = tl.dot(d_scores, key.to(OT), acc_q, input_precision=PRECISION)
            acc_k = tl.dot(d_scores_t, query.to(OT), acc_k, input_precision=PRECISION)
            tl.store(dq + at[:, None] * K + o_k[None, :], acc_q.to(dq.dtype.element_ty), mask=m_ck)
            tl.store(dk + at[:, None] * K + o_k[None, :], acc_k.to(dk.dtype.element_ty), mask=m_ck)
#if decay
        of_queries += along_query
#if before
        from_here = tl.cumsum(of_queries - of_keys, axis=0, reverse=True) - of_queries
#else
        from_here = tl.cumsum(of_queries - of_keys, axis=0, reverse=True)
#endif
        until_here = tl.cumsum(along_key, axis=0) - along_key
        tl.store(dg + at, from_here + until_here + carried * tl.exp(whole), mask=live)
#endif
'''

GRADIENTS = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _gradients_kernel(
    q, k, v, d_o,
#if decay
    G, dg,
#endif
    states, d_states, dq, dk, dv, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """Gradients of the inputs, one chunk of a head a program."""
    pid = tl.program_id(0)
    _chunk_gradients(
        q, k, v, d_o,
#if decay
        G, dg,
#endif
        states, d_states, dq, dk, dv, spans, pid // H, pid % H, scale, T, NT, H, K, V, C, BK, BV, OT, PRECISION, PACKED,
    )
'''

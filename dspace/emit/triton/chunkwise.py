"""Triton source of the chunk-parallel passes: outputs and gradients of one linear-attention core.

Same conditional lines as :mod:`dspace.emit.triton.boundary`. Notation: chunk rows t (queries) and s (keys),
``G`` the decay sums inside the chunk, ``Gq`` the sum that a query sees (one token earlier when the readout
comes before the write). Only exponentials of numbers <= 0 are taken.

With a decay per key channel, exp(Gq_t - G_s) does not factor into a bounded query part and a bounded key part
over a whole chunk, but it does for t in the upper and s in the lower half of an aligned block: through the sum
R at the block's middle, exp(Gq_t - R) exp(R - G_s). Every pair s < t is split by exactly one block size
1, 2, 4, .. C/2, so log2(C) masked matmuls cover all pairs; the diagonal has no decay.
"""

from __future__ import annotations

OUTPUTS = '''
@_kernel(do_not_specialize=["T", "NT"])
def _outputs_kernel(
    q, k, v,
#if decay
    G,
#endif
    states, o, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """o_t = scale (sum_s (q_t exp(Gq_t - G_s) k_s) v_s + (q_t exp(Gq_t)) S), one chunk and value tile a program."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
#if key
    LEVELS: tl.constexpr = tl.constexpr(C.bit_length() - 1)
#endif
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
        apart = o_c[:, None] ^ o_c[None, :]
#endif
        scores = tl.zeros([C, C], dtype=tl.float32)
        out = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            tile = o_k[:, None] * V + o_v[None, :]
            S = tl.load(states + (i_c.to(tl.int64) * H + i_h) * K * V + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
#if key
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if before
            seen = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & (o_c > 0)[:, None], other=0.0)
#else
            seen = part
#endif
            out = tl.dot((query * tl.exp(seen)).to(OT), S.to(OT), out, input_precision=PRECISION)
            for level in range(LEVELS):
                block = 1 << level
                upper = (o_c & block) != 0
                middle = begin + (o_c | (2 * block - 1)) - block
                at_mid = tl.minimum(middle, end - 1) * H + i_h
                mid = tl.load(G + at_mid[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                scaled = tl.where(upper[:, None], query, key).to(tl.float32) * tl.exp(
                    tl.minimum(tl.where(upper[:, None], seen - mid, mid - part), 0.0)
                )
                scaled = scaled.to(OT)
                pairs = (apart >= block) & (apart < 2 * block) & (o_c[:, None] > o_c[None, :])
                scores += tl.where(pairs, tl.dot(scaled, tl.trans(scaled), input_precision=PRECISION), 0.0)
#if before
#else
            scores += tl.where(apart == 0, tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)[:, None], 0.0)
#endif
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

GRADIENTS = '''
@_kernel(do_not_specialize=["T", "NT"])
def _gradients_kernel(
    q, k, v, d_o,
#if decay
    G, dg,
#endif
    states, d_states, dq, dk, dv, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dq, dk, dv and the log-decay gradient of one chunk, from S at its start and dS at its end.

    dg_r is a sum over the pairs (t, s) whose decay contains r, and is added up as such: terms of queries after
    r, of keys before r, and of pairs around r. Nothing large is subtracted.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
#if key
    LEVELS: tl.constexpr = tl.constexpr(C.bit_length() - 1)
#endif
    pid = tl.program_id(0)
    i_h = pid % H
    i_c = pid // H
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
#if key
        apart = o_c[:, None] ^ o_c[None, :]
        later = o_c[None, :] > o_c[:, None]
#endif
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if key
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if before
            seen = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & inner[:, None], other=0.0)
#else
            seen = part
#endif
            for level in range(LEVELS):
                block = 1 << level
                upper = (o_c & block) != 0
                middle = begin + (o_c | (2 * block - 1)) - block
                at_mid = tl.minimum(middle, end - 1) * H + i_h
                mid = tl.load(G + at_mid[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                scaled = tl.where(upper[:, None], query, key).to(tl.float32) * tl.exp(
                    tl.minimum(tl.where(upper[:, None], seen - mid, mid - part), 0.0)
                )
                scaled = scaled.to(OT)
                pairs = (apart >= block) & (apart < 2 * block) & later
                scores_t += tl.where(pairs, tl.dot(scaled, tl.trans(scaled), input_precision=PRECISION), 0.0)
#if before
#else
            scores_t += tl.where(apart == 0, tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)[:, None], 0.0)
#endif
#else
            query_t = tl.load(q + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
            scores_t = tl.dot(key.to(OT), query_t.to(OT), scores_t, input_precision=PRECISION)
#endif
#if key
        scores_t *= scale
        # pairs[r, c] = scale * do_max . v_min, symmetric: serves dq above and dk below the middle of a block
        mixed = tl.where(later, d_scores_t, d_scores) * scale
        same = tl.sum(tl.where(apart == 0, d_scores, 0.0), axis=1) * scale
#else
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
#endif
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
#if key
                whole = tl.load(G + last * K + o_k, mask=m_k, other=0.0)
                part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                key = key * tl.exp(tl.minimum(whole[None, :] - part, 0.0))
#endif
                acc = tl.dot(key.to(OT), dS.to(OT), acc, input_precision=PRECISION)
#if key
#else
#if decay
            acc *= to_end[:, None]
#endif
#endif
            d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
            acc = tl.dot(scores_t, d_out.to(OT), acc, input_precision=PRECISION)
            tl.store(dv + at[:, None] * V + o_v[None, :], acc.to(dv.dtype.element_ty), mask=m_cv)
        # dq_t = sum_s d_scores[t, s] k_s + exp(Gq_t) do_t S';  dk_s = sum_t d_scores[t, s] q_t + exp(G_C - G_s) v_s dS'
#if decay
#if key
#else
        carried = 0.0
        along_query = tl.zeros([C], dtype=tl.float32)
        along_key = tl.zeros([C], dtype=tl.float32)
#endif
#endif
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            acc_q = tl.zeros([C, BK], dtype=tl.float32)
            acc_k = tl.zeros([C, BK], dtype=tl.float32)
#if key
            carried = tl.zeros([BK], dtype=tl.float32)
#endif
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
#if key
                carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)
#else
                carried += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0), axis=0)
#endif
#endif
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if key
            whole = tl.load(G + last * K + o_k, mask=m_k, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
#if before
            seen = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & inner[:, None], other=0.0)
            after = o_c[None, :] > o_c[:, None]
#else
            seen = part
            after = o_c[None, :] >= o_c[:, None]
#endif
            earlier = o_c[None, :] < o_c[:, None]
            acc_q *= tl.exp(seen) * scale
            acc_k *= tl.exp(tl.minimum(whole[None, :] - part, 0.0))
            along_query = (acc_q * query).to(OT)
            along_key = (acc_k * key).to(OT)
            acc_g = tl.dot(tl.where(after, 1.0, 0.0).to(OT), along_query, input_precision=PRECISION)
            acc_g = tl.dot(tl.where(earlier, 1.0, 0.0).to(OT), along_key, acc_g, input_precision=PRECISION)
            acc_g += (carried * tl.exp(whole))[None, :]
            for level in range(LEVELS):
                block = 1 << level
                upper = (o_c & block) != 0
                middle = begin + (o_c | (2 * block - 1)) - block
                at_mid = tl.minimum(middle, end - 1) * H + i_h
                mid = tl.load(G + at_mid[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                weight = tl.exp(tl.minimum(tl.where(upper[:, None], seen - mid, mid - part), 0.0))
                own = tl.where(upper[:, None], query, key).to(tl.float32)
                pairs = (apart >= block) & (apart < 2 * block)
                change = tl.dot(
                    tl.where(pairs, mixed, 0.0).to(OT), (own * weight).to(OT), input_precision=PRECISION
                ) * weight
                acc_q += tl.where(upper[:, None], change, 0.0)
                acc_k += tl.where(upper[:, None], 0.0, change)
                around = tl.where(apart < block, tl.where(upper[:, None], after, earlier), False)
                acc_g = tl.dot(
                    tl.where(around, 1.0, 0.0).to(OT), (change * own).to(OT), acc_g, input_precision=PRECISION
                )
#if before
#else
            acc_q += same[:, None] * key
            acc_k += same[:, None] * query
#endif
            tl.store(dg + at[:, None] * K + o_k[None, :], acc_g, mask=m_ck)
#else
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
#endif
            tl.store(dq + at[:, None] * K + o_k[None, :], acc_q.to(dq.dtype.element_ty), mask=m_ck)
            tl.store(dk + at[:, None] * K + o_k[None, :], acc_k.to(dk.dtype.element_ty), mask=m_ck)
#if decay
#if key
#else
        of_queries += along_query
#if before
        from_here = tl.cumsum(of_queries - of_keys, axis=0, reverse=True) - of_queries
#else
        from_here = tl.cumsum(of_queries - of_keys, axis=0, reverse=True)
#endif
        until_here = tl.cumsum(along_key, axis=0) - along_key
        tl.store(dg + at, from_here + until_here + carried * tl.exp(whole), mask=live)
#endif
#endif
'''

"""Class d on a GPU: the values that a state with a rank-one transition writes, from a triangular system in each chunk.

With probes y, keys x, values w and sums of log decays G: ``u_t = w_t + y_t S_(t-1)``, ``S_t = exp(g_t) S_(t-1) + x_t u_t``.
In a chunk that starts from S, ``(1 - A) u = w + y exp(G_(t-1)) S`` with ``A[t, s] = y_t exp(G_(t-1) - G_s) x_s`` below the
diagonal. All chunks invert theirs at once, by substitution in blocks of 16 (powers of A would grow beyond all digits where
keys repeat); one walk over chunks makes u (arXiv:2406.06484, 2412.06464).

Backward, the cotangent of u solves the transposed system from the last chunk on, with probes and keys in each other's place;
all other gradients are those of linear attention that reads with y before the write.

Text with conditional lines, as in :mod:`dspace.emit.triton.boundary`; TAG tells apart what decays.
"""

from __future__ import annotations

from dspace.emit.triton.printer import specialise

INVERSE = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _erase_inverse_kernel(A, spans, T, NT, H, C: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr):
    """(1 - A)^-1 in place of A, which has numbers below the diagonal only; one chunk of a head a program."""
    BLOCKS: tl.constexpr = C // 16
    i_h = tl.program_id(0) % H
    begin, end = _chunk(spans, tl.program_id(0) // H, T, NT, C, PACKED)
    if begin < end:
        o = tl.arange(0, 16)
        done = ()  # blocks of the inverse below and on the diagonal, row by row
        for i in tl.static_range(BLOCKS):
            row = begin + 16 * i + o
            live = (row < end)[:, None]
            at = (row * H + i_h)[:, None] * C + o[None, :]
            own = tl.where(o[:, None] == o[None, :], 1.0, 0.0)
            for r in range(1, 16):  # rows before r are known
                place = begin + 16 * i + r
                line = tl.load(A + (place * H + i_h) * C + 16 * i + o, mask=o < tl.where(place < end, r, 0), other=0.0)
                own += tl.where(o[:, None] == r, tl.sum(line[:, None] * own, axis=0)[None, :], 0.0)
            for j in tl.static_range(i):
                acc = tl.zeros([16, 16], tl.float32)
                for m in tl.static_range(j, i):
                    part = tl.load(A + at + 16 * m, mask=live, other=0.0)
                    acc = tl.dot(part, done[m * (m + 1) // 2 + j], acc, input_precision=PRECISION)
                done = done + (tl.dot(own, acc, input_precision=PRECISION),)
            done = done + (own,)
        tl.debug_barrier()  # all of A was read
        for i in tl.static_range(BLOCKS):
            row = begin + 16 * i + o
            at = (row * H + i_h)[:, None] * C + o[None, :]
            for j in tl.static_range(i + 1):
                tl.store(A + at + 16 * j, done[i * (i + 1) // 2 + j], mask=(row < end)[:, None])
'''

SCORES = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _erase_scores_TAG_kernel(
    y, x,
#if decay
    G,
#endif
    A, spans, T, NT, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """A[t, s] = y_t exp(G_(t-1) - G_s) x_s for s < t, else 0; one chunk of a head a program."""
    i_h = tl.program_id(0) % H
    begin, end = _chunk(spans, tl.program_id(0) // H, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        scores = tl.zeros([C, C], dtype=tl.float32)
        for i_k in range((K + BK - 1) // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            probe = tl.load(y + at[:, None] * K + o_k[None, :], mask=live[:, None] & m_k[None, :], other=0.0)
            key = tl.load(x + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
            scores = tl.dot(probe.to(OT), key.to(OT), scores, input_precision=PRECISION)
        causal = o_c[:, None] > o_c[None, :]
#if decay
        part = tl.load(G + at, mask=live, other=0.0)
        seen = tl.load(G + at - H, mask=live & (o_c > 0), other=0.0)
        gap = tl.minimum(seen[:, None] - part[None, :], 0.0)
        scores = scores * tl.exp(tl.where(causal & live[:, None], gap, -float("inf")))
#else
        scores = tl.where(causal, scores, 0.0)
#endif
        tl.store(A + at[:, None] * C + o_c[None, :], scores, mask=live[:, None])
'''
"""For a decay per key channel, :mod:`dspace.emit.triton.channel` has it."""

WALK = '''
@_kernel(do_not_specialize=["T", "NT", "H"])
def _erase_TAG_kernel(
    rows, columns, w, inverse,
#if decay
    G,
#endif
    initial, u, offsets, bases, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):
    """u = inverse (w + rows S) in each chunk, then S' = exp(G_C) S + columns u; one tile of value channels a program.

    Rows are probes, as seen from the chunk's start, columns are keys, as left at its end; REVERSE: keys and probes, the
    inverse transposed, from the last chunk on.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_nh = (tl.program_id(0) // NV).to(tl.int64)
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) % NV * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k = o_k < K
    m_v = o_v < V
    if initial is None:  # zero
        S = tl.zeros([BK, BV], tl.float32)
    else:
        tile = o_k[:, None] * V + o_v[None, :]
        S = tl.load(initial + i_nh * K * V + tile, mask=m_k[:, None] & m_v[None, :], other=0.0).to(tl.float32)
    chunks = tl.cdiv(end - begin, C)
    for i in range(0, chunks):
        if REVERSE:
            start = begin + (chunks - 1 - i) * C
        else:
            start = begin + i * C
        row = start + o_c
        live = row < end
        at = row * H + i_h
        row_tile = tl.load(rows + at[:, None] * K + o_k[None, :], mask=live[:, None] & m_k[None, :], other=0.0)
        column_tile = tl.load(columns + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        if REVERSE:
            solve = tl.load(inverse + at[None, :] * C + o_c[:, None], mask=live[None, :], other=0.0)
        else:
            solve = tl.load(inverse + at[:, None] * C + o_c[None, :], mask=live[:, None], other=0.0)
        given = tl.load(w + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0).to(tl.float32)
#if decay
        last = (tl.minimum(start + C, end) - 1) * H + i_h
        seen = live & (o_c > 0)
#if key
        whole = tl.load(G + last * K + o_k, mask=m_k, other=0.0)
        if REVERSE:
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=live[:, None] & m_k[None, :], other=0.0)
            row_tile = row_tile * tl.exp(tl.minimum(whole[None, :] - part, 0.0))
            part = tl.load(G + (at - H)[None, :] * K + o_k[:, None], mask=m_k[:, None] & seen[None, :], other=0.0)
            column_tile = column_tile * tl.exp(part)
        else:
            part = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=seen[:, None] & m_k[None, :], other=0.0)
            row_tile = row_tile * tl.exp(part)
            part = tl.load(G + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
            column_tile = column_tile * tl.exp(tl.minimum(whole[:, None] - part, 0.0))
        kept = tl.exp(whole)[:, None]
#else
        whole = tl.load(G + last)
        to_end = tl.exp(tl.minimum(whole - tl.load(G + at, mask=live, other=0.0), 0.0))
        from_start = tl.exp(tl.load(G + at - H, mask=seen, other=0.0))
        if REVERSE:
            row_tile = row_tile * to_end[:, None]
            column_tile = column_tile * from_start[None, :]
        else:
            row_tile = row_tile * from_start[:, None]
            column_tile = column_tile * to_end[None, :]
        kept = tl.exp(whole)
#endif
#endif
        given = tl.dot(row_tile.to(OT), S.to(OT), given, input_precision=PRECISION)
        value = tl.dot(solve, given, input_precision=PRECISION).to(u.dtype.element_ty)
        tl.store(u + at[:, None] * V + o_v[None, :], value, mask=live[:, None] & m_v[None, :])
#if decay
        S = S * kept
#endif
        S = tl.dot(column_tile.to(OT), value.to(OT), S, input_precision=PRECISION)
'''

HOST = '''
def _erase_proposals_TAG(K, V, dtype):
    """Tokens a chunk, tile of v, warps, stages; the first by default.

    Chunks of 32 keep to the older matrix instructions: of the warp-group ones Triton 3.6 miscompiles the transposed solve.
    """
    wide = _tile(V, 32 if K <= 128 else 16)
    if dtype != torch.bfloat16:
        return [(16, wide, 4, 2), (32, _tile(V, 16), 4, 1)]
    return [(32, wide, 4, 3), (32, wide, 4, 2), (32, _tile(V, 16), 4, 3), (32, _tile(V, 64), 8, 2), (64, _tile(V, 64), 4, 2)]


def _erase_solve_TAG(y, x, w, g, initial, offsets, reverse):
    """u, or with ``reverse`` its cotangent that counts all later tokens; ``g`` is a tuple of the log decays, if there are any."""
    B, T, H, K = x.shape
    V = w.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    C, BV, warps, stages = _chosen(_erase_proposals_TAG, "erase_TAG", K, V, x.dtype)
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    OT, precision = _operands(x.dtype)
#if decay
    sums = (_decay_sums_BEFORE(*g, spans, T, NT, chunks, C),)
#else
    sums = ()
#endif
    A = torch.empty((B, T, H, C), dtype=torch.float32, device=x.device)
    _launch(
#if key
        _scores_BEFORE_kernel,
#else
        _erase_scores_TAG_kernel,
#endif
        (H * chunks, 1, 1), (y, x, *sums, A, spans), (T, NT, H), (), K=K, C=C, BK=_tile(K, 64),
        OT=OT, PRECISION=precision, PACKED=spans is not None, num_warps=4, num_stages=1,
    )
    _launch(
        _erase_inverse_kernel, (H * chunks, 1, 1), (A, spans), (T, NT, H), (), C=C, PRECISION=_EXACT,
        PACKED=spans is not None, num_warps=1,
    )
    u = torch.empty(w.shape, dtype=x.dtype, device=w.device)
    rows, columns = (x, y) if reverse else (y, x)
    _launch(
        _erase_TAG_kernel, (_cdiv(V, BV) * N * H, 1, 1), (rows, columns, w, A, *sums, initial, u, offsets, bases),
        (T, NT, H), (), K=K, V=V, C=C, BK=_tile(K, 1 << 20), BV=BV, OT=OT, PRECISION=precision,
        PACKED=offsets is not None, REVERSE=reverse, num_warps=warps, num_stages=stages,
    )
    return (u,)


@_repeated
def _erase_forward_TAG(y, x, w, *rest):
    *g, initial, offsets = rest
    return _erase_solve_TAG(y, x, w, g, initial, offsets, False)


@_repeated
def _erase_adjoint_TAG(y, x, d_u, *rest):
    *g, offsets = rest
    return _erase_solve_TAG(y, x, d_u, g, None, offsets, True)


def _erase_backward_TAG(y, x, w, *rest):
    """Gradients of the tensors before ``u``, the result of the forward pass; that of an initial state that is None: None."""
    *g, initial, u, d_u, offsets = rest
    (d_w,) = _erase_adjoint_TAG(y, x, d_u, *g, offsets)
    d_y, d_x, _, *others = _backward_BEFORE(y, x, u, *g, initial, d_w, None, 1.0, offsets)
    return d_y, d_x, d_w, *others


#if decay
_ERASE_TAG = "Tensor y, Tensor x, Tensor w, Tensor g, Tensor? initial"
#else
_ERASE_TAG = "Tensor y, Tensor x, Tensor w, Tensor? initial"
#endif
_erase_TAG_op = torch.library.custom_op(
    f"{_OPS}::erase_TAG",
    lambda *arguments: _erase_forward_TAG(*arguments)[0],
    mutates_args=(),
    schema=f"({_ERASE_TAG}, Tensor? offsets) -> Tensor",
)
_erase_TAG_backward_op = torch.library.custom_op(
    f"{_OPS}::erase_TAG_backward",
    lambda *arguments: [t for t in _erase_backward_TAG(*arguments) if t is not None],
    mutates_args=(),
    schema=f"({_ERASE_TAG}, Tensor u, Tensor d_u, Tensor? offsets) -> Tensor[]",
)


@_erase_TAG_op.register_fake
def _erase_TAG_fake(y, x, w, *rest):
    return torch.empty(w.shape, dtype=x.dtype, device=w.device)


@_erase_TAG_backward_op.register_fake
def _erase_TAG_backward_fake(*arguments):
    return [torch.empty_like(t) for t in arguments[:-3] if t is not None]


def _erase_TAG_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _erase_TAG_gradient(ctx, d_u):
    *tensors, offsets, u = ctx.saved_tensors
    grads = _erase_TAG_backward_op(*tensors, u, d_u.contiguous(), offsets)
    return (*grads, *[None] * (len(tensors) - len(grads)), None)


_erase_TAG_op.register_autograd(_erase_TAG_gradient, setup_context=_erase_TAG_save)


class _erase_TAG_eager(torch.autograd.Function):
    """The same without the operator's dispatch."""

    @staticmethod
    def forward(ctx, *arguments):
        (u,) = _erase_forward_TAG(*arguments)
        _erase_TAG_save(ctx, arguments, u)
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_u):
        *tensors, offsets, u = ctx.saved_tensors
        return (*_erase_backward_TAG(*tensors, u, d_u.contiguous(), offsets), None)


def _erase_TAG(*arguments):
    """u_t = w_t + y_t S_(t-1), where S_t = exp(g_t) S_(t-1) + x_t u_t, differentiable; the initial state may be None: zero."""
    *tensors, offsets = arguments
    tensors = [None if t is None else t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        return _erase_TAG_op(*tensors, offsets)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return _erase_TAG_eager.apply(*tensors, offsets)
    return _erase_forward_TAG(*tensors, offsets)[0]
'''


def source(decay: str, before: str) -> str:
    """Kernels, launches and operators; ``decay`` is "none", "scalar" or "key", ``before`` the core that reads before a write."""
    flags = {"decay": decay != "none", "key": decay == "key"}
    texts = [WALK, HOST] if flags["key"] else [SCORES, WALK, HOST]
    text = INVERSE + "\n".join(specialise(t, flags) for t in texts)
    return text.replace("TAG", decay).replace("BEFORE", before)

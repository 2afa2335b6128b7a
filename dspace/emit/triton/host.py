"""Source of the host side of a linear-attention core: configuration, launches, custom operators.

Text with conditional lines, as in :mod:`dspace.emit.triton.boundary`: ``CORE``, ``FORWARD``, ``BACKWARD`` and
``OPERATORS``, once for each kind of decay, with names told apart by :func:`renamed`. They stand on :mod:`dspace.emit.triton.launching`.
"""

from __future__ import annotations

import re

_LOCAL = re.compile(
    r"\b_(config_proposals|config|state_tile|states|forward|backward|decay_sums|linear|outputs|cotangents|chunk_gradients|gradients|scores|values|keys)(?=(?:_kernel|_op|_eager|_fake|_save|_gradient|_backward_op|_backward_fake)?\b)"
)


def renamed(text: str, tag: str) -> str:
    """``text`` with the names of one core made its own: ``_forward`` becomes ``_forward_TAG``."""
    return _LOCAL.sub(rf"_\1_{tag}", text)


CORE = '''
def _config_proposals(K, V, dtype):
    """Chunk and (k tile, v tile, warps, stages) of the states, outputs and gradients kernels; the first by default.

    Tiles follow from the shared memory and registers that they take.
    """
    if dtype != torch.bfloat16:  # float32 operands take twice the shared memory, and three products each
        return [(32, (_tile(K, 32), _tile(V, 64), 4, 2), (_tile(K, 32), _tile(V, 64), 4, 1), (_tile(K, 32), _tile(V, 32), 4, 1))]
    k, v = _tile(K, 64), _tile(V, 64)
    if min(k, v) < 64:
        # Chunks of 32, or two warps, keep to the older matrix instructions: with operands narrower than 64, Triton 3.6
        # miscompiles the gradients for the warp-group ones. Two warps hold a chunk of 64 by spilling kilobytes.
        four, two = ((32, (k, v, 2, 3), (k, _tile(V, 128), w, 1), (k, v, w, 1)) for w in (4, 2))
        return [four, two, (64, (k, v, 2, 3), (k, _tile(V, 128), 2, 1), (k, v, 2, 1))]
#if key
    first = 64, (k, v, 4, 3), (k, _tile(V, 128), 4, 1), (k, v, 8, 1)
#else
    first = 64, (k, v, 4, 3), (k, _tile(V, 128), 4, 2), (k, v, 4, 3)
#endif
    deep = first[0], (k, v, 4, 4), first[2], first[3]
    wide = first[0], (k, _tile(V, 128), 4, 2), first[2], first[3]
#if key
    return [first, deep, wide]
#else
    return [first, deep, wide, (*first[:3], (k, v, 4, 1))]
#endif


def _config(K, V, dtype):
    return _chosen(_config_proposals, "linear_TAG", K, V, dtype)


#if decay
def _decay_sums(g, spans, T, NT, chunks, C):
    H = g.shape[2]
    W = g.shape[3] if g.dim() == 4 else 1
    G = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    BW = _tile(H * W, 64)
    grid = (chunks, _cdiv(H * W, BW), 1)
    _launch(_decay_sums_kernel, grid, (g, G, spans), (T, NT, H), (), C=C, W=W, BW=BW, PACKED=spans is not None)
    return G


#endif
def _states(k, v,
#if decay
    G,
#endif
    initial, offsets, bases, NT, chunks, config, N, want_final):
    C, (BK, BV, warps, stages), _, _ = config
    B, T, H, K = k.shape
    V = v.shape[-1]
    OT, precision = _operands(k.dtype)
    states = torch.empty((chunks, H, K, V), dtype=k.dtype if k.dtype == torch.bfloat16 else torch.float32, device=k.device)
    final = torch.empty((N, H, K, V), dtype=torch.float32, device=k.device) if want_final else None
    grid = (_cdiv(K, BK) * _cdiv(V, BV) * N * H, 1, 1)
    pointers = (
        k, v,
#if decay
        G,
#endif
        initial, states, final, offsets, bases,
    )
    _launch(
        _states_kernel, grid, pointers, (T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    return states, final


#if key
def _scores(q, k, G, spans, NT, chunks, config):
    C, _, _, (BK, _, warps, stages) = config
    B, T, H, K = k.shape
    OT, precision = _operands(k.dtype)
    A = torch.empty((B, T, H, C), dtype=k.dtype if k.dtype == torch.bfloat16 else torch.float32, device=k.device)
    _launch(
        _scores_kernel, (H * chunks, 1, 1), (q, k, G, A, spans), (T, NT, H), (), K=K, C=C, BK=BK,
        OT=OT, PRECISION=precision, PACKED=spans is not None, num_warps=warps, num_stages=stages,
    )
    return A


#endif
'''

FORWARD = '''
@_repeated
def _forward(q, k, v,
#if decay
    g,
#endif
    initial, scale, offsets, want_final=True, keep=False):
    """o and the final state, None unless wanted; with ``keep`` what is made on the way. ``initial`` may be None: zero."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config(K, V, k.dtype)
    C, _, (BK, BV, warps, stages), _ = config
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
#if decay
    G = _decay_sums(g, spans, T, NT, chunks, C)
#endif
    states, final = _states(k, v,
#if decay
        G,
#endif
        initial, offsets, bases, NT, chunks, config, N, want_final)
    o = torch.empty_like(v)
    OT, precision = _operands(k.dtype)
#if key
    A = _scores(q, k, G, spans, NT, chunks, config)
#endif
    pointers = (
        q, k, v,
#if decay
        G,
#endif
#if key
        A,
#endif
        states, o, spans,
    )
    _launch(
        _outputs_kernel, (_cdiv(V, BV) * H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    if not keep or states.numel() * states.element_size() > _KEPT:
        return o, final
    return (
        o, final, states,
#if decay
        G,
#endif
#if key
        A,
#endif
    )
'''

BACKWARD = '''
@_repeated
def _backward(q, k, v,
#if decay
    g,
#endif
    initial, d_o, d_final, scale, offsets, *kept):
    """Gradients of the tensors before d_o; None for that of an initial state that is None, as d_final may be: zero."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config(K, V, k.dtype)
    C, (BK, BV, warps, stages), _, gradients = config
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    if kept:
        states, *kept = kept
#if decay
        G, *kept = kept
#endif
    else:
#if decay
        G = _decay_sums(g, spans, T, NT, chunks, C)
#endif
        states, _ = _states(k, v,
#if decay
            G,
#endif
            initial, offsets, bases, NT, chunks, config, N, False)
    OT, precision = _operands(k.dtype)
    if d_o is None:
        d_o = torch.zeros_like(v)
    d_states = torch.empty_like(states)
    d_initial = None if initial is None else torch.empty_like(initial)
#if decay
    dg = torch.empty_like(g)
#endif
    grid = (_cdiv(K, BK) * _cdiv(V, BV) * N * H, 1, 1)
    pointers = (
        q, d_o,
#if decay
        G,
#endif
        d_final, d_states, d_initial, offsets, bases,
    )
    _launch(
        _cotangents_kernel, grid, pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
#if key
    _, _, (BK, BV, warps, stages), gradients = config
    A = kept[0] if kept else _scores(q, k, G, spans, NT, chunks, config)
    pointers = (k, d_o, G, A, d_states, dv, spans)
    _launch(
        _values_kernel, (_cdiv(V, BV) * H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    BK, BV, warps, stages = gradients
    pointers = (q, k, v, d_o, G, dg, states, d_states, dq, dk, spans)
    _launch(
        _keys_kernel, (_cdiv(K, BK) * H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
#else
    BK, BV, warps, stages = gradients
    pointers = (
        q, k, v, d_o,
#if decay
        G, dg,
#endif
        states, d_states, dq, dk, dv, spans,
    )
    _launch(
        _gradients_kernel, (H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
#endif
    return (
        dq, dk, dv,
#if decay
        dg,
#endif
        d_initial,
    )
'''

OPERATORS = '''
_linear_op = torch.library.custom_op(
    f"{_OPS}::linear_TAG",
    lambda *arguments: _forward(*arguments),
    mutates_args=(),
#if decay
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor initial, float scale, Tensor? offsets) -> (Tensor, Tensor)",
#else
    schema="(Tensor q, Tensor k, Tensor v, Tensor initial, float scale, Tensor? offsets) -> (Tensor, Tensor)",
#endif
)
_linear_backward_op = torch.library.custom_op(
    f"{_OPS}::linear_TAG_backward",
    lambda *arguments: _backward(*arguments),
    mutates_args=(),
#if decay
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor initial, Tensor d_o, Tensor d_final, float scale, Tensor? offsets)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
#else
    schema="(Tensor q, Tensor k, Tensor v, Tensor initial, Tensor d_o, Tensor d_final, float scale, Tensor? offsets)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
#endif
)


@_linear_op.register_fake
def _linear_fake(q, k, v, *rest):
    initial = rest[-3]
    return torch.empty_like(v), torch.empty_like(initial)


@_linear_backward_op.register_fake
def _linear_backward_fake(*tensors):
    return tuple(torch.empty_like(t) for t in tensors[:-4])


def _linear_save(ctx, inputs, output):
    *tensors, ctx.scale, offsets = inputs
    ctx.save_for_backward(*tensors, offsets)


def _linear_gradient(ctx, d_o, d_final):
    *tensors, offsets = ctx.saved_tensors
    grads = _linear_backward_op(*tensors, d_o.contiguous(), d_final.contiguous(), ctx.scale, offsets)
    return (*grads, None, None)


_linear_op.register_autograd(_linear_gradient, setup_context=_linear_save)


class _linear_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.scale, offsets, _ = arguments
        o, final, *kept = _forward(*arguments, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, offsets, *kept)
        return o, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, d_final):
#if decay
        q, k, v, g, initial, offsets, *kept = ctx.saved_tensors
        tensors = q, k, v, g, initial
#else
        q, k, v, initial, offsets, *kept = ctx.saved_tensors
        tensors = q, k, v, initial
#endif
        given = [None if d is None else d.contiguous() for d in (d_o, d_final)]
        return (*_backward(*tensors, *given, ctx.scale, offsets, *kept), None, None, None)


def _linear(*arguments):
    """o_t = scale q_t S_t and the final state of S_t = exp(g_t) S_(t-1) + k_t v_t, differentiable.

    The initial state may be None: zero; the last argument says whether the final one is wanted.
    """
    *tensors, scale, offsets, want_final = arguments
    tensors = [None if t is None else t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        return _linear_op(*tensors, scale, offsets)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return _linear_eager.apply(*tensors, scale, offsets, want_final)
    return _forward(*tensors, scale, offsets, want_final)
'''

"""Source of the host side of vector states: launches, custom operators, the function that a core calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspace.emit.triton.vector import VectorGroup


def host(group: VectorGroup) -> str:
    """Source of the launches, operators and the function ``_vector_TAG`` of one group."""
    tag, counts = group.tag, (len(group.inputs), len(group.parameters), len(group.states), len(group.features))
    channels = tuple(bool(v.axes and group.axes) for v in (*group.inputs, *group.parameters))
    n_in, n_par, n_state, n_feature = counts
    tensors = n_in + n_par + n_state
    schema = ", ".join(f"Tensor t{i}" for i in range(tensors))
    grads = ", ".join(f"Tensor t{i}" for i in range(tensors + n_feature + 2 * n_state))
    result = ", ".join(["Tensor"] * (n_feature + 3 * n_state))
    returned = ", ".join(["Tensor"] * tensors)
    forward_launch = f"_vector_{tag}_kernel[grid]"
    backward_launch = f"_vector_{tag}_backward_kernel[grid]"
    width = f"tensors[{n_in + n_par}].shape[2]" if group.axes else "1"
    return f'''
_VECTOR_{tag} = {channels!r}  # which inputs and parameters have channels


def _vector_{tag}_tile(W):
    """Tokens a chunk, channels a program, warps."""
    return 64, 1 if W == 1 else _tile(W, 32), 4


def _vector_{tag}_forward(*arguments):
    *tensors, scale, raw, offsets, dtype = arguments
    inputs, parameters, initial = tensors[:{n_in}], tensors[{n_in}:{n_in + n_par}], tensors[{n_in + n_par}:]
    B, T, H = inputs[0].shape[:3] if inputs else dtype.shape[:3]
    W = {width}
    N = initial[0].shape[0]
    C, BW, warps = _vector_{tag}_tile(W)
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    like = initial[0]
    channels = (W,) if {bool(group.axes)} else ()
    features = [torch.empty((B, T, H, *channels), dtype=dtype.dtype, device=like.device) for _ in range({n_feature})]
    values = [like.new_empty((B, T, H, *channels) if raw else (0,)) for _ in initial]
    borders = [like.new_empty((chunks, H, *channels)) for _ in initial]
    final = [torch.empty_like(t) for t in initial]
    total, local = ([torch.empty_like(t) for t in borders] for _ in range(2))
    grid = (_cdiv(W, BW) * H * chunks,)
    _vector_{tag}_sums_kernel[grid](
        *inputs, *parameters, *total, *local, spans, scale, T, NT, H,
        W=W, C=C, BW=BW, RAW=raw, PACKED=offsets is not None, num_warps=warps,
    )
    for state in zip(total, local, initial, borders, final):
        _carry_vector_kernel[(_cdiv(W, BW) * N * H,)](
            *state, offsets, bases, T, NT, H,
            W=W, C=C, BW=BW, BN=16, REVERSE=False, PACKED=offsets is not None, num_warps=1,
        )
    {forward_launch}(
        *inputs, *parameters, *features, *values, *borders, spans, scale, T, NT, H,
        W=W, C=C, BW=BW, RAW=raw, PACKED=offsets is not None, num_warps=warps,
    )
    return (*features, *values, *borders, *final)


def _vector_{tag}_backward(*arguments):
    *tensors, scale, raw, offsets = arguments
    inputs, parameters = tensors[:{n_in}], tensors[{n_in}:{n_in + n_par}]
    borders = tensors[{n_in + n_par}:{tensors}]
    d_features = tensors[{tensors}:{tensors + n_feature}]
    d_values = tensors[{tensors + n_feature}:{tensors + n_feature + n_state}]
    d_final = tensors[{tensors + n_feature + n_state}:]
    like = d_final[0]
    N, H = like.shape[:2]
    B, T = inputs[0].shape[:2] if inputs else d_features[0].shape[:2]
    W = like.shape[2] if {bool(group.axes)} else 1
    C, BW, warps = _vector_{tag}_tile(W)
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    tiles = _cdiv(W, BW)
    grid = (tiles * H * chunks,)
    d_inputs = [
        torch.empty_like(t) if wide else like.new_empty((tiles, B, T, H)) for t, wide in zip(inputs, _VECTOR_{tag})
    ]
    d_parameters = [like.new_zeros((chunks, H, W)) for _ in parameters]
    d_initial = [torch.empty_like(t) for t in d_final]
    d_borders, total, local = ([torch.empty_like(t) for t in borders] for _ in range(3))
    _vector_{tag}_back_sums_kernel[grid](
        *inputs, *parameters, *borders, *d_features, *d_values, *total, *local, spans, scale, T, NT, H,
        W=W, C=C, BW=BW, RAW=raw, PACKED=offsets is not None, num_warps=warps,
    )
    for state in zip(total, local, d_final, d_borders, d_initial):
        _carry_vector_kernel[(tiles * N * H,)](
            *state, offsets, bases, T, NT, H,
            W=W, C=C, BW=BW, BN=16, REVERSE=True, PACKED=offsets is not None, num_warps=1,
        )
    {backward_launch}(
        *inputs, *parameters, *borders, *d_features, *d_values, *d_borders, *d_inputs, *d_parameters,
        B * T * H, spans, scale, T, NT, H,
        W=W, C=C, BW=BW, RAW=raw, PACKED=offsets is not None, num_warps=warps,
    )
    d_inputs = [d if wide else d.sum(0).to(t.dtype) for d, t, wide in zip(d_inputs, inputs, _VECTOR_{tag})]
    d_parameters = [
        d.sum(0).reshape(t.shape) if wide else d.sum((0, 2)) for d, t, wide in zip(d_parameters, parameters, _VECTOR_{tag}[{n_in}:])
    ]
    return (*d_inputs, *d_parameters, *d_initial)


_vector_{tag}_op = torch.library.custom_op(
    f"{{_OPS}}::vector_{tag}", _vector_{tag}_forward, mutates_args=(),
    schema="({schema}, float scale, bool raw, Tensor? offsets, Tensor dtype) -> ({result})",
)
_vector_{tag}_backward_op = torch.library.custom_op(
    f"{{_OPS}}::vector_{tag}_backward", _vector_{tag}_backward, mutates_args=(),
    schema="({grads}, float scale, bool raw, Tensor? offsets) -> ({returned})",
)


@_vector_{tag}_op.register_fake
def _vector_{tag}_fake(*arguments):
    *tensors, scale, raw, offsets, dtype = arguments
    initial = tensors[{n_in + n_par}:]
    B, T, H = dtype.shape[:3]
    chunks = -(-T // 64) * B if offsets is None else T // 64 + initial[0].shape[0]
    channels = initial[0].shape[2:]
    features = [dtype.new_empty((B, T, H, *channels)) for _ in range({n_feature})]
    values = [t.new_empty((B, T, H, *channels) if raw else (0,)) for t in initial]
    borders = [t.new_empty((chunks, H, *channels)) for t in initial]
    return (*features, *values, *borders, *(torch.empty_like(t) for t in initial))


@_vector_{tag}_backward_op.register_fake
def _vector_{tag}_backward_fake(*arguments):
    tensors = arguments[:-3]
    return (*(torch.empty_like(t) for t in tensors[:{n_in + n_par}]), *(torch.empty_like(t) for t in tensors[-{n_state}:]))


def _vector_{tag}_save(ctx, inputs, output):
    *tensors, scale, raw, offsets, dtype = inputs
    ctx.scale, ctx.raw = scale, raw
    ctx.save_for_backward(*tensors[:{n_in + n_par}], *output[{n_feature + n_state}:{n_feature + 2 * n_state}], offsets)


def _vector_{tag}_gradient(ctx, *cotangents):
    *saved, offsets = ctx.saved_tensors
    used = [*cotangents[:{n_feature + n_state}], *cotangents[{n_feature + 2 * n_state}:]]
    grads = _vector_{tag}_backward_op(*saved, *(t.contiguous() for t in used), ctx.scale, ctx.raw, offsets)
    return (*grads, None, None, None, None)


_vector_{tag}_op.register_autograd(_vector_{tag}_gradient, setup_context=_vector_{tag}_save)


class _vector_{tag}_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _vector_{tag}_forward(*arguments)
        _vector_{tag}_save(ctx, arguments, output)
        borders = output[{n_feature + n_state}:{n_feature + 2 * n_state}]
        ctx.mark_non_differentiable(*borders)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        *saved, offsets = ctx.saved_tensors
        used = [*cotangents[:{n_feature + n_state}], *cotangents[{n_feature + 2 * n_state}:]]
        grads = _vector_{tag}_backward(*saved, *(t.contiguous() for t in used), ctx.scale, ctx.raw, offsets)
        return (*grads, None, None, None, None)


def _vector_{tag}(*arguments):
    """Features of every token, values of the states (empty unless ``raw``), final states: each a list."""
    *tensors, scale, raw, offsets, like = arguments
    tensors = [t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        run = _vector_{tag}_op
    elif torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        run = _vector_{tag}_eager.apply
    else:
        run = _vector_{tag}_forward
    out = run(*tensors, scale, raw, offsets, like.detach())
    return out[:{n_feature}], out[{n_feature}:{n_feature + n_state}], out[{n_feature + 2 * n_state}:]
'''

"""Source of the host side of vector states: launches, custom operators, the function that a core calls."""

from __future__ import annotations

from dspace.emit.triton.vector_group import VectorGroup

PLAN = '''
_PROGRAMS = 256  # programs that keep a GPU busy with vector states: fewer walk at the pace of their latency
_SHORTEST = 256  # tokens that a program walks at least


def _segments(T, offsets, N, B, H, tiles, C):
    """Segments that programs walk over: (spans, bases, NT, segments, length, whether each is a whole sequence).

    Sequences stay whole where there are many, whatever their length, so that no length needs other kernels.
    """
    if offsets is None and 2 * N * H * tiles >= _PROGRAMS:
        return None, None, 1, N, T, True
    length = max(_cdiv(B * T * H * tiles, _PROGRAMS), _SHORTEST)
    length = _cdiv(length, C) * C
    return (*_plan(T, offsets, N, length), length, False)
'''


# A product of 64 rows is one for warp groups, of 32 rows for single warps. Float32 operands are three products.
_PRODUCTS = """    if dtype == torch.float32 or W < 32:
        return [(32, _tile(W, 32), 4, 4, 2), (32, _tile(W, 32), 2, 2, 2)]
    found = [(64, 32, 4, 4, 3), (64, 32, 8, 8, 3), (32, 32, 2, 2, 3), (32, 32, 2, 2, 4)]
    return found if W <= 32 else [*found, (32, 64, 8, 8, 3), (32, 64, 4, 4, 3)]"""


def host(group: VectorGroup) -> str:
    """Source of the launches, operators and the function ``_vector_TAG`` of one group."""
    tag, leaves = group.tag, (*group.inputs, *group.parameters)
    n_in, n_par, n_state, n_feature = (len(x) for x in (group.inputs, group.parameters, group.states, group.features))
    n_leaf, tensors = n_in + n_par, n_in + n_par + n_state
    channels = tuple(group.wide(v) for v in leaves)
    through = tuple(group.inputs.index(v) for v in group.through)
    schema = ", ".join(f"Tensor t{i}" for i in range(tensors))
    given = [f"Tensor t{i}" for i in range(tensors + n_feature)]
    given += [f"Tensor? v{i}" for i in range(n_state)] + [f"Tensor? h{i}" for i in range(len(through))]
    given += [f"Tensor f{i}" for i in range(n_state)]
    result = ", ".join(["Tensor"] * (n_feature + 3 * n_state))
    returned = ", ".join(["Tensor"] * tensors)
    width = f"tensors[{n_leaf}].shape[2]" if group.axes else "1"
    proposals = _PRODUCTS if group.products else "    return [(64, 1 if W == 1 else _tile(W, 32), 4, 4, 1)]"
    cut = n_feature + n_state
    return f'''
_VECTOR_{tag} = {channels!r}  # which inputs and parameters have channels
_VECTOR_{tag}_through = {through!r}  # inputs that are handed on, so that their other gradient is added here


def _vector_{tag}_proposals(W, dtype):
    """Tokens a chunk, channels a program, warps forward and backward, stages; the first by default."""
{proposals}


def _vector_{tag}_options(inputs, like, W, T, B, offsets, backward):
    """Grid, tiles of channels, spans of the segments and other arguments of the launches."""
    N, H = like.shape[:2]
    dtype = next((t.dtype for t, wide in zip(inputs, _VECTOR_{tag}) if wide), torch.float32)
    C, BW, *warps, stages = _chosen(_vector_{tag}_proposals, "vector_{tag} " + _ID, W, dtype)
    tiles = _cdiv(W, BW)
    spans, bases, NT, segments, length, single = _segments(T, offsets, N, B, H, tiles, C)
    fast = _fast(like)
    precision = "tf32" if dtype != torch.float32 else _EXACT
    fixed = dict(
        W=W, C=C, BW=BW, SINGLE=single, PRECISION=precision, STAGES=stages,
        FAST=fast, PACKED=offsets is not None, num_warps=warps[backward],
    )
    carry = dict(W=W, BW=BW, BN=16, PACKED=offsets is not None, num_warps=1)
    return (tiles * H * segments, 1, 1), tiles, segments, single, (T, NT, H, length), spans, bases, fixed, carry


def _vector_{tag}_slots(B, T, N):
    """Places for the states at chunk borders, however a batch is cut into segments."""
    return B * T // 32 * 2 + N


@_repeated
def _vector_{tag}_forward(*arguments):
    *tensors, scale, raw, offsets, dtype, save = arguments
    inputs, parameters, initial = tensors[:{n_in}], tensors[{n_in}:{n_leaf}], tensors[{n_leaf}:]
    B, T, H = inputs[0].shape[:3] if inputs else dtype.shape[:3]
    W = {width}
    like, N = initial[0], initial[0].shape[0]
    grid, tiles, segments, single, sizes, spans, bases, fixed, carry = _vector_{tag}_options(inputs, like, W, T, B, offsets, False)
    channels = (W,) if {bool(group.axes)} else ()
    features = [torch.empty((B, T, H, *channels), dtype=dtype.dtype, device=like.device) for _ in range({n_feature})]
    values = [like.new_empty((B, T, H, *channels) if raw else (0,)) for _ in initial]
    saved = [like.new_empty((_vector_{tag}_slots(B, T, N), H, *channels) if save else (0,)) for _ in initial]
    final = [torch.empty_like(t) for t in initial]
    borders = initial
    if not single:
        total, local, borders = ([like.new_empty((segments, H, *channels)) for _ in initial] for _ in range(3))
        _launch(_vector_{tag}_sums_kernel, grid, (*inputs, *parameters, *total, *local, spans), (scale, *sizes), (), **fixed)
        for state in zip(total, local, initial, borders, final):
            _launch(_carry_vector_kernel, (tiles * N * H, 1, 1), (*state, offsets, bases), sizes, (), REVERSE=False, **carry)
    none = [None] * {n_state}
    pointers = (
        *inputs, *parameters, *features, *(values if raw else none), *borders, *(saved if save else none), *final, spans,
    )
    _launch(_vector_{tag}_kernel, grid, pointers, (scale, *sizes), (), **fixed)
    return (*features, *values, *saved, *final)


@_repeated
def _vector_{tag}_backward(*arguments):
    *tensors, scale, raw, offsets = arguments
    inputs, parameters, saved = tensors[:{n_in}], tensors[{n_in}:{n_leaf}], tensors[{n_leaf}:{tensors}]
    d_features, d_values = tensors[{tensors}:{tensors + n_feature}], tensors[{tensors + n_feature}:{tensors + cut}]
    d_through, d_final = tensors[{tensors + cut}:{tensors + cut + len(through)}], tensors[{tensors + cut + len(through)}:]
    like = d_final[0]
    N, H = like.shape[:2]
    B, T = inputs[0].shape[:2] if inputs else (d_features + d_values)[0].shape[:2]
    W = like.shape[2] if {bool(group.axes)} else 1
    grid, tiles, segments, single, sizes, spans, bases, fixed, carry = _vector_{tag}_options(inputs, like, W, T, B, offsets, True)
    d_inputs = [
        torch.empty_like(t) if wide else like.new_empty((tiles, B, T, H)) for t, wide in zip(inputs, _VECTOR_{tag})
    ]
    d_parameters = [like.new_empty((segments, H, W)) for _ in parameters]
    d_initial = [torch.empty_like(t) for t in d_final]
    d_borders = d_final
    if not single:
        total, local, d_borders = ([like.new_empty((segments, H, W)) for _ in d_final] for _ in range(3))
        pointers = (*inputs, *parameters, *saved, *d_features, *d_values, *total, *local, spans)
        _launch(_vector_{tag}_back_sums_kernel, grid, pointers, (scale, *sizes), (), **fixed)
        for state in zip(total, local, d_final, d_borders, d_initial):
            _launch(_carry_vector_kernel, (tiles * N * H, 1, 1), (*state, offsets, bases), sizes, (), REVERSE=True, **carry)
    pointers = (
        *inputs, *parameters, *saved, *d_features, *d_values, *d_through, *d_borders, *d_inputs, *d_parameters, *d_initial,
        spans,
    )
    _launch(_vector_{tag}_backward_kernel, grid, pointers, (B * T * H, scale, *sizes), (), **fixed)
    d_inputs = [d if wide else d.sum(0).to(t.dtype) for d, t, wide in zip(d_inputs, inputs, _VECTOR_{tag})]
    d_parameters = [
        d.sum(0).reshape(t.shape) if wide else d.sum((0, 2)) for d, t, wide in zip(d_parameters, parameters, _VECTOR_{tag}[{n_in}:])
    ]
    return (*d_inputs, *d_parameters, *d_initial)


_vector_{tag}_op = torch.library.custom_op(
    f"{{_OPS}}::vector_{tag}", lambda *arguments: _vector_{tag}_forward(*arguments, True), mutates_args=(),
    schema="({schema}, float scale, bool raw, Tensor? offsets, Tensor dtype) -> ({result})",
)
_vector_{tag}_backward_op = torch.library.custom_op(
    f"{{_OPS}}::vector_{tag}_backward", lambda *arguments: _vector_{tag}_backward(*arguments), mutates_args=(),
    schema="({", ".join(given)}, float scale, bool raw, Tensor? offsets) -> ({returned})",
)


@_vector_{tag}_op.register_fake
def _vector_{tag}_fake(*arguments):
    *tensors, scale, raw, offsets, dtype = arguments
    initial = tensors[{n_leaf}:]
    B, T, H = dtype.shape[:3]
    channels = initial[0].shape[2:]
    features = [dtype.new_empty((B, T, H, *channels)) for _ in range({n_feature})]
    values = [t.new_empty((B, T, H, *channels) if raw else (0,)) for t in initial]
    saved = [t.new_empty((_vector_{tag}_slots(B, T, t.shape[0]), H, *channels)) for t in initial]
    return (*features, *values, *saved, *(torch.empty_like(t) for t in initial))


@_vector_{tag}_backward_op.register_fake
def _vector_{tag}_backward_fake(*arguments):
    tensors = arguments[:-3]
    return (*(torch.empty_like(t) for t in tensors[:{n_leaf}]), *(torch.empty_like(t) for t in tensors[-{n_state}:]))


def _vector_{tag}_save(ctx, inputs, output):
    *tensors, scale, raw, offsets, dtype = inputs
    ctx.scale, ctx.raw, ctx.shape = scale, raw, [(t.shape, t.dtype) for t in output]
    ctx.save_for_backward(*tensors[:{n_leaf}], *output[{cut}:{cut + n_state}], offsets)


def _vector_{tag}_gradient(ctx, *cotangents, run=_vector_{tag}_backward_op):
    *saved, offsets = ctx.saved_tensors
    cotangents = [None if t is None else t.contiguous() for t in cotangents]
    for i in (*range({n_feature}), *range({cut + n_state}, {cut + 2 * n_state})):
        if cotangents[i] is None:
            shape, dtype = ctx.shape[i]
            cotangents[i] = saved[-1].new_zeros(shape, dtype=dtype)
    values = [t if ctx.raw else None for t in cotangents[{n_feature}:{cut}]]
    through = [*cotangents[{cut + 2 * n_state}:], *[None] * {len(through)}][:{len(through)}]
    final = cotangents[{cut + n_state}:{cut + 2 * n_state}]
    grads = run(*saved, *cotangents[:{n_feature}], *values, *through, *final, ctx.scale, ctx.raw, offsets)
    return (*grads, None, None, None, None)


_vector_{tag}_op.register_autograd(_vector_{tag}_gradient, setup_context=_vector_{tag}_save)


class _vector_{tag}_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _vector_{tag}_forward(*arguments, True)
        _vector_{tag}_save(ctx, arguments, output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[{cut}:{cut + n_state}])
        return (*output, *(arguments[i] for i in _VECTOR_{tag}_through))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        return _vector_{tag}_gradient(ctx, *cotangents, run=_vector_{tag}_backward)


def _vector_{tag}(*arguments):
    """Features of every token, values of the states (empty unless ``raw``), final states, inputs to use elsewhere."""
    *tensors, scale, raw, offsets, like = arguments
    tensors = [t.contiguous() for t in tensors]
    through = [tensors[i] for i in _VECTOR_{tag}_through]
    if torch.compiler.is_compiling():
        out = _vector_{tag}_op(*tensors, scale, raw, offsets, like.detach())
    elif torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        out = _vector_{tag}_eager.apply(*tensors, scale, raw, offsets, like.detach())
        through = out[{cut + 2 * n_state}:]
    else:
        out = _vector_{tag}_forward(*tensors, scale, raw, offsets, like, False)
    return out[:{n_feature}], out[{n_feature}:{cut}], out[{cut + n_state}:{cut + 2 * n_state}], through
'''

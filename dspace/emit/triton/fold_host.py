"""Source of the host side of the fold: launches, custom operators, the function ``_fold`` that a core calls."""

from __future__ import annotations

from dspace.emit.triton.fold_gradient import UNSAID
from dspace.emit.triton.vector_group import Fold


def host(fold: Fold) -> str:
    """Source of the launches, operators and the function ``_fold``."""
    group, decay = fold.group, fold.decay
    leaves = (*group.inputs, *group.parameters)
    n_in, n_leaf, n_state = len(group.inputs), len(leaves), len(group.states)
    scalar = decay == "scalar"
    written = [i for i, v in enumerate(leaves) if v in fold.touched]
    n_tensor = n_leaf + n_state + 3 + scalar
    at_key = None if fold.key is None else leaves.index(fold.key)
    within = ([n_leaf + n_state] if fold.key else []) + ([n_leaf + n_state + 2] if fold.retention else [])
    schema = ", ".join(f"Tensor t{i}" for i in range(n_tensor))
    given = [f"Tensor t{i}" for i in range(n_tensor + 1 + n_state)] + [f"Tensor? d{i}" for i in range(2 + 2 * n_state)]
    sums, retention = ("sums, ", "retention, ") if scalar else ("", "")
    made = f"_decay_sums_{decay}(retention, spans, T, NT, chunks, C)"
    of_retention = f"d_leaves[{leaves.index(fold.retention)}]" if fold.retention else "torch.empty_like(retention)"
    d_key = "None" if fold.key else "d_key"
    # Written before, and read where it is: no memory of its own for what is read once, soon, by the same program.
    spare = [
        i for i, v in enumerate(group.inputs) if group.wide(v) and v != fold.key and v.symbol in fold.query.free_symbols
    ]
    d_query = "torch.empty_like(query)"
    if spare:
        d_query = f"d_leaves[{spare[0]}] if d_leaves[{spare[0]}].dtype == query.dtype else {d_query}"
    given_back = "" if not scalar else "None, " if fold.retention else "d_retention, "
    return f'''
_FOLD = {tuple(group.wide(v) for v in leaves)!r}  # which inputs and parameters have channels
_FOLD_WITHIN = {tuple(within)!r}  # of the tensors those whose gradient is part of that of an input


def _fold_proposals(K, V, dtype):
    """(k tile, v tile, warps, stages); the first, by default, is that of the outputs without a fold."""
    first = _config_{decay}(K, V, dtype)[2]
    if dtype != torch.bfloat16 or min(K, V) < 64:
        return [first]
    return [first, (_tile(K, 64), _tile(V, 128), 8, 2), (32, _tile(V, 128), 4, 2), (32, _tile(V, 128), 8, 2)]


@functools.partial(_repeated, times=2)
def _fold_forward(*arguments):
    """The read of every token, final states (that of the matrix first) if wanted, then what a backward pass needs.

    That is: states of every token if ``raw``, queries as divided, vector states at chunk starts, {"decay sums, " if scalar else ""}matrix
    states there. Initial states may be None: zero.
    """
    *tensors, scale, raw, offsets, want_final, save = arguments
    leaves, starts = tensors[:{n_leaf}], tensors[{n_leaf}:{n_leaf + n_state}]
    key, value, {retention}start = tensors[{n_leaf + n_state}:]
    B, T, H, K = key.shape
    V = value.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config_{decay}(K, V, key.dtype)
    C, (tile_k, tile_v, state_warps, state_stages), *_ = config
    BK, BV, warps, stages = _chosen(_fold_proposals, "fold", K, V, key.dtype)
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    packed, fast, full = offsets is not None, _fast(key), dict(dtype=torch.float32, device=key.device)
    borders = [torch.empty((chunks, H, K), **full) for _ in starts]
    ends = [torch.empty((N, H, K), **full) if want_final else None for _ in starts]
    {f"sums = {made}{chr(10)}    " if scalar else ""}states = torch.empty((chunks, H, K, V), dtype=key.dtype if key.dtype == torch.bfloat16 else torch.float32, device=key.device)
    final = torch.empty((N, H, K, V), **full) if want_final else None
    OT, precision = _operands(key.dtype)
    total, local = ([torch.empty_like(t) for t in borders] for _ in range(2))
    matrix = _cdiv(K, tile_k) * _cdiv(V, tile_v) * N * H
    _launch(
        _fold_states_kernel, (matrix + H * chunks, 1, 1),
        ({"".join(f"leaves[{i}], " for i in written)}*total, *local, key, value, {sums}start, states, final, offsets, bases, spans),
        (scale, matrix, T, NT, H), (), K=K, V=V, C=C, BK=tile_k, BV=tile_v, OT=OT, PRECISION=precision,
        PACKED=packed, num_warps=state_warps, num_stages=min(state_stages, 3),  # room for the programs of chunks beside
    )
    BW = _tile(K, 32)
    for state in zip(total, local, starts, borders, ends):
        _launch(
            _carry_vector_kernel, (_cdiv(K, BW) * N * H, 1, 1), (*state, offsets, bases), (T, NT, H, C), (),
            W=K, BW=BW, BN=64, REVERSE=False, PACKED=packed, num_warps=2,
        )
    o = torch.empty_like(value)
    query = torch.empty_like(key) if save else None
    values = [torch.empty((B, T, H, K), **full) if raw else None for _ in starts]
    _launch(
        _fold_kernel, (_cdiv(V, BV) * H * chunks, 1, 1),
        (*leaves, *borders, key, value, {sums}states, o, query, *values, spans), (scale, T, NT, H), (),
        K=K, V=V, C=C, BK=BK, BV=BV, OT=OT, PRECISION=precision, FAST=fast, PACKED=packed, num_warps=warps, num_stages=stages,
    )
    return o, final, *ends, *values, query, *borders, {sums}states


@functools.partial(_repeated, times=2)
def _fold_backward(*arguments):
    """Gradients of the tensors that ``_fold_forward`` takes, from those of what it returns, and what else it kept."""
    *tensors, scale, offsets = arguments
    leaves, starts = tensors[:{n_leaf}], tensors[{n_leaf}:{n_leaf + n_state}]
    key, value, {retention}start = tensors[{n_leaf + n_state}:{n_tensor}]
    query, *borders = tensors[{n_tensor}:{n_tensor + 1 + n_state}]
    d_o, d_final, *d_ends = tensors[{n_tensor + 1 + n_state}:]
    d_ends, d_values, kept = d_ends[:{n_state}], d_ends[{n_state}:{2 * n_state}], d_ends[{2 * n_state}:]
    B, T, H, K = key.shape
    V = value.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config_{decay}(K, V, key.dtype)
    C, (BK, BV, warps, stages), _, gradients = config
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    like, packed, fast = borders[0], offsets is not None, _fast(key)
    OT, precision = _operands(key.dtype)
    {f"sums, *kept = kept or [{made}]{chr(10)}    " if scalar else ""}states, *_ = kept or _states_{decay}(key, value, {sums}start, offsets, bases, NT, chunks, config, N, False)
    d_o = torch.zeros_like(value) if d_o is None else d_o
    d_states, d_start = torch.empty_like(states), None if start is None else torch.empty_like(start)
    _launch(
        _cotangents_{decay}_kernel, (_cdiv(K, BK) * _cdiv(V, BV) * N * H, 1, 1),
        (query, d_o, {sums}d_final, d_states, d_start, offsets, bases), (scale, T, NT, H), (),
        K=K, V=V, C=C, BK=BK, BV=BV, OT=OT, PRECISION=precision, PACKED=packed, num_warps=warps, num_stages=stages,
    )
    d_leaves = [torch.empty_like(t) if wide else like.new_empty((B, T, H)) for t, wide in zip(leaves[:{n_in}], _FOLD)]
    # of parameters for every chunk; of a packed batch some chunks are empty
    new = like.new_zeros if packed else like.new_empty
    d_leaves += [new((chunks, H, K) if wide else (chunks, H)) for wide in _FOLD[{n_in}:]]
    d_key, d_value = {"torch.empty_like(key)" if at_key is None else f"d_leaves[{at_key}]"}, torch.empty_like(value)
    {f"d_retention = {of_retention}{chr(10)}    " if scalar else ""}d_query = {d_query}
    sequences, d_starts = None, [None if t is None else torch.empty_like(t) for t in starts]
    if packed:
        sequences = torch.searchsorted(bases, torch.arange(chunks, device=key.device), right=True) - 1
        # those of sequences without tokens are what they end with
        d_starts = [d if d is None else torch.zeros_like(d) if e is None else e.to(d.dtype) + 0 for d, e in zip(d_starts, d_ends)]
    later = [torch.full(t.shape, {UNSAID}, dtype=torch.int32, device=key.device) for t in borders]
    BK, BV, warps, stages = gradients
    _launch(
        _fold_gradients_kernel, (H * chunks, 1, 1),
        (query, key, value, d_o, {"sums, d_retention, " if scalar else ""}states, d_states, d_query, d_key, d_value,
         *leaves, *borders, *d_values, *later, *d_ends, *d_starts, *d_leaves, sequences, offsets, bases, spans),
        (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV, OT=OT, PRECISION=precision, FAST=fast,
        PACKED=packed, num_warps=warps, num_stages=stages,
    )
    d_leaves = [
        d if wide else d.to(t.dtype) for d, t, wide in zip(d_leaves[:{n_in}], leaves, _FOLD)
    ] + [d.sum(0).reshape(t.shape) for d, t in zip(d_leaves[{n_in}:], leaves[{n_in}:])]
    return *d_leaves, *d_starts, {d_key}, d_value, {given_back}d_start


def _fold_outputs(*arguments):
    """What the operator returns: no None, and nothing that is cheaper made again."""
    found = _fold_forward(*arguments, True, True)
    values = [found[2].new_empty(0) if t is None else t for t in found[{2 + n_state}:{2 + 2 * n_state}]]
    return (*found[:{2 + n_state}], *values, *found[{2 + 2 * n_state}:{3 + 3 * n_state}])


_fold_op = torch.library.custom_op(
    f"{{_OPS}}::fold", _fold_outputs, mutates_args=(),
    schema="({schema}, float scale, bool raw, Tensor? offsets) -> ({made_of(3 + 3 * n_state)})",
)
_fold_backward_op = torch.library.custom_op(
    f"{{_OPS}}::fold_backward", lambda *arguments: tuple(d for d in _fold_backward(*arguments) if d is not None),
    mutates_args=(), schema="({", ".join(given)}, float scale, Tensor? offsets) -> ({made_of(n_tensor - len(within))})",
)


@_fold_op.register_fake
def _fold_fake(*arguments):
    *tensors, scale, raw, offsets = arguments
    starts, (key, value, *_, start) = tensors[{n_leaf}:{n_leaf + n_state}], tensors[{n_leaf + n_state}:]
    B, T, H, K = key.shape
    N = start.shape[0]
    C = _config_{decay}(K, value.shape[-1], key.dtype)[0]
    chunks = N * _cdiv(T, C) if offsets is None else T // C + N
    ends = [torch.empty_like(t) for t in starts]
    values = [t.new_empty((B, T, H, K) if raw else (0,)) for t in starts]
    borders = [t.new_empty((chunks, H, K)) for t in starts]
    return (torch.empty_like(value), torch.empty_like(start), *ends, *values, torch.empty_like(key), *borders)


@_fold_backward_op.register_fake
def _fold_backward_fake(*arguments):
    return tuple(torch.empty_like(t) for i, t in enumerate(arguments[:{n_tensor}]) if i not in _FOLD_WITHIN)


def _fold_save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.raw, offsets = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[{2 + 2 * n_state}:], offsets)


def _fold_gradient(ctx, *cotangents):
    *saved, offsets = ctx.saved_tensors
    given = [None if d is None else d.contiguous() for d in cotangents[:{2 + 2 * n_state}]]
    given[{2 + n_state}:] = given[{2 + n_state}:] if ctx.raw else [None] * {n_state}
    found = iter(_fold_backward_op(*saved, *given, ctx.scale, offsets))
    return (*(None if i in _FOLD_WITHIN else next(found) for i in range({n_tensor})), None, None, None)


_fold_op.register_autograd(_fold_gradient, setup_context=_fold_save)


class _fold_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.scale, _, offsets, _ = arguments
        found = _fold_forward(*arguments, True)
        *sums, states = found[{3 + 3 * n_state}:]
        kept = (*sums, states) if states.numel() * states.element_size() <= _KEPT else sums
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *found[{2 + 2 * n_state}:{3 + 3 * n_state}], offsets, *kept)
        return found[:{2 + 2 * n_state}]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        saved = ctx.saved_tensors
        given = [None if d is None else d.contiguous() for d in cotangents]
        saved, offsets, kept = saved[:{n_tensor + 1 + n_state}], saved[{n_tensor + 1 + n_state}], saved[{n_tensor + 2 + n_state}:]
        found = _fold_backward(*saved, *given, *kept, ctx.scale, offsets)
        return (*found, None, None, None, None)


def _fold(*arguments):
    """The read of every token, the final states (that of the matrix first), and if ``raw`` vector states of every token."""
    *tensors, scale, raw, offsets, want_final = arguments
    tensors = [None if t is None else t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        found = _fold_op(*tensors, scale, raw, offsets)
    elif torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        found = _fold_eager.apply(*tensors, scale, raw, offsets, want_final)
    else:
        found = _fold_forward(*tensors, scale, raw, offsets, want_final, False)
    return found[0], found[1], found[2:{2 + n_state}], found[{2 + n_state}:{2 + 2 * n_state}]
'''


def made_of(tensors: int) -> str:
    """So many tensors, in the schema of an operator."""
    return ", ".join(["Tensor"] * tensors)

"""Source of the host side of the sequential kernels: tile sizes, launches, custom operators."""

from __future__ import annotations

from dspace.math.ir import Recurrence

_HOST = '''
_SEQUENTIAL_SPLITS = @SPLITS@  # whether value channels may run as separate blocks
_SEQUENTIAL_COUNTS = @COUNTS@  # inputs, parameters, states
_SEQUENTIAL_TILES = @TILES@  # states on kv: what the registers hold


def _sequential_proposals(K, V, few, backward):
    """Tile of k, tile of v, warps; the first by default. With ``few`` tokens it is a matter of moving the states.

    Forward over many tokens, a narrow block of v gives many programs and keeps sums over k within a warp. Moving
    states, or writing gradients that every block has its own copy of, a block is 128 bytes wide.
    """
    BK, full = 1 << (K - 1).bit_length(), 1 << (V - 1).bit_length()
    moving = backward or few
    widths = [full]
    if _SEQUENTIAL_SPLITS:
        BV = min(full, 32 if moving else max(8, min(512 // BK, 32)))
        widths = [BV, *(w for w in (BV // 2, 2 * BV) if 8 <= w <= full)]
    share = 32 * (32 if moving else 64)  # elements of the states that one warp holds
    found = []
    for share, width in [(share, w) for w in widths] + [(share // 2, w) for w in widths[:1]]:
        warps = max(1, min(16, BK * width * max(1, _SEQUENTIAL_TILES) // share))
        if (BK, width, warps) not in found:
            found.append((BK, width, warps))
    return found


def _sequential_config(K, V, steps, backward):
    """``steps`` is the mean length of a sequence; four or fewer are few."""
    return _chosen(_sequential_proposals, "sequential " + _ID, K, V, steps <= 4, backward)


def _sequential_sizes(inputs, parameters, states, offsets):
    """B, T, H, K, V, number of sequences, mean tokens a sequence."""
    B, T, H = inputs[0].shape[:3]
    K, V = _sizes(*inputs, *parameters, *states)
    N = B if offsets is None else offsets.shape[0] - 1
    return B, T, H, K, V, N, -(-B * T // max(N, 1))


def _sequential_split(arguments):
    """Inputs, parameters, states, and the other arguments."""
    a, b, c = _SEQUENTIAL_COUNTS
    return arguments[:a], arguments[a : a + b], arguments[a + b : a + b + c], arguments[a + b + c :]


def _of_blocks(like, axes, blocks, *lead):
    """Room for the cotangent of ``like``, float32: what has no v axis gets a row from each block of v."""
    return like.new_empty(*(() if "v" in axes else (blocks,)), *lead, *like.shape, dtype=torch.float32)


def _of_inputs(inputs, blocks):
    """Room for the cotangents of inputs; those that one row suffices for have their types."""
    return [
        torch.empty_like(x) if "v" in axes or blocks == 1 else _of_blocks(x, axes, blocks)
        for x, (_, axes) in zip(inputs, _INPUTS)
    ]


def _summed(rows, like):
    """The cotangent of ``like`` from its rows of blocks and sequences, or the one row that it has."""
    return rows if rows.shape == like.shape else rows.flatten(0, rows.dim() - like.dim() - 1).sum(0).to(like.dtype)


def _sequential_launch(inputs, parameters, states, offsets, scale, config, o, variance, final, saved, every):
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    BK, BV, warps = config
    pointers = (*inputs, *parameters, *states, o, variance, *final, *saved, offsets)
    _launch(
        _sequential_kernel, (-(-V // BV) * N * H, 1, 1), pointers, (scale, T, every), (H,),
        K=K, V=V, BK=BK, BV=BV, OUTPUT=o is not None, VARIANCE=variance is not None, SAVE=o is None,
        PACKED=offsets is not None, ONE=T == 1 and o is not None and offsets is None, num_warps=warps,
    )


@_repeated
def _sequential_forward(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    o = inputs[0].new_empty(B, T, H, V)
    variance = torch.empty_like(o) if want_variance else None
    final = [torch.empty_like(s) for s in states]
    config = _sequential_config(K, V, steps, False)
    none = [None] * len(states)
    _sequential_launch(inputs, parameters, states, offsets, scale, config, o, variance, final, none, 1)
    return (o, variance if want_variance else o.new_empty(0), *final)


@_repeated
def _sequential_backward(*arguments):
    inputs, parameters, states, (d_o, d_variance, *d_final, offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    # States are saved every sqrt(T) tokens: saved and recomputed states then take the same memory.
    every = 1 << min((max(steps, 1) - 1).bit_length() + 1 >> 1, 7)
    slots = B * T // every + N
    none = [None] * len(states)
    saved = [s.new_empty(slots, *s.shape[1:]) for s in states]
    config = _sequential_config(K, V, steps, False)
    _sequential_launch(inputs, parameters, states, offsets, scale, config, None, None, none, saved, every)

    BK, BV, warps = _sequential_config(K, V, steps, True)
    blocks = -(-V // BV)
    padded = {"": (), "k": (BK,), "v": (BV,), "kv": (BK, BV)}
    past = [s.new_empty(blocks * N * H, every, *padded[axes]) for s, (_, axes) in zip(states, _STATES)]
    d_leaves = [
        *_of_inputs(inputs, blocks),
        *[_of_blocks(p, axes, blocks, N) for p, (_, axes) in zip(parameters, _PARAMETERS)],
        *[_of_blocks(s, axes, blocks) for s, (_, axes) in zip(states, _STATES)],
    ]
    given = [d_o, d_variance] if want_variance else [d_o]
    pointers = (*inputs, *parameters, *saved, *past, *given, *d_final, *d_leaves, offsets)
    _launch(
        @KERNEL@, (blocks * N * H, 1, 1), pointers, (scale, T, every, B * T * H), (H,),
        K=K, V=V, BK=BK, BV=BV, PACKED=offsets is not None, num_warps=warps,
    )
    return tuple([_summed(d, x) for d, x in zip(d_leaves, (*inputs, *parameters, *states))])
'''

_OPERATORS = '''
_@NAME@_op = torch.library.custom_op(
    f"{_OPS}::@NAME@",
    lambda *arguments: _@NAME@_forward(*arguments),
    mutates_args=(),
    schema="(@TENSORS@, Tensor? offsets, float scale, bool want_variance) -> (@RESULTS@)",
)
_@NAME@_backward_op = torch.library.custom_op(
    f"{_OPS}::@NAME@_backward",
    lambda *arguments: _@NAME@_backward(*arguments),
    mutates_args=(),
    schema="(@TENSORS@, @GIVEN@, Tensor? offsets, float scale, bool want_variance)"
    " -> (@GRADIENTS@)",
)


@_@NAME@_op.register_fake
def _@NAME@_fake(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    o = inputs[0].new_empty(*inputs[0].shape[:3], _sizes(*inputs, *parameters, *states)[1])
    return (o, torch.empty_like(o) if want_variance else o.new_empty(0), *(s.new_empty(s.shape) for s in states))


@_@NAME@_backward_op.register_fake
def _@NAME@_backward_fake(*arguments):
    return tuple(t.new_empty(t.shape) for t in arguments[: sum(_SEQUENTIAL_COUNTS)])


def _@NAME@_save(ctx, inputs, output):
    *tensors, offsets, ctx.scale, ctx.want_variance = inputs
    ctx.save_for_backward(*tensors, offsets)


def _@NAME@_gradient(ctx, *cotangents):
    *tensors, offsets = ctx.saved_tensors
    cotangents = [t.contiguous() for t in cotangents]
    return (*_@NAME@_backward_op(*tensors, *cotangents, offsets, ctx.scale, ctx.want_variance), None, None, None)


_@NAME@_op.register_autograd(_@NAME@_gradient, setup_context=_@NAME@_save)


class _@NAME@_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a token takes."""

    @staticmethod
    def forward(ctx, *arguments):
        _@NAME@_save(ctx, arguments, None)
        return _@NAME@_forward(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        *tensors, offsets = ctx.saved_tensors
        cotangents = [t.contiguous() for t in cotangents]
        return (*_@NAME@_backward(*tensors, *cotangents, offsets, ctx.scale, ctx.want_variance), None, None, None)


def @CORE@(*arguments):
    """@DOC@"""
    *tensors, scale, offsets, want_variance = arguments
    if triton is None or tensors[0].dtype == torch.float64:
        return _reference_core(*arguments)
    tensors = [t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        run = _@NAME@_op
    elif torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        run = _@NAME@_eager.apply
    else:
        run = _@NAME@_forward
    o, variance, *final = run(*tensors, offsets, scale, want_variance)
    return (o, variance if want_variance else None, *final)
'''


def _power_of_two(count: int) -> int:
    """``count``, rounded up to what a number of warps may be a multiple of."""
    return 1 << (count - 1).bit_length() if count else 0


def host_source(r: Recurrence, splits: bool) -> str:
    """Launches and operators of the recurrence ``r``, and ``_recurrent_triton_core``."""
    replacements = {
        "SPLITS": str(splits),
        "COUNTS": str((len(r.inputs), len(r.parameters), len(r.states))),
        "TILES": str(_power_of_two(sum(s.axes == "kv" for s in r.states))),
        "KERNEL": backward_kernel(r, "sequential"),
    }
    doc = "Token by token, states in registers; the same kernel decodes."
    return replaced(_HOST, replacements) + "\n" + operators(r, "sequential", "_recurrent_triton_core", doc)


def backward_kernel(r: Recurrence, name: str) -> str:
    """Source of the backward kernel of that name, or of the choice between two of them."""
    one = f"_{name}_backward_kernel"
    return one if r.variance is None else f"(_{name}_backward_variance_kernel if want_variance else {one})"


def operators(r: Recurrence, name: str, core: str, doc: str) -> str:
    """The operator of ``_NAME_forward`` and ``_NAME_backward``, and the core that calls it."""
    count, states = len(r.inputs) + len(r.parameters) + len(r.states), len(r.states)
    replacements = {
        "NAME": name,
        "CORE": core,
        "DOC": doc,
        "TENSORS": ", ".join(f"Tensor x{i}" for i in range(count)),
        "RESULTS": ", ".join(["Tensor"] * (2 + states)),
        "GIVEN": ", ".join(f"Tensor d{i}" for i in range(2 + states)),
        "GRADIENTS": ", ".join(["Tensor"] * count),
    }
    return replaced(_OPERATORS, replacements)


def replaced(text: str, replacements: dict[str, str]) -> str:
    """``text`` with each ``@KEY@`` replaced."""
    for key, value in replacements.items():
        text = text.replace(f"@{key}@", value)
    return text

"""Source of the host side of the form with all chunks at once: chunk table, passes, and which form a call takes."""

from __future__ import annotations

from dspace.emit.triton.printer import specialise
from dspace.emit.triton.sequential_host import backward_kernel, operators, replaced
from dspace.math.ir import Axes, Recurrence
from dspace.plan.segments import CHUNK, SegmentPlan

_HOST = '''
_SEGMENT = @CHUNK@  # least tokens of a chunk, which has a multiple of them
_SEGMENT_MEMORY = 2**29  # bytes: states within chunks that the backward pass keeps at a time
_SEGMENT_PRODUCTS = @PRODUCTS@  # axes of the products of decays
_SEGMENT_FORGETS = @FORGETS@  # which of them each state has, and how many of its numbers in turn have the same; or None


def _segment_numbers(K, BK, BV):
    """Of states, for each thread if a program had one warp."""
    return -(-K // BK) * BK * BV * _SEQUENTIAL_TILES // 32


def _segment_proposals(K, V):
    """Backward: tile of k, tile of v, warps, tokens whose states the registers hold at a time."""
    BK, full = _exact_tile(K), 1 << (V - 1).bit_length()
    found = []
    most = 24 if BK < K else 16  # of several tiles, a thread needs less beside their numbers
    for width, share in ((16, most), (32, most), (16, 32), (32, 32)):
        BV = min(full, width) if _SEQUENTIAL_SPLITS else full
        numbers = max(1, _segment_numbers(K, BK, BV))
        warps = 1 << (max(1, numbers // share) - 1).bit_length()
        warps = min(warps, 8 if numbers <= 8 * 64 else 16)  # with 16, a thread has half the registers
        # few channels take little memory, and half the tokens unrolled a third of the time to compile
        every = (2 if K <= 32 else 4) if numbers <= most * warps else max(1, min(4, 64 * warps // numbers))
        if (BK, BV, warps, every) not in found:
            found.append((BK, BV, warps, every))
    return found


def _segment_config(K, V):
    return _chosen(_segment_proposals, "segment " + _ID, K, V)


#if matmuls
def _ends_tile(size):
    """Tile of channels of what chunks make of zeros; it is a matter of moving them, so lanes to spare cost nothing."""
    return max(16, min(64, 1 << (size - 1).bit_length()))


#endif
def _outputs_proposals(K, V):
    """Forward: tile of k, tile of v, warps, tokens that are loaded at a time; few warps, so that sums stay within them."""
    BK, full = _exact_tile(K), 1 << (V - 1).bit_length()
    found = []
    for width, every in ((16, 4), (8, 4), (16, 2)):
        BV = min(full, width) if _SEQUENTIAL_SPLITS else full
        warps = min(16, 1 << (max(1, -(-_segment_numbers(K, BK, BV) // 96)) - 1).bit_length())
        if (BK, BV, warps, every) not in found:
            found.append((BK, BV, warps, every))
    return found


def _outputs_config(K, V):
    return _chosen(_outputs_proposals, "segment outputs " + _ID, K, V)


def _segmented(inputs, parameters, states, offsets, most):
    """Whether all chunks at once are worth their further passes: where a sequence a program leaves a GPU idle.

    They run more instructions. With few warps, a sequence a program waits for its latencies longer than those take:
    with fewer than ``most`` a multiprocessor, 8 forward and 4 backward from measurements on an H100, and 16 where a
    sequence a program would have lanes without a channel that tiles of k do not have.
    """
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    BK, BV, warps = _sequential_config(K, V, steps, True)
    most = 16 if _exact_tile(K) < K else most
    return T > 2 * _SEGMENT and N * H * -(-V // BV) * warps < most * _multiprocessors(inputs[0].device)


def _segment_tokens(tokens, H, K, V, device):
    """Tokens of a chunk: so few that the GPU has 32 warps for each multiprocessor, and no fewer, for memory's sake.

    Of the tokens, that is, whose states the backward pass keeps at a time.
    """
    _, BV, warps, every = _segment_config(K, V)
    sizes = {"": 1, "k": K, "v": V, "kv": K * V}
    tokens = min(tokens, _SEGMENT_MEMORY * every // (4 * H * sum([sizes[axes] for _, axes in _STATES])))
    warps *= -(-V // BV) * H
    return -(-max(1, tokens * warps // (32 * _multiprocessors(device))) // _SEGMENT) * _SEGMENT


def _segments(inputs, offsets, C):
    """Inputs as one sequence, bounds of chunks, first chunk of each sequence: made on the device, not waiting for it."""
    B, T = inputs[0].shape[:2]
    flat, device = [x.flatten(0, 1)[None] for x in inputs], inputs[0].device
    if offsets is None:
        NT = -(-T // C)
        firsts = torch.arange(0, B * NT + 1, NT, device=device)
        if T % C == 0:
            return flat, torch.arange(0, B * T + 1, C, device=device), firsts
        index = torch.arange(B * NT + 1, device=device)
        return flat, index // NT * T + index % NT * C, firsts
    N = offsets.shape[0] - 1
    firsts = torch.cat((offsets[:1] * 0, ((offsets[1:] - offsets[:-1] + C - 1) // C).cumsum(0)))
    index = torch.arange(T // C + N + 1, device=device)  # so many chunks at most; the spare ones are empty
    sequence = torch.searchsorted(firsts[1:], index, right=True).clamp(max=N - 1)
    begin = offsets.take(sequence) + (index - firsts.take(sequence)) * C
    return flat, torch.minimum(begin, offsets.take(sequence + 1)), firsts


def _segment_links(ends, products, initial, final, firsts, reverse):
    """The scan over chunks, of every state; ``ends`` become what chunks start from (or end at, reverse)."""
    N, H = firsts.shape[0] - 1, ends[0].shape[1]
    for i, (end, forgets) in enumerate(zip(ends, _SEGMENT_FORGETS)):
        size = math.prod(end.shape[2:])
        product, stride = None, 1
        if forgets is not None:
            product, stride = products[forgets[0]], math.prod(end.shape[end.dim() - forgets[1] :])
        BLOCK = max(64, min(256, 1 << (size - 1).bit_length()))  # a thread has numbers of its own: it writes what it read
        _launch(
            _links_kernel, (N * H, -(-size // BLOCK), 1), (end, product, initial[i], final[i], firsts), (H,), (),
            SIZE=size, STRIDE=stride, DECAYS=1 if product is None else math.prod(product.shape[2:]), BLOCK=BLOCK,
            REVERSE=reverse, num_warps=2,
        )


def _segment_starts(inputs, parameters, states, bounds, firsts, final):
    """States at the start of every chunk, and the products of its decays; ``final`` gets those behind the last chunk."""
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, states, bounds)
    sizes = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    starts = [s.new_empty(chunks, *s.shape[1:]) for s in states]
    products = [states[0].new_empty(chunks, H, *sizes[axes]) for axes in _SEGMENT_PRODUCTS]
#if matmuls
    BK, BV = _ends_tile(K), _ends_tile(V)
    precision = _EXACT if torch.float32 in [x.dtype for x in inputs] else "tf32"
    _launch(
        _ends_kernel, (-(-K // BK) * -(-V // BV) * chunks * H, 1, 1), (*inputs, *parameters, *starts, *products, bounds),
        (1.0, T), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, PRECISION=precision, num_warps=4 if BK * BV > 1024 else 2,
    )
#else
    BK, BV, warps, every = _outputs_config(K, V)
    _launch(
        _ends_kernel, (-(-V // BV) * chunks * H, 1, 1), (*inputs, *parameters, *starts, *products, bounds),
        (1.0, T), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, EVERY=every, num_warps=warps,
    )
#endif
    _segment_links(starts, products, states, final, firsts, False)
    return starts, products


def _segment_outputs(inputs, parameters, starts, bounds, scale, config, o, variance, saved, sub):
    """Tokens forward from the start of every chunk: outputs, or the states before every few of them, ``sub`` a chunk."""
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, starts, bounds)
    BK, BV, warps, every = config
    _launch(
        _segment_kernel, (-(-V // BV) * chunks * H, 1, 1), (*inputs, *parameters, *starts, o, variance, *saved, bounds),
        (scale, T, sub), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, EVERY=every, OUTPUT=o is not None,
        VARIANCE=variance is not None, SAVE=o is None, num_warps=warps,
    )


def _segment_reverse(inputs, parameters, starts, bounds, C, scale, given, saved, d_ends, d_inputs):
    """Chunks backward, as many at a time as ``saved`` has room for; returns cotangents of states or of parameters.

    Without ``d_ends``, the cotangents of the states at the end of each chunk, those are zeros, and the result is the
    cotangents at its start. With them it is those of the parameters, and ``d_inputs`` get those of inputs.
    """
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, starts, bounds)
    BK, BV, warps, every = config = _segment_config(K, V)
    blocks, sub, none = -(-V // BV), -(-C // every), [None] * len(starts)
    window, want_variance = saved[0].shape[0] // sub, len(given) == 2
    found = []
    for first in range(0, chunks, window):
        part = slice(first, min(first + window, chunks))
        count, inside = part.stop - first, bounds[first : part.stop + 1]
        own = [s[part] for s in starts]
        if d_ends is None or count < chunks:  # else they are there, from the call before
            _segment_outputs(inputs, parameters, own, inside, scale, config, None, None, saved, sub)
        d_states = d_parameters = None
        if d_ends is None:
            d_states = [_of_blocks(s, axes, blocks) for s, (_, axes) in zip(own, _STATES)]
        else:
            d_parameters = [_of_blocks(p, axes, blocks, count) for p, (_, axes) in zip(parameters, _PARAMETERS)]
        _launch(
            @KERNEL@, (blocks * count * H, 1, 1),
            (
                *inputs, *parameters, *saved, *given, *(none if d_ends is None else [d[part] for d in d_ends]),
                *(d_inputs or [None] * len(inputs)), *(d_parameters or [None] * len(parameters)), *(d_states or none), inside,
            ),
            (scale, T, T * H, sub), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, EVERY=every,
            INPUTS=d_ends is not None, num_warps=warps,
        )
        likes = own if d_ends is None else parameters
        found.append([_summed(d, like) for d, like in zip(d_states or d_parameters or [], likes)])
    if len(found) == 1:
        return found[0]
    return [torch.cat(parts) if d_ends is None else torch.stack(parts).sum(0) for parts in zip(*found)]


@_repeated
def _chunks_forward(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    o = inputs[0].new_empty(B, T, H, V)
    variance = torch.empty_like(o) if want_variance else None
    final = [torch.empty_like(s) for s in states]
    inputs, bounds, firsts = _segments(inputs, offsets, _segment_tokens(B * T, H, K, V, o.device))
    starts, _ = _segment_starts(inputs, parameters, states, bounds, firsts, final)
    none = [None] * len(states)
    _segment_outputs(inputs, parameters, starts, bounds, scale, _outputs_config(K, V), o, variance, none, 0)
    return (o, variance if want_variance else o.new_empty(0), *final)


@_repeated
def _chunks_backward(*arguments):
    inputs, parameters, states, (d_o, d_variance, *d_final, offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    C = _segment_tokens(B * T, H, K, V, d_o.device)
    _, BV, _, every = _segment_config(K, V)
    d_inputs = _of_inputs(inputs, -(-V // BV))
    given = [d_o, d_variance] if want_variance else [d_o]
    flat, bounds, firsts = _segments(inputs, offsets, C)
    starts, products = _segment_starts(flat, parameters, states, bounds, firsts, [None] * len(states))
    sub, chunks = -(-C // every), starts[0].shape[0]
    of_chunk = 4 * H * sub * sum([math.prod(s.shape[2:]) for s in states])
    window = min(chunks, max(1, _SEGMENT_MEMORY // of_chunk // 4) * 4)  # times 4, so that what begins there is aligned
    saved = [s.new_empty(window * sub, *s.shape[1:]) for s in states]
    common = flat, parameters, starts, bounds, C, scale, given, saved
    d_ends = _segment_reverse(*common, None, None)
    d_states = [torch.empty_like(s) for s in states]
    _segment_links(d_ends, products, d_final, d_states, firsts, True)
    d_parameters = _segment_reverse(*common, d_ends, d_inputs)
    return (*[_summed(d, x) for d, x in zip(d_inputs, inputs)], *d_parameters, *d_states)


def _segment_forward(*arguments):
    inputs, parameters, states, (offsets, *_) = _sequential_split(arguments)
    return (_chunks_forward if _segmented(inputs, parameters, states, offsets, 8) else _sequential_forward)(*arguments)


def _segment_backward(*arguments):
    inputs, parameters, states, (*_, offsets, _, _) = _sequential_split(arguments)
    return (_chunks_backward if _segmented(inputs, parameters, states, offsets, 4) else _sequential_backward)(*arguments)
'''


def host_source(r: Recurrence, plan: SegmentPlan) -> str:
    """Launches and operators of all chunks at once, and ``_chunk_triton_core``."""
    forgets = [
        None if which is None else (which, _behind(s.axes, plan.products[which]))
        for s, which in zip(r.states, plan.forgets, strict=True)
    ]
    replacements = {
        "CHUNK": str(CHUNK),
        "PRODUCTS": repr(plan.products),
        "FORGETS": repr(tuple(forgets)),
        "KERNEL": backward_kernel(r, "segment"),
    }
    doc = "All chunks at once, token by token; where that gives the GPU no more to do, sequence by sequence."
    text = specialise(_HOST, {"matmuls": bool(plan.separable)})
    return replaced(text, replacements) + "\n" + operators(r, "segment", "_chunk_triton_core", doc)


def _behind(axes: Axes, decay: Axes) -> int:
    """How many of a state's axes come behind those of its decay: numbers along them decay alike."""
    return len(axes) - axes.index(decay[-1]) - 1 if decay else len(axes)

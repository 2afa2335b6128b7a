"""Source of the host side of the form with all chunks at once: chunk table, passes, and which form a call takes."""

from __future__ import annotations

from dspace.emit.triton.sequential_host import backward_kernel, operators, replaced
from dspace.math.ir import Axes, Recurrence
from dspace.plan.segments import CHUNK, SegmentPlan

_HOST = '''
_SEGMENT = @CHUNK@  # least tokens of a chunk, which has a multiple of them
_SEGMENT_MEMORY = 2**29  # bytes: states within chunks that the backward pass keeps at a time
_SEGMENT_PRODUCTS = @PRODUCTS@  # axes of the products of decays
_SEGMENT_FORGETS = @FORGETS@  # which of them each state has, and how many of its numbers in turn have the same; or None


def _segment_blocks(K, V):
    """Blocks of v in the backward pass."""
    return -(-V // _sequential_config(K, V, _SEGMENT, True)[1])


def _segmented(inputs, parameters, states, offsets):
    """Whether all chunks at once are worth their further passes: where a sequence a program leaves a GPU idle.

    They run up to two and a half times the instructions. With fewer warps than two a multiprocessor, a sequence a program
    waits for its latencies longer than those take.
    """
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    warps = _segment_blocks(K, V) * _sequential_config(K, V, steps, True)[2]
    return T > _SEGMENT and N * H * warps < 2 * _multiprocessors(inputs[0].device)


def _segment_tokens(tokens, H, K, V, device):
    """Tokens of a chunk: so few that the GPU has 16 programs for each multiprocessor, and no fewer, for memory's sake."""
    programs = _segment_blocks(K, V) * H
    return -(-max(1, tokens * programs // (16 * _multiprocessors(device))) // _SEGMENT) * _SEGMENT


def _segments(inputs, offsets, C):
    """Inputs as one sequence, bounds of chunks, first chunk of each sequence: made on the device, not waiting for it."""
    B, T = inputs[0].shape[:2]
    flat, device = [x.flatten(0, 1)[None] for x in inputs], inputs[0].device
    if offsets is None:
        NT = -(-T // C)
        index = torch.arange(B * NT + 1, device=device)
        return flat, index // NT * T + index % NT * C, torch.arange(0, B * NT + 1, NT, device=device)
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
    BK, BV, warps = _sequential_config(K, V, _SEGMENT, False)
    sizes = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    starts = [s.new_empty(chunks, *s.shape[1:]) for s in states]
    products = [states[0].new_empty(chunks, H, *sizes[axes]) for axes in _SEGMENT_PRODUCTS]
    _launch(
        _ends_kernel, (-(-V // BV) * chunks * H, 1, 1), (*inputs, *parameters, *starts, *products, bounds),
        (1.0, T, 1), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, num_warps=warps,
    )
    _segment_links(starts, products, states, final, firsts, False)
    return starts, products


def _segment_reverse(inputs, parameters, starts, bounds, C, scale, given, d_ends, d_inputs, d_starts):
    """Chunks backward, as many at a time as memory allows; returns cotangents of parameters if it is to make any.

    ``d_ends`` are the cotangents of the states at the end of each chunk, None: zeros. ``d_starts`` get those at its start, or
    ``d_inputs`` those of inputs: one of the two is None.
    """
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, starts, bounds)
    BK, BV, warps = _sequential_config(K, V, _SEGMENT, True)
    blocks, want_variance = _segment_blocks(K, V), len(given) == 2
    padded = {"": (), "k": (BK,), "v": (BV,), "kv": (BK, BV)}
    # As many saved states as tokens between them, so that both take little; all of them for as many chunks as memory allows.
    every = 1 << ((C - 1).bit_length() + 1 >> 1)
    sub = -(-C // every)
    of_chunk = 4 * H * (blocks * every + sub) * sum([math.prod(padded[axes]) for _, axes in _STATES])
    window = min(chunks, max(1, _SEGMENT_MEMORY // of_chunk // 4) * 4)  # times 4, so that what begins there is aligned
    saved = [s.new_empty(window * sub, *s.shape[1:]) for s in starts]
    past = [s.new_empty(blocks * window * H, every, *padded[axes]) for s, (_, axes) in zip(starts, _STATES)]
    none, config = [None] * len(starts), _sequential_config(K, V, _SEGMENT, False)
    sums = []
    for first in range(0, chunks, window):
        part = slice(first, min(first + window, chunks))
        count, inside = part.stop - first, bounds[first : part.stop + 1]
        own = [s[part] for s in starts]
        _sequential_launch(inputs, parameters, own, inside, scale, config, None, None, none, saved, every, sub)
        d_parameters, d_states, shared = [None] * len(parameters), none, none
        if d_inputs is None:
            shared = [None if "v" in axes else _of_blocks(s, axes, blocks) for s, (_, axes) in zip(own, _STATES)]
            d_states = [d[part] if rows is None else rows for d, rows in zip(d_starts, shared)]
        else:
            d_parameters = [_of_blocks(p, axes, blocks, count) for p, (_, axes) in zip(parameters, _PARAMETERS)]
        _launch(
            @KERNEL@, (blocks * count * H, 1, 1),
            (
                *inputs, *parameters, *saved, *past, *given,
                *(none if d_ends is None else [d[part] for d in d_ends]),
                *([None] * len(inputs) if d_inputs is None else d_inputs), *d_parameters, *d_states, inside,
            ),
            (scale, T, every, T * H, sub), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, CHUNKS=True,
            INPUTS=d_inputs is not None, num_warps=warps,
        )
        for d, rows in zip(d_starts or [], shared):
            if rows is not None:
                d[part] = rows.sum(0)
        sums.append([_summed(d, p) for d, p in zip(d_parameters, parameters) if d is not None])
    return [torch.stack(parts).sum(0) for parts in zip(*sums)]


@_repeated
def _chunks_forward(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    o = inputs[0].new_empty(B, T, H, V)
    variance = torch.empty_like(o) if want_variance else None
    final = [torch.empty_like(s) for s in states]
    inputs, bounds, firsts = _segments(inputs, offsets, _segment_tokens(B * T, H, K, V, o.device))
    starts, _ = _segment_starts(inputs, parameters, states, bounds, firsts, final)
    ends = [torch.empty_like(s) for s in starts]  # known already
    config = _sequential_config(K, V, _SEGMENT, False)
    _sequential_launch(
        inputs, parameters, starts, bounds, scale, config, o, variance, ends, [None] * len(states), 1
    )
    return (o, variance if want_variance else o.new_empty(0), *final)


@_repeated
def _chunks_backward(*arguments):
    inputs, parameters, states, (d_o, d_variance, *d_final, offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    C = _segment_tokens(B * T, H, K, V, d_o.device)
    d_inputs = _of_inputs(inputs, _segment_blocks(K, V))
    given = [d_o, d_variance] if want_variance else [d_o]
    flat, bounds, firsts = _segments(inputs, offsets, C)
    starts, products = _segment_starts(flat, parameters, states, bounds, firsts, [None] * len(states))
    d_ends = [torch.empty_like(s) for s in starts]
    common = flat, parameters, starts, bounds, C, scale, given
    _segment_reverse(*common, None, None, d_ends)
    d_states = [torch.empty_like(s) for s in states]
    _segment_links(d_ends, products, d_final, d_states, firsts, True)
    d_parameters = _segment_reverse(*common, d_ends, d_inputs, None)
    return (*[_summed(d, x) for d, x in zip(d_inputs, inputs)], *d_parameters, *d_states)


def _segment_forward(*arguments):
    inputs, parameters, states, (offsets, *_) = _sequential_split(arguments)
    return (_chunks_forward if _segmented(inputs, parameters, states, offsets) else _sequential_forward)(*arguments)


def _segment_backward(*arguments):
    inputs, parameters, states, (*_, offsets, _, _) = _sequential_split(arguments)
    return (_chunks_backward if _segmented(inputs, parameters, states, offsets) else _sequential_backward)(*arguments)
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
        "KERNEL": backward_kernel(r),
    }
    doc = "All chunks at once, token by token; where that gives the GPU no more to do, sequence by sequence."
    return replaced(_HOST, replacements) + "\n" + operators(r, "segment", "_chunk_triton_core", doc)


def _behind(axes: Axes, decay: Axes) -> int:
    """How many of a state's axes come behind those of its decay: numbers along them decay alike."""
    return len(axes) - axes.index(decay[-1]) - 1 if decay else len(axes)

"""States with one axis or none, on a GPU: evaluated at every token, with the features made of them.

A vector state (a normaliser, a precision over k) is a feature of every token, most often inside a query that it
divides. A program walks the tokens of one segment for a tile of channels, chunk by chunk, with the state in
registers; features leave, and the states at chunk borders for the backward pass, which walks the other way. Where the
batch has programs enough a segment is a whole sequence, and every input is read once. Otherwise a pass before says
what each segment does to the state (``S' = total S + local``), and a scan over segments gives the state at their
borders.

Inside a chunk a decay of one number per token is a matrix of decays between tokens, and the states of all tokens
are a product with it; with any other decay they are a scan. The backward expressions are the symbolic derivatives of
the same maps. Where the only query divides by such states, :mod:`dspace.emit.triton.fold` has a shorter way.
"""

from __future__ import annotations

from collections.abc import Mapping

from dspace.emit.triton.vector_group import VectorGroup
from dspace.emit.triton.vector_host import host
from dspace.emit.triton.vector_kernels import Kernels

COMPOSE = '''
@_kernel
def _compose(decay_a, write_a, decay_b, write_b):
    """One step S -> decay S + write after another."""
    return decay_a * decay_b, write_a * decay_b + write_b
'''

SEGMENT = '''
@_kernel
def _segment(spans, i_c, T, NT, LENGTH, PACKED: tl.constexpr):
    """First and end token of segment ``i_c``; empty for the spare segments of a packed batch."""
    if PACKED:
        begin = tl.load(spans + 2 * i_c).to(tl.int64)
        end = tl.load(spans + 2 * i_c + 1).to(tl.int64)
    else:
        sequence = (i_c // NT).to(tl.int64)
        begin = sequence * T + (i_c % NT).to(tl.int64) * LENGTH
        end = tl.minimum(begin + LENGTH, sequence * T + T)
    return begin, end
'''

CARRY = '''
@_kernel(do_not_specialize=["T", "NT", "H", "LENGTH"])
def _carry_vector_kernel(
    total, local, start, border, final, offsets, bases, T, NT, H, LENGTH,
    W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):
    """Values at segment borders from what each segment does: value' = total value + local, in either direction.

    The first is 0 without ``start``; the last is stored if there is ``final``.
    """
    NW: tl.constexpr = (W + BW - 1) // BW
    pid = tl.program_id(0)
    i_nh = (pid // NW).to(tl.int64)
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_w = (pid % NW) * BW + tl.arange(0, BW)
    m_w = o_w < W
    segments = tl.cdiv(end - begin, LENGTH)
    value = tl.zeros([BW], dtype=tl.float32)
    if start is not None:
        value += tl.load(start + i_nh * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    first = segments - 1 if REVERSE else segments * 0
    tl.store(border + ((base + first) * H + i_h) * W + o_w, value, mask=o_w < tl.where(begin < end, W, 0))
    for i in range(0, segments, BN):
        step = i + tl.arange(0, BN)
        segment = segments - 1 - step if REVERSE else step
        at = ((base + segment) * H + i_h)[:, None] * W + o_w[None, :]
        mask = (step < segments)[:, None] & m_w[None, :]
        decay = tl.load(total + at, mask=mask, other=1.0)
        write = tl.load(local + at, mask=mask, other=0.0)
        decay, write = tl.associative_scan((decay, write), 0, _compose)
        after = decay * value[None, :] + write
        there = at - H * W if REVERSE else at + H * W
        tl.store(border + there, after, mask=mask & (step + 1 < segments)[:, None])
        value = tl.sum(tl.where(tl.arange(0, BN)[:, None] == BN - 1, after, 0.0), axis=0)
    if final is not None:
        tl.store(final + i_nh * W + o_w, value, mask=m_w)
'''

BEFORE = '''
def _before(values, initial, offsets):
    """Values before each token, from those after it and the initial ones."""
    if offsets is None:
        return torch.cat([initial[:, None], values[:, :-1]], 1)
    rows = torch.arange(values.shape[1], device=values.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    first = (rows == offsets[sequence]).view(1, -1, *(1,) * (values.dim() - 2))
    return torch.where(first, initial[sequence][None], torch.cat([values[:, :1], values[:, :-1]], 1))
'''


def source(group: VectorGroup, names: Mapping[str, str]) -> str:
    """Kernels, launches, operators and the function ``_vector_TAG`` of one group."""
    writer = Kernels(group, names)
    return "\n".join([writer.sums(), writer.forward(), writer.backward(False), writer.backward(True), host(group)])

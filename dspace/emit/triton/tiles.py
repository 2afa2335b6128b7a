"""Source of tiles: which tokens and channels a program has, and how it loads and stores what belongs to them."""

from __future__ import annotations

from collections.abc import Iterable

from dspace.math.ir import Axes, State

_PART: dict[Axes, str] = {"": "", "k": " + o_k", "v": " + o_v", "kv": " + t_kv"}
_WIDTH: dict[Axes, str] = {"": "", "k": " * K", "v": " * V", "kv": " * K * V"}
_VECTOR: dict[Axes, tuple[str, str, str]] = {"k": ("r_k", "K", "[:, None]"), "v": ("r_v", "V", "[None, :]")}
_MASK: dict[Axes, str] = {"": "", "k": "m_k", "v": "m_v", "kv": "m_kv"}

TILES = '''
@_kernel
def _bounds(offsets, i_n, T, PACKED: tl.constexpr):
    """First token and number of tokens of sequence ``i_n``, never outside the tokens that there are; rows in all."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(offsets + i_n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(offsets + i_n + 1).to(tl.int64), begin), T)
        rows = T
    else:
        begin = i_n * T
        end = begin + T
        rows = end
    return begin, (end - begin).to(tl.int32), rows


@_kernel
def _live(x, mask, EXACT: tl.constexpr):
    """``x`` with 0 in the lanes beyond the last channel."""
    if EXACT:
        return x
    else:
        return tl.where(mask, x, 0.0)
'''

PROGRAM = """    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)"""
"""Which head of which sequence, and which tile of v, a program has."""

ZEROS = """    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)"""

HEAD = f"""    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K == BK
    EXACT_V: tl.constexpr = V % BV == 0
{PROGRAM}
    r_k = tl.arange(0, BK)
    r_v = i_v * BV + tl.arange(0, BV)
    o_k = r_k[:, None]
    o_v = r_v[None, :]
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k & m_v
    t_kv = o_k * V + o_v
{ZEROS}"""


def load(array: str, axes: Axes, place: str) -> str:
    """A tile of ``array`` at row ``place``, float32.

    For a vector see :func:`raw`.
    """
    return raw(array, axes, place) + shaped(axes)


def shaped(axes: Axes) -> str:
    """What turns a raw load into a float32 tile."""
    return ".to(tl.float32)" + (_VECTOR[axes][2] if axes in _VECTOR else "")


def raw(array: str, axes: Axes, place: str) -> str:
    """What :func:`load` loads, before it is given its type and shape.

    A vector is loaded as one, without the other axis: Triton would take the layout of a ``[BK, 1]`` load for the
    states too, with k across all threads, where every sum over k is a shuffle for each column. Giving it its shape
    goes through shared memory, behind a barrier, which no later load overtakes: so load everything first.
    """
    if axes in _VECTOR:
        channel, size, _ = _VECTOR[axes]
        return f"tl.load({array} + {place}{_WIDTH[axes]} + {channel}, mask={channel} < {size}, other=0.0)"
    mask = f", mask={_MASK[axes]}, other=0.0" if axes else ""
    return f"tl.load({array} + {place}{_WIDTH[axes]}{_PART[axes]}{mask})"


def given_end(s: State, array: str) -> str:
    """The given cotangent of a state at the end of a sequence; one that all blocks of v have in common, one of them takes."""
    given = load(array, s.axes, "i_nh")
    return given if "v" in s.axes else f"tl.where(i_v == 0, {given}, 0.0)"


def stored(array: str, axes: Axes, place: str, value: str, only: str = "") -> str:
    """The store of a tile at row ``place`` of ``array``, in its type; where ``only``, a number, holds, if that is given."""
    mask = _MASK[axes] or only
    if mask and only and axes:
        mask = f"({mask} & {only}) != 0"  # Triton's interpreter makes integers of truths that it spreads over a tile
    mask = f", mask={mask}" if mask else ""
    return f"tl.store({array} + {place}{_WIDTH[axes]}{_PART[axes]}, ({value}).to({array}.dtype.element_ty){mask})"


def place_of(axes: Axes) -> str:
    """Where a program puts what it found for its whole sequence: what has no v axis, every block of v finds a part of."""
    return "i_nh" if "v" in axes else "shared"


def indented(lines: Iterable[str], depth: int) -> list[str]:
    """Lines, or several in one, further to the right."""
    return ["\n".join(4 * depth * " " + part for part in line.split("\n")) for line in lines]

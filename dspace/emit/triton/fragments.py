"""Source of the helpers that compute on tiles as the matrix units hold them.

A tile is a 16 x 16 matrix spread over one warp: ``[I, 2, 2, 2, 32]`` are I tiles beside each other, column half,
row half, low bit of the column, lane. Lane 4 g + c holds row 8 h + g and columns 8 n + 2 c + e, which is where
``mma.sync`` (PTX ISA, m16n8k16 and m16n8k8) wants both operands and leaves the result. So a result is the operand
of the next product as it stands, nothing goes through shared memory, and warps never wait for each other.

Triton's own ``tl.dot`` cannot say that. The price: a program is one warp, and each tile must lie in registers as
written here, which holds because every load and store passes through one dimension, whose only layout is lane after
lane. Where there is no such instruction (FAST is False: another vendor, the interpreter) the same functions permute
to matrices and use ``tl.dot``.
"""

from __future__ import annotations


def _mma_lines(halves: tuple[int, ...]) -> tuple[str, str]:
    """tf32: columns 2 c and 2 c + 1 of a half are its contraction indices c and c + 4, in both operands alike."""

    def product(half: int, x: str, y: str) -> list[str]:
        lines = []
        for n in (0, 1):  # rows 8 n + g of y: columns of the result
            d = ", ".join(f"${4 * n + i}" for i in range(4))
            a = ", ".join(f"{x}{4 * half + i}" for i in (0, 2, 1, 3))
            b = ", ".join(f"{y}{4 * half + 2 * n + i}" for i in (0, 1))
            lines.append(f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};")
        return lines

    split, once, thrice = [], [], []
    for i in range(4 * len(halves)):
        for name, at in (("a", 8 + i), ("b", 16 + i)):
            split += [
                f"cvt.rna.tf32.f32 {name}{i}, ${at};",
                f"sub.f32 t, ${at}, {name}{i};",
                f"cvt.rna.tf32.f32 l{name}{i}, t;",
            ]
            once.append(f"cvt.rna.tf32.f32 {name}{i}, ${at};")
    start = [f"mov.f32 ${i}, ${24 + i};" for i in range(8)]
    high = [line for half in halves for line in product(half, "a", "b")]
    low = [line for half in halves for line in (*product(half, "la", "b"), *product(half, "a", "lb"))]
    registers = [".reg .b32 a<8>;", ".reg .b32 b<8>;", ".reg .b32 la<8>;", ".reg .b32 lb<8>;", ".reg .f32 t;"]
    once = [*registers[:2], *start, *once, *high]
    thrice = [*registers, *start, *split, *low, *high]
    pad = "\n" + " " * 16
    return pad.join(once), pad.join(thrice)


_OUT_EARLY = ",".join(["=&f"] * 8)
_F8 = ",".join(["f"] * 8)
_R8 = ",".join(["r"] * 8)


def _assembly(halves: tuple[int, ...], pure: bool) -> str:
    """The branches of a product over these column halves, by type and precision of its operands."""
    once, thrice = _mma_lines(halves)
    shape, many = ("m16n8k16", 4) if len(halves) == 2 else ("m16n8k8", 2)
    x = ", ".join(f"${8 + i}" for i in range(many))
    lines = []
    for n in (0, 1):
        d, z = (", ".join(f"${4 * n + i + first}" for i in range(4)) for first in (0, 16))
        y = ", ".join(f"${12 + n + 2 * half}" for half in halves)
        lines.append(f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32 {{{d}}}, {{{x}}}, {{{y}}}, {{{z}}};")
    bf16 = ("\n" + " " * 16).join(lines)
    rest = f"[x, y, z], dtype=tl.float32, is_pure={pure}, pack=8"
    return f'''
        if x.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                {bf16}
                """,
                "{_OUT_EARLY},{_R8},{_F8}", {rest},
            )
        elif PRECISION == "tf32x3":
            return tl.inline_asm_elementwise(
                """{{
                {thrice}
                }}""",
                "{_OUT_EARLY},{_F8},{_F8},{_F8}", {rest},
            )
        else:
            return tl.inline_asm_elementwise(
                """{{
                {once}
                }}""",
                "{_OUT_EARLY},{_F8},{_F8},{_F8}", {rest},
            )'''.strip("\n")


TILES = f'''
# Tiles: lane 4 g + c of a warp holds row 8 h + g and columns 8 n + 2 c + e of a 16 x 16 matrix, as [I, n, h, e, lane].


@_kernel
def _tile_rows():
    lane = tl.arange(0, 32)[None, None, None, None, :]
    return 8 * tl.arange(0, 2)[None, None, :, None, None] + lane // 4


@_kernel
def _tile_columns():
    """Column half and column within the half."""
    lane = tl.arange(0, 32)[None, None, None, None, :]
    return tl.arange(0, 2)[None, :, None, None, None], 2 * (lane % 4) + tl.arange(0, 2)[None, None, None, :, None]


@_kernel
def _get(at, mask):
    """Load through one dimension, whose only layout is lane after lane."""
    N: tl.constexpr = at.numel
    mask = tl.reshape(tl.broadcast_to(mask, at.shape), [N])
    return tl.reshape(tl.load(tl.reshape(at, [N]), mask=mask, other=0.0), at.shape)


@_kernel
def _put(at, x, mask):
    N: tl.constexpr = at.numel
    x = tl.reshape(tl.broadcast_to(x, at.shape), [N]).to(at.dtype.element_ty)
    tl.store(tl.reshape(at, [N]), x, mask=tl.reshape(tl.broadcast_to(mask, at.shape), [N]))


@_kernel
def _matrix(x):
    """Tiles below each other as a matrix."""
    x = tl.permute(tl.reshape(x, [x.shape[0], 2, 2, 2, 8, 4]), [0, 2, 4, 1, 5, 3])
    return tl.reshape(x, [x.shape[0] * 16, 16])


@_kernel
def _mma(x, y, z, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """z + x y' for each tile; x or y may be one tile for all of the other's."""
    if FAST:
        x, y = tl.broadcast(x, y)
        x, z = tl.broadcast(x, z)
        y, z = tl.broadcast(y, z)
{_assembly((0, 1), pure=True)}
    else:
        product = tl.dot(_matrix(x), tl.trans(_matrix(y)), input_precision=PRECISION)
        if y.shape[0] > 1:
            product = tl.permute(tl.reshape(product, [2, 8, y.shape[0], 2, 4, 2]), [2, 3, 0, 5, 1, 4])
            return z + tl.reshape(product, [y.shape[0], 2, 2, 2, 32])
        else:
            product = tl.permute(tl.reshape(product, [x.shape[0], 2, 8, 2, 4, 2]), [0, 3, 1, 5, 2, 4])
            return z + tl.reshape(product, [x.shape[0], 2, 2, 2, 32])


@_kernel
def _half(x, i_n):
    """Column half i_n of float32 tiles."""
    half = tl.arange(0, 2)[None, :, None, None, None]
    chosen = tl.where(half == i_n, x.to(tl.int32, bitcast=True), 0)  # of integers, so that the sum costs nothing
    return tl.sum(chosen, 1, keep_dims=True).to(tl.float32, bitcast=True)


@_kernel
def _mma_8(x, y, z, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """z + x y' where x and y are column halves. z may be one half, for both; x or y one tile for all of the other's."""
    z = tl.broadcast_to(z, [z.shape[0], 2, 2, 2, 32])
    if FAST:
        x, y = tl.broadcast(x, y)
        x, z = tl.broadcast(x, z)
        y, z = tl.broadcast(y, z)
        # said to be impure, or Triton would let it compute on halves and broadcast what comes out
{_assembly((0,), pure=False)}
    else:
        first = tl.arange(0, 2)[None, :, None, None, None] == 0
        x, y = tl.where(first, x, 0.0).to(x.dtype), tl.where(first, y, 0.0).to(y.dtype)
        return _mma(x, y, z, PRECISION, FAST)


@_kernel
def _held(x, unequal, FAST: tl.constexpr):
    """x (finite) in a column half, to start sums of products from: each element in a register of its own.

    ``unequal`` are numbers that the compiler cannot know to be equal: of equal ones it would keep one register, and
    copy it before each product.
    """
    if FAST:
        return x + 0.0 * unequal
    else:
        return x + tl.zeros([1, 1, 2, 2, 32], tl.float32)


@_kernel
def _picked(x, i_g):
    x, source = tl.broadcast(x, 4 * i_g + tl.arange(0, 32)[None, None, None, None, :] % 4)
    if x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r,r", [x, source], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, source], dtype=tl.float32, is_pure=True, pack=1
        )


@_kernel
def _pick(x, i_g, FAST: tl.constexpr):
    """What the lanes of row i_g hold, in the lanes of every row, float32. Numbers of 16 bits travel in pairs."""
    if FAST:
        return _picked(x, i_g).to(tl.float32)
    else:
        lane = tl.arange(0, 32)[None, None, None, None, :]
        return _sum_rows(tl.where(lane // 4 == i_g, x.to(tl.float32), 0.0), FAST)


@_kernel
def _sum_rows(x, FAST: tl.constexpr):
    """Sum over the tiles, row halves and lanes that share a column; every lane gets it."""
    x = tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)
    if FAST:
        return tl.inline_asm_elementwise(
            """{{ .reg .f32 t;
            shfl.sync.bfly.b32 t, $1, 4, 31, 0xffffffff; add.f32 $0, $1, t;
            shfl.sync.bfly.b32 t, $0, 8, 31, 0xffffffff; add.f32 $0, $0, t;
            shfl.sync.bfly.b32 t, $0, 16, 31, 0xffffffff; add.f32 $0, $0, t; }}""",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        x = tl.sum(tl.reshape(x, [1, 2, 1, 2, 8, 4]), 4, keep_dims=True)
        return tl.reshape(tl.broadcast_to(x, [1, 2, 1, 2, 8, 4]), [1, 2, 1, 2, 32])


@_kernel
def _sum_rows_rounded(x, OT: tl.constexpr, FAST: tl.constexpr):
    """As _sum_rows. Operands of 16 bits are good enough for the last 8 rows: transposed, a product with ones sums them."""
    if FAST and OT == tl.bfloat16:
        x = tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)
        return tl.inline_asm_elementwise(
            """{{
            .reg .b32 p, one;
            .reg .f32 zero, t<2>;
            mov.b32 one, 0x3f803f80;
            mov.f32 zero, 0f00000000;
            cvt.rn.bf16x2.f32 p, $5, $4;
            movmatrix.sync.aligned.m8n8.trans.b16 p, p;
            mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {{$0, $1, t0, t1}}, {{one, one}}, {{p}}, {{zero, zero, zero, zero}};
            cvt.rn.bf16x2.f32 p, $7, $6;
            movmatrix.sync.aligned.m8n8.trans.b16 p, p;
            mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {{$2, $3, t0, t1}}, {{one, one}}, {{p}}, {{zero, zero, zero, zero}};
            }}""",
            "=&f,=&f,=&f,=&f,f,f,f,f", [x], dtype=tl.float32, is_pure=True, pack=4,
        )
    else:
        return _sum_rows(x, FAST)


@_kernel
def _sum_columns(x, FAST: tl.constexpr):
    """Sum over the tiles, column halves, low bits and lanes that share a row; every lane gets it."""
    x = tl.sum(tl.sum(tl.sum(x, 3, keep_dims=True), 1, keep_dims=True), 0, keep_dims=True)
    if FAST:
        return tl.inline_asm_elementwise(
            """{{ .reg .f32 t;
            shfl.sync.bfly.b32 t, $1, 1, 31, 0xffffffff; add.f32 $0, $1, t;
            shfl.sync.bfly.b32 t, $0, 2, 31, 0xffffffff; add.f32 $0, $0, t; }}""",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        x = tl.sum(tl.reshape(x, [1, 1, 2, 1, 8, 4]), 5, keep_dims=True)
        return tl.reshape(tl.broadcast_to(x, [1, 1, 2, 1, 8, 4]), [1, 1, 2, 1, 32])


@_kernel
def _sum_columns_into(z, x, i_g, OT: tl.constexpr, FAST: tl.constexpr):
    """z, a column half, with the sums over the tiles and columns of x added in column i_g."""
    lane = tl.arange(0, 32)[None, None, None, None, :]
    if FAST and OT == tl.bfloat16:  # operands of 16 bits are good enough: a product with a column of ones sums them
        ones = tl.where(lane // 4 == i_g, 0x3F803F80, 0)
        x, ones = tl.broadcast(tl.sum(x, 0, keep_dims=True), ones)
        x, z = tl.broadcast(x, z)
        both = tl.inline_asm_elementwise(
            """{{
            .reg .b32 a<4>;
            cvt.rn.bf16x2.f32 a0, $17, $16;
            cvt.rn.bf16x2.f32 a1, $19, $18;
            cvt.rn.bf16x2.f32 a2, $21, $20;
            cvt.rn.bf16x2.f32 a3, $23, $22;
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{$24, $24}}, {{$8, $9, $10, $11}};
            mov.f32 $4, 0f00000000;
            mov.f32 $5, 0f00000000;
            mov.f32 $6, 0f00000000;
            mov.f32 $7, 0f00000000;
            }}""",
            "{_OUT_EARLY},{_F8},{_F8},{_R8}", [z, x, ones], dtype=tl.float32, is_pure=True, pack=8,
        )
        return _half(both, 0)
    else:
        half, column_8 = _tile_columns()
        return tl.where(column_8 == i_g, z + _sum_columns(x, FAST), z)


@_kernel
def _rows(within, rounded, x, i_g, FAST: tl.constexpr):
    """within times what the lanes of row i_g of x hold, as an operand; of 16 bits, pairs of rounded are multiplied."""
    if FAST and rounded.dtype == tl.bfloat16 and x.dtype == tl.bfloat16:
        rounded, x = tl.broadcast(rounded, _picked(x, i_g))
        return tl.inline_asm_elementwise(
            "{{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }}", "=r,r,r", [rounded, x],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )
    else:
        return (within * _pick(x, i_g, FAST)).to(rounded.dtype)


@_kernel
def _lead(since, i_u, ODD: tl.constexpr, OT: tl.constexpr, FAST: tl.constexpr):
    """A column half of an operand with since in column 2 i_u + ODD and zeros elsewhere."""
    lane = tl.arange(0, 32)[None, None, None, None, :]
    if FAST and OT == tl.bfloat16:
        pair = tl.where(tl.arange(0, 2)[None, None, None, :, None] == ODD, since, 0.0).to(OT)
        pair, place = tl.broadcast(pair, lane % 4)
        pair, own = tl.broadcast(pair, i_u + 0 * place)
        return tl.inline_asm_elementwise(
            "{{ .reg .pred p; setp.eq.s32 p, $2, $4; selp.b32 $0, $1, 0, p; }}", "=r,r,r,r,r,r", [pair, place, own],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )
    else:
        half, column_8 = _tile_columns()
        return tl.where(column_8 == 2 * i_u + ODD, since, 0.0).to(OT)
'''

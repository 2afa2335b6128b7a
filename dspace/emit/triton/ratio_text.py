"""What the kernels of class c share: names of pointers, loads, the states and the decays of a chunk.

Notation in the emitted kernels: a chunk has 16 tokens, t where they read and s where they write. For each value
channel, tokens and key channels make tiles (:mod:`.fragments`). ``within[t, s]`` is the decay from the write of token
s to the read of token t, ``since[t]`` that from the start of the chunk. Rows behind a sequence's end repeat its last
state and have no cotangent; channels that pad a size are taken out where a body could divide by their zero states.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy

from dspace.emit.triton.ratio_expressions import RatioPrinter
from dspace.plan.ratio import RatioPlan, Tensor

HELPERS = '''
@_kernel
def _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED: tl.constexpr):
    """First token, end token and first chunk of what sequence ``i_n`` has in the window."""
    if PACKED:
        begin = tl.load(offsets + i_n).to(tl.int64)
        end = tl.load(offsets + i_n + 1).to(tl.int64)
        base = tl.load(bases + i_n).to(tl.int64)
    else:
        begin = i_n.to(tl.int64) * T + LOW
        end = i_n.to(tl.int64) * T + HIGH
        base = i_n.to(tl.int64) * NT
    return begin, end, base


@_kernel
def _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED: tl.constexpr):
    """First and end token of chunk ``i_c`` of the window; empty for the spare chunks of a packed batch."""
    if PACKED:
        begin = tl.load(spans + 2 * i_c).to(tl.int64)
        end = tl.load(spans + 2 * i_c + 1).to(tl.int64)
    else:
        sequence = (i_c // NT).to(tl.int64)
        begin = sequence * T + LOW + (i_c % NT).to(tl.int64) * 16
        end = tl.minimum(begin + 16, sequence * T + HIGH)
    return begin, end


@_kernel
def _place(H, NT, LATEST: tl.constexpr, PACKED: tl.constexpr):
    """Chunk and head of this program: heads of a chunk first. LATEST: the chunks that were written last come first.

    The kernel of the states passes over all sequences at once, so those are the last chunks of all of them.
    """
    pid = tl.program_id(0)
    i_c = pid // H
    if LATEST and not PACKED:
        sequences = tl.num_programs(0) // (H * NT)
        i_c = (i_c % sequences) * NT + NT - 1 - i_c // sequences
    return i_c, pid % H


@_kernel
def _step(at, mask):
    """Log decays; exp(-40) is nothing beside 1, and a longer step would only cost the sums their digits."""
    return tl.minimum(tl.maximum(tl.load(at, mask=mask, other=0.0).to(tl.float32), -40.0), 0.0)


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _sums_kernel(decay, sums, spans, T, LOW, HIGH, NT, H, BH: tl.constexpr, PACKED: tl.constexpr):
    """Sums of log decays from the start of each token's chunk, float32."""
    begin, end = _chunk(spans, tl.program_id(0), T, LOW, HIGH, NT, PACKED)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    token = begin + tl.arange(0, 16)
    here = (token < end)[:, None] & (o_h < H)[None, :]
    at = token[:, None] * H + o_h[None, :]
    tl.store(sums + at, tl.cumsum(_step(decay + at, here), axis=0), mask=here)


@_kernel
def _tile_step(at, mask):
    return tl.minimum(tl.maximum(_get(at, mask).to(tl.float32), -40.0), 0.0)
'''

OPTIONS = "OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr"


@dataclass(frozen=True)
class Words:
    """A plan with the identifiers of its symbols in the emitted code."""

    plan: RatioPlan
    names: Mapping[str, str]

    def of(self, item: sympy.Symbol | Tensor) -> str:
        return self.names[item.name]

    def tensors(self, axes: str, exprs: Iterable[sympy.Expr] | None = None) -> list[str]:
        """Names of the tensors on ``axes`` (that ``exprs`` mention)."""
        used = None if exprs is None else {s for e in exprs for s in e.free_symbols}
        return [self.of(t) for t in self.plan.tensors if t.axes == axes and (used is None or t.symbol in used)]

    @property
    def parameters(self) -> list[str]:
        return [self.names[p.name] for p in self.plan.parameters]

    @functools.cached_property
    def held(self) -> dict[sympy.Symbol, sympy.Expr]:
        """States that bodies read only in a sum with the same number of the head, and that number.

        As a prior precision. Sums of products start from it, which saves an addition of each element.
        """
        small = {p.symbol for p in self.plan.parameters} | {sympy.Symbol("scale", positive=True)}
        found = {}
        for symbol in (s.symbol for s in self.plan.states):
            offsets: set[sympy.Expr] = set()

            def offset(total: sympy.Expr, offsets: set[sympy.Expr] = offsets) -> sympy.Expr:
                offsets.add(sympy.Add(*(t for t in total.args if t.free_symbols <= small)))
                return sympy.Dummy()

            def shifted(e: sympy.Expr, symbol: sympy.Symbol = symbol) -> bool:
                return e.is_Add and symbol in e.args

            rest = [body.replace(shifted, offset) for body in self.plan.bodies]
            if len(offsets) == 1 and 0 not in offsets and not any(symbol in e.free_symbols for e in rest):
                found[symbol] = offsets.pop()
        return found

    def shown(self, expr: sympy.Expr) -> sympy.Expr:
        """``expr`` in terms of what stands for the states in kernels: those of :attr:`held` with their offset."""
        return expr.xreplace({s: s - offset for s, offset in self.held.items()})

    @property
    def sums(self) -> list[str]:
        return [f"sums_{d}" for d in range(len(self.plan.decays))]

    @property
    def decays(self) -> list[str]:
        return [f"decay_{d}" for d in range(len(self.plan.decays))]

    @property
    def states(self) -> list[str]:
        return [self.of(s.symbol) for s in self.plan.states]

    def whole(self, expr: sympy.Expr) -> bool:
        """Whether an expression of a body has a value for each channel pair, so that its tile is complete."""
        axes = {t.symbol: t.axes for t in self.plan.tensors} | {s.symbol: "kv" for s in self.plan.states}
        axes |= {sympy.Symbol(f"d_{r.name}", real=True): "v" for r in self.plan.reads}
        return set("".join(axes.get(s, "") for s in expr.free_symbols)) == {"k", "v"}

    def coefficient(self, read: int) -> sympy.Expr:
        """Constant factor of a read's body: applied to what is summed, or to the read's cotangent."""
        body = self.plan.bodies[read]
        free = body.free_symbols - {sympy.Symbol("scale", positive=True)}
        return body.as_independent(*free, as_Add=False)[0] if free else sympy.S.One

    def body(self, read: int) -> sympy.Expr:
        return self.plan.bodies[read] / self.coefficient(read)

    def rows(self) -> list[tuple[int, int]]:
        """Distinct (value, decay group) pairs of the writes."""
        found: list[tuple[int, int]] = []
        for s in self.plan.states:
            for w in s.writes:
                if (w.value, s.group) not in found:
                    found.append((w.value, s.group))
        return found


def signature(kernel: str, pointers: Iterable[str], sizes: str, constants: str) -> list[str]:
    counted = ", ".join(f'"{size}"' for size in ("T", "LOW", "HIGH", "NT", "ROWS") if size in sizes.split(", "))
    return [
        f"@_kernel(do_not_specialize=[{counted}])",
        f"def {kernel}(",
        f"    {', '.join(pointers)},",
        f"    {sizes},",
        f"    {constants},",
        "):",
    ]


def chunk_start(words: Words, backward: bool) -> list[str]:
    """Place, decays and parameters of one chunk of 16 tokens of one head of this launch.

    Sums of log decays are from the start of the chunk; those of rows and of columns are the same numbers.
    """
    before = words.plan.exclusive
    lines = [f"    i_c, i_h = _place(H, NT, {not backward}, PACKED)"]
    lines += """
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    row = _tile_rows()
    half, column_8 = _tile_columns()
    column = 8 * half + column_8
    lane_row = tl.arange(0, 32)[None, None, None, None, :] // 4
    # offsets in a chunk are 32 bit wide, from starts that are 64
    start = begin * H + i_h
    live_row, live_column = begin + row < end, begin + column < end
""".strip("\n").splitlines()
    lines.append(f"    slot = {'tl.program_id(0).to(tl.int64)' if backward else 'i_c.to(tl.int64) * H + i_h'}")
    for d in range(len(words.plan.decays)):
        lines += [
            f"    step_row = _tile_step(decay_{d}_in + start + row * H, live_row)",
            f"    step_column = _tile_step(decay_{d}_in + start + column * H, live_column)",
            "    sum_row = _sum_columns(tl.where(column <= row, step_column, 0.0), FAST)",
            "    sum_column = _sum_rows(tl.where(row <= column, step_row, 0.0), FAST)",
            f"    seen_row = {'sum_row - step_row' if before else 'sum_row'}  # by the read of the row's token",
            f"    within_{d} = tl.where(row {'>' if before else '>='} column, tl.exp(tl.minimum(seen_row - sum_column, 0.0)), 0.0)",
            f"    rounded_{d} = within_{d}.to(OT)",
            f"    since_{d} = tl.exp(seen_row)",
        ]
        if backward:
            lines += [
                f"    seen_column = {'sum_column - step_column' if before else 'sum_column'}",
                f"    back_{d} = tl.where(column {'>' if before else '>='} row, tl.exp(tl.minimum(seen_column - sum_row, 0.0)), 0.0).to(OT)",
                f"    first_{d} = tl.exp(_step(decay_{d}_in + start, begin < end))",
            ]
    lines += [f"    {p} = tl.load({p}_in + i_h).to(tl.float32)" for p in words.parameters]
    lines.append("    zero = tl.zeros([I, 2, 2, 2, 32], tl.float32)")
    # of halves with no part that is always 0; tokens that a column of back, or a row of within, does not see are not in it
    unequal = "_half(back_0.to(tl.float32), 1)" if backward else "_half(within_0, 0)"
    show = RatioPrinter(words.names)
    for symbol, offset in words.held.items():
        lines.append(f"    held_{words.of(symbol)} = _held({show(offset)}, {unequal}, FAST)")
    return lines


def tuples(names: Iterable[str], indent: int) -> list[str]:
    """Empty tuples, which get one group of tiles for each slab of key channels."""
    return [f"{' ' * indent}{n} = ()" for n in names]


def _few_products(expr: sympy.Expr) -> bool:
    return not expr.atoms(sympy.Function) and all(p.exp.is_Integer for p in expr.atoms(sympy.Pow))


def side(words: Words, key: int) -> str:
    """A key in float32 where it multiplies a value's gradient: made anew if that takes few products, else kept."""
    expr = words.plan.keys[key]
    if not _few_products(expr):
        return f"full_{key}[i_s]"
    return f"({RatioPrinter({s.name: f'full_{words.names[s.name]}[i_s]' for s in expr.free_symbols})(expr)})"


def kept_keys(words: Words) -> list[str]:
    """Names of the float32 tiles that :func:`side` needs."""
    names: set[str] = set()
    for j, expr in enumerate(words.plan.keys):
        names |= {f"full_{words.of(s)}" for s in expr.free_symbols} if _few_products(expr) else {f"full_{j}"}
    return sorted(names)


def key_lines(words: Words, kept: list[str], indent: int) -> list[str]:
    """Keys of one slab (rows: channels, columns: tokens s) in the operand type; ``kept`` names what stays in float32."""
    pad, lines = " " * indent, []
    inner = {t.name: f"raw_{words.of(t)}.to(tl.float32)" for t in words.plan.tensors if t.axes == "k"}
    for n in words.tensors("k", words.plan.keys):
        lines.append(f"raw_{n} = _get({n}_in + start * K + column * H * K + channel, live_column & (channel < K))")
        if f"full_{n}" in kept:
            lines.append(f"full_{n} = full_{n} + (raw_{n}.to(tl.float32),)")
    for j, key in enumerate(words.plan.keys):
        text = RatioPrinter(inner)(key)
        if f"full_{j}" in kept:
            lines.append(f"full_{j} = full_{j} + ({text},)")
        if key.is_Symbol:
            text = f"raw_{words.of(key)}"
        lines.append(f"key_{j} = key_{j} + (({text}).to(OT),)")
    return [pad + line for line in lines]


def operands(words: Words) -> list[str]:
    """Keys in the operand type, from NAME and, as loaded, raw_NAME."""
    show = RatioPrinter(words.names)
    plain = [f"raw_{words.of(k)}" if k.is_Symbol else f"({show(k)})" for k in words.plan.keys]
    return [f"key_{j} = {text}.to(OT)" for j, text in enumerate(plain)]


def start_lines(words: Words, indent: int, first: str = "first_g", prefix: str = "") -> list[str]:
    """States at the chunk's start for 8 value channels (rows: key channels, columns: value channels)."""
    names = [f"{prefix}{s}_0" for s in words.states]
    lines = tuples(names, 0)
    lines += ["for i_s in tl.static_range(N):", "    channel = first_k + i_s * 16 * I + o_k + row"]
    lines += [f"    at_tile = ({first} + column_8) * K + channel"]
    for i, n in enumerate(names):
        load = f"_get(chunks + (slot * {len(names)} + {i}) * V * K + at_tile, ({first} + column_8 < V) & (channel < K))"
        lines.append(f"    {n} = {n} + ({load}.to(OT),)")
    return [" " * indent + line for line in lines]


def octet(words: Words, names: Iterable[str], indent: int, first: str = "first_g", prefix: str = "") -> list[str]:
    """Value channels 8 at a time, as loaded: lane row g holds channel ``first + g``, columns are tokens."""
    at = f"start * V + column * H * V + {first} + lane_row"
    return [f"{' ' * indent}{prefix}{n}_8 = _get({n}_in + {at}, live_column & ({first} + lane_row < V))" for n in names]


def scaled(words: Words, names: Iterable[str], indent: int) -> list[str]:
    """The constant factor of a read's body, applied to its cotangent."""
    lines = []
    for j, r in enumerate(words.plan.reads):
        if r.name in names and words.coefficient(j) != 1:
            factor = RatioPrinter()(words.coefficient(j))
            lines.append(f"{' ' * indent}d_{r.name}_8 = d_{r.name}_8.to(tl.float32) * ({factor})")
    return lines


def state_lines(words: Words, transposed: bool, indent: int) -> list[str]:
    """States of every token of the chunk for one value channel: start state and writes, each a product.

    To a state that bodies read with an offset (``words.held``) it is added already. Rows are tokens and columns key channels, or the other way round if ``transposed``.
    """
    lines = []
    for s in words.plan.states:
        name = words.of(s.symbol)

        def product(function: str, left: str, right: str, more: str) -> str:
            x, y = (right, left) if transposed else (left, right)
            return f"{function}({x}, {y}, {more}, PRECISION, FAST)"

        more = f"held_{name}" if s.symbol in words.held else "zero"
        lines.append(f"{name} = {product('_mma_8', f'lead_{s.group}', f'{name}_0[i_s]', more)}")
        for w in s.writes:
            lines.append(f"{name} = {product('_mma', f'rows_{w.value}_{s.group}', f'key_{w.key}[i_s]', name)}")
    return [" " * indent + line for line in lines]


def write_lines(words: Words, forward: bool, indent: int) -> list[str]:
    """Values of channel ``i_g``, and what multiplies start states and keys (rows: tokens t; columns: channels, tokens s).

    Forward, ``i_g`` is UNROLL i_u + i_j, and a value that is an input is needed as an operand only.
    """
    show, lines = RatioPrinter(words.names), []
    plain = {j: words.of(v) for j, v in enumerate(words.plan.values) if v.is_Symbol}
    picked = words.tensors("v", [v for j, v in enumerate(words.plan.values) if not (forward and j in plain)])
    lines += [f"{n} = _pick({n}_8, i_g, FAST)" for n in picked]
    lines += [f"value_{j} = {show(v)}" for j, v in enumerate(words.plan.values) if not (forward and j in plain)]
    for d in range(len(words.plan.decays)):
        lead = f"_lead(since_{d}, UNROLL // 2 * i_u + i_j // 2, i_j % 2, OT, FAST)"
        lines.append(f"lead_{d} = {lead if forward else f'tl.where(column_8 == i_g, since_{d}, 0.0).to(OT)'}")
    for j, d in words.rows():
        product = f"_rows(within_{d}, rounded_{d}, {plain[j]}_8, i_g, FAST)" if j in plain else ""
        lines.append(f"rows_{j}_{d} = {product or f'(within_{d} * value_{j}).to(OT)'}")
    return [" " * indent + line for line in lines]

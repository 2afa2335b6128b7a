"""What the kernels of class c share: expressions as statements, names of pointers, the decays of a chunk.

Notation in the emitted kernels: a chunk has 16 tokens; tiles have a row for each (value channel, token) and a
column for each key channel. ``within[t, s]`` is the decay from the write of token s to the read of token t,
``since[t]`` that from the start of the chunk. Rows behind a sequence's end repeat its last state and have no
cotangent; columns and channels that pad a size are taken out where a body could divide by their zero states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy

from dspace.emit.printers import Reciprocal
from dspace.emit.triton.printer import TritonPrinter
from dspace.plan.ratio import RatioPlan, Tensor

HELPERS = '''
@_kernel
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x; FAST takes the reciprocal of the special function unit (relative error 1e-7, denormals are zero)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


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


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _sums_kernel(decay, sums, spans, T, LOW, HIGH, NT, H, BH: tl.constexpr, PACKED: tl.constexpr):
    """Sums of log decays from the start of each token's chunk, float32."""
    begin, end = _chunk(spans, tl.program_id(0), T, LOW, HIGH, NT, PACKED)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    row = begin + tl.arange(0, 16)
    here = (row < end)[:, None] & (o_h < H)[None, :]
    at = row[:, None] * H + o_h[None, :]
    step = tl.load(decay + at, mask=here, other=0.0).to(tl.float32)
    # exp(-40) is nothing beside 1: a longer step would only cost the sums their digits.
    step = tl.minimum(tl.maximum(step, -40.0), 0.0)
    tl.store(sums + at, tl.cumsum(step, axis=0), mask=here)
'''

OPTIONS = "OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr"


class RatioPrinter(TritonPrinter):
    def call(self, function: type, args: tuple[sympy.Expr, ...]) -> tuple[str, int]:
        if function is Reciprocal:
            return f"_reciprocal({self(args[0])}, FAST)", 5
        return super().call(function, args)


def one_reciprocal(expr: sympy.Expr) -> sympy.Expr:
    """Negative powers as powers of one :class:`Reciprocal`, so that each division happens once."""

    def negative(e: sympy.Expr) -> bool:
        return e.is_Pow and e.exp.is_number and e.exp.is_negative

    def turn(e: sympy.Expr) -> sympy.Expr:
        return Reciprocal(e.base) ** (-e.exp) if e.exp.is_Integer else Reciprocal(e.base ** (-e.exp))

    return expr.replace(negative, turn)


def _products(exprs: list[sympy.Expr]) -> tuple[list[tuple[sympy.Symbol, sympy.Expr]], list[sympy.Expr]]:
    """Name the pair of factors that most products have in common, again and again.

    Products are the terms of the expressions. What is left multiplies each tile as seldom as a person would: a
    gradient becomes the product of another one and a factor.
    """
    terms = [[_Product(t) for t in sympy.Add.make_args(e)] for e in exprs]
    every = [t for row in terms for t in row]
    named: list[tuple[sympy.Symbol, sympy.Expr]] = []
    while True:
        seen = Counter(p for t in every for p in t.pairs())
        pair, times = min(seen.items(), key=lambda x: (-x[1], str(x[0])), default=(None, 0))
        if pair is None or times < 2:
            break
        symbol = sympy.Symbol(f"p{len(named)}", real=True)
        named.append((symbol, pair[0] * pair[1]))
        for t in every:
            t.replace(pair, symbol)
    return named, [sympy.Add(*(t.expr() for t in row), evaluate=len(row) > 1) for row in terms]


class _Product:
    """A coefficient and factors, integer powers written out."""

    def __init__(self, term: sympy.Expr) -> None:
        self.coefficient, rest = term.as_coeff_Mul()
        self.factors: list[sympy.Expr] = []
        for f in sympy.Mul.make_args(rest):
            power = f.is_Pow and f.exp.is_Integer and 2 <= f.exp <= 8
            self.factors += [f.base] * int(f.exp) if power else [f] * (f != 1)

    def pairs(self) -> set[tuple[sympy.Expr, sympy.Expr]]:
        ordered = sorted(self.factors, key=str)
        return {(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]}

    def replace(self, pair: tuple[sympy.Expr, sympy.Expr], symbol: sympy.Symbol) -> None:
        if pair in self.pairs():
            for f in pair:
                self.factors.remove(f)
            self.factors.append(symbol)

    def expr(self) -> sympy.Expr:
        return sympy.Mul(self.coefficient, *self.factors)


def statements(exprs: Mapping[str, sympy.Expr], names: Mapping[str, str], indent: int) -> list[str]:
    """Assignments ``name = expr``, with common subexpressions named first."""
    pad = " " * indent
    show = RatioPrinter(names)
    named, rest = _products([one_reciprocal(e) for e in exprs.values()])
    numbered = (sympy.Symbol(f"c{i}", real=True) for i in range(10**6))
    shared, results = sympy.cse([*(e for _, e in named), *rest], symbols=numbered, optimizations=[])
    values = dict(shared) | dict(zip([s for s, _ in named], results, strict=False))
    lines: list[str] = []
    done: set[sympy.Symbol] = set()

    def define(expr: sympy.Expr) -> None:
        for s in sorted(expr.free_symbols, key=str):
            if s in values and s not in done:
                done.add(s)
                define(values[s])
                lines.append(f"{pad}{s.name} = {show(values[s])}")

    for name, value in zip(exprs, results[len(named) :], strict=True):
        define(value)
        lines.append(f"{pad}{name} = {show(value)}")
    return lines


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

    @property
    def sums(self) -> list[str]:
        return [f"sums_{d}" for d in range(len(self.plan.decays))]

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


def whole(words: Words, expr: sympy.Expr, text: str) -> str:
    """``text``, the value of ``expr``, as a complete tile."""
    return text if words.whole(expr) else f"({text} + tl.zeros([BV, 16, BK], tl.float32))"


def signature(kernel: str, pointers: Iterable[str], sizes: str, constants: str) -> list[str]:
    return [
        '@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])',
        f"def {kernel}(",
        f"    {', '.join(pointers)},",
        f"    {sizes},",
        f"    {constants},",
        "):",
    ]


def chunk_start(words: Words) -> list[str]:
    """Place, decays and parameters of one chunk of 16 tokens of one head of this launch."""
    before = words.plan.exclusive
    lines = f"""
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    o_c = tl.arange(0, 16)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    # offsets in a chunk are 32 bit wide, from starts that are 64
    start = begin * H + i_h
    at = o_c * H
    live = begin + o_c < end
    causal = o_c[:, None] {">" if before else ">="} o_c[None, :]
""".strip("\n").splitlines()
    for d in range(len(words.plan.decays)):
        lines += [
            f"    whole = tl.load(sums_{d} + (end - 1) * H + i_h, mask=begin < end, other=0.0)",
            f"    part = tl.where(live, tl.load(sums_{d} + start + at, mask=live, other=0.0), whole)",
        ]
        if before:
            lines += [
                f"    seen = tl.load(sums_{d} + start + at - H, mask=live & (o_c > 0), other=0.0)",
                "    seen = tl.where(live, seen, whole)",
            ]
        seen = "seen" if before else "part"
        lines += [
            f"    within_{d} = tl.where(causal, tl.exp(tl.minimum({seen}[:, None] - part[None, :], 0.0)), 0.0)",
            f"    since_{d} = tl.exp({seen})",
        ]
    lines += [f"    {p} = tl.load({p}_in + i_h).to(tl.float32)" for p in words.parameters]
    return lines


def fetch(name: str, first: str, mask: str) -> str:
    """Load of a ``[BV, 16]`` tile of a tensor on v whose channels start at ``first``."""
    index = f"at[None, :] * V + ({first} + o_v)[:, None]"
    return f"tl.load({name}_in + start * V + {index}, mask=live[None, :] & ({mask})[:, None], other=0.0)"


def cotangent(words: Words, read: int) -> str:
    """Cotangent of a read in this turn, times the constant factor of its body."""
    name = f"d_{words.plan.reads[read].name}"
    factor = words.coefficient(read)
    return f"{name} = {name}_next.to(tl.float32)" + ("" if factor == 1 else f" * ({RatioPrinter()(factor)})")


def value_block(words: Words, fetched: list[str], indent: int) -> list[str]:
    """Channels of this turn (fetched one turn ahead), values, and the rows that multiply keys and start states."""
    pad = " " * indent
    lines = [
        "first = i_v * BV",
        "m_v = first + o_v < V",
        "block = first // 16 * 16 + tl.arange(0, 16)",
    ]
    for name in fetched:
        reads = [f"d_{r.name}" for r in words.plan.reads]
        lines.append(cotangent(words, reads.index(name)) if name in reads else f"{name} = {name}_next.to(tl.float32)")
    lines += ["# of the next turn, so that its latency hides behind this one"]
    for name in fetched:
        lines += [f"{name}_next = {fetch(name, '(first + BV)', 'first + BV + o_v < V')}"]
    show = RatioPrinter(words.names)
    for j, value in enumerate(words.plan.values):
        lines.append(f"value_{j} = {show(value)}")
    for d in range(len(words.plan.decays)):
        lines += [
            f"lead_{d} = tl.where((first + o_v)[:, None, None] == block[None, None, :], since_{d}[None, :, None], 0.0)",
            f"lead_{d} = tl.reshape(lead_{d}, [BV * 16, 16]).to(OT)",
        ]
    for j, d in words.rows():
        lines += [
            f"rows_{j}_{d} = tl.reshape(value_{j}[:, None, :] * within_{d}[None, :, :], [BV * 16, 16]).to(OT)",
        ]
    return [pad + line for line in lines]


def key_lines(words: Words, suffix: str, indent: int) -> list[str]:
    """Keys of one slab in the operand type, from ``raw_NAME`` tiles as loaded."""
    pad = " " * indent
    lines = []
    for j, key in enumerate(words.plan.keys):
        if key.is_Symbol:
            text = f"raw_{words.of(key)}{suffix}.to(OT)"
        else:
            inner = {s.name: f"{words.of(s)}{suffix}" for s in key.free_symbols}
            text = f"({RatioPrinter(inner)(key)}).to(OT)"
        lines.append(f"{pad}key_{j}{suffix} = {text}")
    return lines


def state_lines(words: Words, tile: str, suffix: str, slab: str, indent: int) -> list[str]:
    """States after (or before) every token of the chunk: start state and writes, each a matmul."""
    pad = " " * indent
    lines = []
    for i, s in enumerate(words.plan.states):
        name = words.of(s.symbol)
        load = f"tl.load({tile} + {i} * V * K + {slab}, mask=m_tile, other=0.0)"
        lines.append(f"{name} = tl.dot(lead_{s.group}, {load}, input_precision=PRECISION)")
        for w in s.writes:
            rows = f"rows_{w.value}_{s.group}"
            lines.append(f"{name} = tl.dot({rows}, key_{w.key}{suffix}, {name}, input_precision=PRECISION)")
        lines.append(f"{name} = tl.reshape({name}, [BV, 16, BK])")
    return [pad + line for line in lines]

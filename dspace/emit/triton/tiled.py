"""Tokens whose key channels are several tiles: 48 are three of 16, 96 three of 32, none of them padding.

Triton's tiles have powers of two. Here what lives on k is a tuple of tiles, and what is done to it stands in a loop over
them that Triton unrolls. A sum over k adds tiles up and goes across lanes once; what needs it is in a further loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy

from dspace.emit.naming import Namer
from dspace.emit.triton.sequential import Body
from dspace.emit.triton.tiles import PROGRAM, ZEROS, indented
from dspace.math.ir import Axes
from dspace.plan.sequential import Assign, Store, Sum, Token

CHANNELS = '''
@_kernel
def _channels(i_k, o_v, m_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Key channels of tile ``i_k``: as a vector, as a column, which there are; elements of a state, and which there are."""
    r_k = i_k * BK + tl.arange(0, BK)
    o_k = r_k[:, None]
    m_k = o_k < K
    return r_k, o_k, m_k, o_k * V + o_v, m_k & m_v
'''

TILE = '''
def _exact_tile(K):
    """Tile of k that leaves the fewest lanes without a channel, of 16 and more, at most four of them; the widest such."""
    full = 1 << (K - 1).bit_length()
    widths = [w for w in (16, 32, 64, 128) if w < full <= 4 * w]
    return min([full, *widths[::-1]], key=lambda w: -(-K // w) * w)
'''

LOOP = "for i_k in tl.static_range(NK):"
PLACE = "    r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)"

HEAD = f"""    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K % BK == 0
    EXACT_V: tl.constexpr = V % BV == 0
{PROGRAM}
    r_v = i_v * BV + tl.arange(0, BV)
    o_v = r_v[None, :]
    m_v = o_v < V
{ZEROS}"""

Emit = Callable[[Store, str], tuple[str | None, str]]
"""Of a store and its value: what collects a new value (None: nothing does), and that value, or else a line."""


def tiled(axes: Axes) -> bool:
    return "k" in axes


def over_tiles(lines: Iterable[str]) -> list[str]:
    """``lines`` for each tile of k, or none for none."""
    found = list(lines)
    return [LOOP, PLACE, *indented(found, 1)] if found else []


def collected(values: Mapping[str, tuple[Axes, str]]) -> list[str]:
    """Names for values: a tuple of tiles for each that lives on k."""
    many = {n: text for n, (axes, text) in values.items() if tiled(axes)}
    lines = [f"{n} = {text}" for n, (axes, text) in values.items() if not tiled(axes)]
    lines += [f"{n} = ()" for n in many]
    return [*lines, *over_tiles(f"{n} = {n} + ({text},)" for n, text in many.items())]


def written(stores: Iterable[tuple[Axes, str]]) -> list[str]:
    """Lines of stores; those on k for each tile."""
    found = list(stores)
    return [t for axes, t in found if not tiled(axes)] + over_tiles(t for axes, t in found if tiled(axes))


class TiledBody(Body):
    """The statements of one token on tiles; ``sources``: by the name of a leaf that lives on k, the text of its tile."""

    def __init__(self, token: Token, names: Mapping[str, str], namer: Namer) -> None:
        super().__init__(token, names, namer)
        self.namer = namer
        self.sources: dict[str, str] = {}
        self.tuples: dict[sympy.Symbol, str] = {}

    def lines(self, stores: Sequence[Store], emit: Emit, later: Iterable[Store] = ()) -> list[str]:
        """Statements that ``stores`` need and that were not printed yet, and the stores; ``later`` are printed afterwards."""
        order = [s for s in self.order(stores) if s.symbol not in self.done]
        self.done |= {s.symbol for s in order}
        behind = [s for s in self.order(later) if s.symbol not in self.done]
        beyond = {x for s in (*behind, *later) for x in s.expr.free_symbols}
        ranks = {s.symbol: self.rank(s.expr) for s in order}
        lines = []
        for rank in sorted({*ranks.values(), *(self.rank(s.expr) for s in stores)}):
            here = [s for s in order if ranks[s.symbol] == rank]
            lines += [f"{self.name(s.symbol)} = {self.value(s)}" for s in here if not self.on_k(s)]
            own = [s for s in stores if self.rank(s.expr) == rank]
            for s in own:
                if not tiled(s.axes):
                    into, text = emit(s, self.full(s))
                    lines.append(f"{into} = {text}" if into else text)
            wanted = beyond | {x for s in order if ranks[s.symbol] > rank for x in s.expr.free_symbols}
            wanted |= {x for s in stores if self.rank(s.expr) > rank for x in s.expr.free_symbols}
            lines += self.loop([s for s in here if self.on_k(s)], [s for s in own if tiled(s.axes)], emit, wanted)
        return lines

    def loop(self, statements: list[Assign | Sum], stores: list[Store], emit: Emit, wanted: set) -> list[str]:
        """One loop over tiles; values that are ``wanted`` afterwards become tuples."""
        if not statements and not stores:
            return []
        before, inside, last, after = [], [], [], []
        there: set[sympy.Symbol] = set()

        def fetch(expr: sympy.Expr) -> None:
            for x in sorted(expr.free_symbols - there, key=lambda s: s.name):
                if tiled(self.flattener.axes.get(x, "")):
                    there.add(x)
                    inside.append(f"{self.name(x)} = {self.sources.get(x.name) or f'{self.tuple_of(x)}[i_k]'}")

        for s in statements:
            fetch(s.expr)
            name = self.name(s.symbol)
            if isinstance(s, Sum) and s.over == "k":
                inside.append(f"part = _live({self.show(s.expr)}, m_k, EXACT_K)")
                inside.append(f"{name} = part if i_k == 0 else {name} + part")
                after.append(
                    f"{name} = tl.sum({name}, axis=0)[None, :]" if s.loop == "kv" else f"{name} = tl.sum({name})"
                )
                continue
            inside.append(f"{name} = {self.value(s)}")
            there.add(s.symbol)
            if s.symbol in wanted:
                before.append(f"{self.tuple_of(s.symbol)} = ()")
                last.append(f"{self.tuple_of(s.symbol)} = {self.tuple_of(s.symbol)} + ({name},)")
        for store in stores:
            fetch(store.expr)
            into, text = emit(store, self.full(store))
            before += [f"{into} = ()"] if into else []
            last.append(f"{into} = {into} + ({text},)" if into else text)
        return [*before, *over_tiles([*inside, *last]), *after]

    def order(self, stores: Iterable[Store]) -> list[Assign | Sum]:
        return self.scheduler.in_order({x for s in stores for x in s.expr.free_symbols})

    def name(self, symbol: sympy.Symbol) -> str:
        return self.names.get(symbol.name, symbol.name)

    def tuple_of(self, symbol: sympy.Symbol) -> str:
        if symbol not in self.tuples:
            self.tuples[symbol] = self.namer(f"{self.name(symbol)}_tiles")
        return self.tuples[symbol]

    def on_k(self, s: Assign | Sum) -> bool:
        return tiled(s.loop if isinstance(s, Sum) else s.axes)

    def rank(self, expr: sympy.Expr) -> int:
        """How many sums over k, one after the other, come before ``expr``."""
        return max((self.rank_of(x) for x in expr.free_symbols), default=0)

    def rank_of(self, symbol: sympy.Symbol) -> int:
        s = self.flattener.statements.get(symbol)
        if s is None:
            return 0
        return self.rank(s.expr) + (isinstance(s, Sum) and s.over == "k")

"""The sequential plan: one token of *any* recurrence as a short list of loop nests over ``k`` and ``v``.

The formulas of a token (forward, or backward from the adjoint) are flattened into scalar-notation statements with
axes. Common subexpressions get a name, and so does every part of a formula that lives on fewer axes than the whole:
what depends on ``k`` only is computed once a row, what depends on ``v`` only once a token. A contraction over a
``kv`` expression needs a full pass over the state before its value can be used, so it splits the token into
*levels*; all ``kv`` work of a level is fused into one nest with ``v`` innermost. Values on ``kv`` are never stored:
a later level computes them again. Printers (numba now, Triton with the same schedule) only spell the loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from dspace.errors import CompilerBug
from dspace.math.functions import Softplus, one_reciprocal
from dspace.math.ir import CONTRACTED, Axes, SumK, SumV, axes_of, drop_axis

SIZES = {"k": sympy.Symbol("size k", positive=True), "v": sympy.Symbol("size v", positive=True)}
"""Channel counts as numbers of the formulas: the sum over an axis that a value does not have. No name of a spec has a
space, so that none can be taken for them."""

_NAME_FIRST = (Softplus, sympy.Heaviside, sympy.sign)
"""Functions whose printed form repeats its argument, which therefore gets a name."""

_PREFIX: dict[Axes, str] = {"": "c", "k": "row", "v": "col", "kv": "x"}


@dataclass(frozen=True)
class Assign:
    """``symbol = expr`` for every element of ``axes``."""

    symbol: sympy.Symbol
    axes: Axes
    expr: sympy.Expr


@dataclass(frozen=True)
class Sum:
    """``symbol`` (on ``axes``) is the sum of ``expr`` over the axis ``over``."""

    symbol: sympy.Symbol
    axes: Axes
    expr: sympy.Expr
    over: str

    @property
    def loop(self) -> Axes:
        """Axes of the loop that accumulates it."""
        return "".join(sorted(self.axes + self.over))


@dataclass(frozen=True)
class Store:
    """Write ``expr`` to the array ``name``; ``add`` accumulates over tokens instead."""

    name: str
    axes: Axes
    expr: sympy.Expr
    add: bool = False


Statement = Assign | Sum | Store


@dataclass(frozen=True)
class Loop:
    """One loop nest over ``axes``; ``head`` (nests over kv only) runs once a row, before the row's ``body``."""

    axes: Axes
    body: tuple[Statement, ...]
    head: tuple[Assign, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Loops of one token, in order.

    ``buffers`` are the k- and v-vectors that one loop leaves for another. ``stored`` maps the symbol of a carried
    value's next state to the array that holds it once its storing nest has run.
    """

    loops: tuple[Loop, ...]
    buffers: Mapping[sympy.Symbol, Axes]
    axes: Mapping[sympy.Symbol, Axes]
    reloads: Mapping[sympy.Symbol, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """The formulas of one token.

    ``leaves``: axes of every symbol that is loaded. ``defined``: symbols that formulas use by name (next states), in
    any order. ``carried``: array of a state -> (axes, symbol of its previous value, its next value). ``outputs`` and
    ``accumulated``: array -> (axes, value), written once a token or added up over tokens.
    """

    leaves: Mapping[sympy.Symbol, Axes]
    defined: Mapping[sympy.Symbol, sympy.Expr]
    carried: Mapping[str, tuple[Axes, sympy.Symbol, sympy.Expr]]
    outputs: Mapping[str, tuple[Axes, sympy.Expr]]
    accumulated: Mapping[str, tuple[Axes, sympy.Expr]] = field(default_factory=dict)


def _full_sums(expr: sympy.Expr) -> sympy.Expr:
    """``c * sum_kv(a) + c * sum_kv(b)`` as ``c * sum_kv(a + b)``: one accumulator instead of two."""

    def is_full(e: sympy.Expr) -> bool:
        return isinstance(e, SumV) and isinstance(e.args[0], SumK)

    def merge(e: sympy.Expr) -> sympy.Expr:
        bodies: dict[sympy.Expr, list[sympy.Expr]] = {}
        rest = []
        for term in e.args:
            factors = sympy.Mul.make_args(term)
            full = [f for f in factors if is_full(f)]
            if len(full) == 1:
                number, others = sympy.Mul(*(f for f in factors if f is not full[0])).as_coeff_Mul()
                bodies.setdefault(others, []).append(number * full[0].args[0].args[0])
            else:
                rest.append(term)
        return sympy.Add(*rest, *(c * SumV(SumK(sympy.Add(*b))) for c, b in bodies.items()))

    return expr.replace(lambda e: e.is_Add and sum(e_.has(SumV) for e_ in e.args) > 1, merge)


class Flattener:
    """Turns formulas into named statements; the same subexpression is named once."""

    def __init__(self, token: Token, namer: Callable[[str], str]) -> None:
        self.axes: dict[sympy.Symbol, Axes] = dict(token.leaves) | {s: "" for s in SIZES.values()}
        self.statements: dict[sympy.Symbol, Assign | Sum] = {}
        self.pending: dict[sympy.Symbol, sympy.Expr] = {}
        self.alias: dict[sympy.Symbol, sympy.Expr] = {}
        self.known: dict[tuple, sympy.Symbol] = {}
        self.namer = namer
        self.counters: dict[str, int] = {}

    def fresh(self, prefix: str) -> sympy.Symbol:
        number = self.counters.get(prefix, 0)
        self.counters[prefix] = number + 1
        return sympy.Symbol(self.namer(f"{prefix}{number}"), real=True)

    def axes_of(self, expr: sympy.Expr) -> Axes:
        return axes_of(expr, self.axes)

    def lift(self, expr: sympy.Expr, symbol: sympy.Symbol | None = None) -> sympy.Expr:
        """A name for ``expr`` (already flat), unless it is an atom."""
        if symbol is None and not expr.args:
            return expr
        key = ("assign", expr)
        if symbol is None and key in self.known:
            return self.known[key]
        axes = self.axes_of(expr)
        symbol = symbol or self.fresh(_PREFIX[axes])
        self.axes[symbol] = axes
        self.statements[symbol] = Assign(symbol, axes, expr)
        self.known.setdefault(key, symbol)
        return symbol

    def flat(self, expr: sympy.Expr) -> sympy.Expr:
        """``expr`` over atoms and named parts, without contractions, each part on as few axes as it can be."""
        if expr.is_Symbol:
            if expr in self.alias:
                return self.alias[expr]
            if expr in self.pending:
                value = self.flat(self.pending.pop(expr))
                self.alias[expr] = self.lift(value, None if value.args else expr) if value.args else value
            return self.alias.get(expr, expr)
        if not expr.args:
            return expr
        if isinstance(expr, (SumK, SumV)):
            return self.flat_sum(expr.args[0], CONTRACTED[type(expr)])
        args = [self.flat(a) for a in expr.args]
        if isinstance(expr, _NAME_FIRST) or (expr.is_Pow and args[1].is_Integer):
            args[0] = self.lift(args[0])
        if expr.is_Add or expr.is_Mul:
            return self.grouped(expr.func, args)
        whole = self.axes_of(expr.func(*args))
        return expr.func(*(a if self.axes_of(a) == whole else self.lift(a) for a in args))

    def grouped(self, func: type, args: list[sympy.Expr]) -> sympy.Expr:
        """A sum or product whose parts on fewer axes are named: ``(g * k) * v`` with ``g * k`` once a row."""
        rebuilt = func(*args)
        if rebuilt.func is not func:
            return self.flat(rebuilt) if rebuilt.args and rebuilt not in args else rebuilt
        args = list(rebuilt.args)
        whole = self.axes_of(rebuilt)
        groups: dict[Axes, list[sympy.Expr]] = {}
        for a in args:
            groups.setdefault("" if a.is_number else self.axes_of(a), []).append(a)
        scalars = groups.pop("", [])
        if whole:
            scalars = [s if s.is_number else self.lift(s) for s in scalars]
            partner = next((a for a in ("k", "v") if a in groups and a != whole), None)
            signs = [s for s in scalars if s == -1]
            scalars = [s for s in scalars if s != -1]
            if partner:
                groups[partner] = scalars + groups[partner]
                scalars = []
            parts = signs + ([self.lift(func(*scalars))] if scalars else [])
        else:
            parts = scalars
        for axes, members in groups.items():
            joined = func(*members)
            parts.append(joined if axes == whole else self.lift(joined))
        return func(*parts)

    def flat_sum(self, body: sympy.Expr, over: str) -> sympy.Expr:
        if isinstance(body, (SumK, SumV)) and over == "k":  # sum_k sum_v = sum_v sum_k: rows add up, lanes last
            return self.flat_sum(SumK(body.args[0]), "v")
        body = self.flat(body)
        outside: list[sympy.Expr] = []
        inside: list[sympy.Expr] = []
        for factor in sympy.Mul.make_args(body):
            (inside if over in self.axes_of(factor) else outside).append(factor)
        if not inside:
            return self.grouped(sympy.Mul, [SIZES[over], *outside])
        inner = sympy.Mul(*inside)
        key = ("sum", over, inner)
        if key not in self.known:
            symbol = self.fresh("sum")
            axes = drop_axis(self.axes_of(inner), over)
            self.axes[symbol] = axes
            self.statements[symbol] = Sum(symbol, axes, inner, over)
            self.known[key] = symbol
        return self.grouped(sympy.Mul, [*outside, self.known[key]]) if outside else self.known[key]


def flatten(token: Token, namer: Callable[[str], str]) -> tuple[Flattener, list[Store], dict[str, sympy.Symbol]]:
    """Statements of a token, its stores, and the symbol of each carried array's previous value."""
    wanted: list[tuple[str, str, Axes, sympy.Expr]] = []
    wanted += [("carry", n, axes, e) for n, (axes, _, e) in token.carried.items()]
    wanted += [("write", n, axes, e) for n, (axes, e) in token.outputs.items()]
    wanted += [("add", n, axes, e) for n, (axes, e) in token.accumulated.items()]
    named = list(token.defined.items())
    formulas = [_full_sums(one_reciprocal(sympy.sympify(e))) for e in [*(e for _, e in named), *(w[3] for w in wanted)]]
    shared, reduced = sympy.cse(formulas, symbols=(sympy.Dummy("shared") for _ in iter(int, 1)), order="canonical")

    f = Flattener(token, namer)
    f.pending = dict(shared) | {s: e for (s, _), e in zip(named, reduced, strict=False)}
    for symbol, _ in named:
        # The next state keeps its own symbol, so that a later level may read it back from memory.
        value = f.flat(f.pending.pop(symbol)) if symbol in f.pending else f.alias[symbol]
        f.alias[symbol] = value if not value.args else f.lift(value, symbol)
    stores = []
    for (kind, name, axes, _), expr in zip(wanted, reduced[len(named) :], strict=True):
        value = f.flat(expr)
        if kind == "carry" and value.args:
            value = f.lift(value)
        stores.append(Store(name, axes, value, add=kind == "add"))
    return f, stores, {n: previous for n, (_, previous, _) in token.carried.items()}


class Scheduler:
    """Places flat statements in loops; see the module's text for the rules."""

    def __init__(self, flattener: Flattener, stores: list[Store], previous: Mapping[str, sympy.Symbol]) -> None:
        self.axes = flattener.axes
        self.known = flattener.statements
        self.stores = stores
        self.previous = previous
        self.levels: dict[sympy.Symbol, int] = {}

    def level(self, expr: sympy.Expr) -> int:
        """Number of passes over kv that must be over before ``expr`` can be computed."""
        return max((self.symbol_level(s) for s in expr.free_symbols), default=0)

    def symbol_level(self, symbol: sympy.Symbol) -> int:
        if symbol not in self.known:
            return 0
        if symbol not in self.levels:
            s = self.known[symbol]
            full = isinstance(s, Sum) and s.loop == "kv"
            self.levels[symbol] = self.level(s.expr) + (1 if full else 0)
        return self.levels[symbol]

    def in_order(self, symbols: Iterable[sympy.Symbol]) -> list[Assign | Sum]:
        """Statements that define ``symbols`` and all they need, definitions first."""
        order: dict[sympy.Symbol, None] = {}

        def visit(symbol: sympy.Symbol) -> None:
            if symbol in self.known and symbol not in order:
                for s in sorted(self.known[symbol].expr.free_symbols, key=lambda s: s.name):
                    visit(s)
                order[symbol] = None

        for symbol in sorted(symbols, key=lambda s: s.name):
            visit(symbol)
        return [self.known[s] for s in order]

    def run(self) -> Schedule:
        needed = self.in_order({s for store in self.stores for s in store.expr.free_symbols})
        sums = [s for s in needed if isinstance(s, Sum) and s.loop == "kv"]
        large = [s for s in self.stores if s.axes == "kv"]
        carried = {s.name: s for s in large if s.name in self.previous}
        when = {s.name: self.level(s.expr) for s in large}
        passes = max([self.level(s.expr) + 1 for s in sums] + [when[s.name] + 1 for s in large], default=0)

        def roots(level: int) -> list[sympy.Expr]:
            found = [s.expr for s in sums if self.level(s.expr) == level]
            return found + [s.expr for s in large if when[s.name] == level]

        # A nest recomputes the kv values it needs, unless a next state is in memory already. A state that a later
        # nest still needs in its previous value is stored no earlier than there.
        bodies: list[list[Assign]] = []
        settled = False
        while not settled:
            settled = True
            bodies = []
            for level in range(passes):
                fresh = {s.expr for n, s in carried.items() if s.expr.is_Symbol and level > when[n]}
                body, used = self.closure(roots(level), fresh)
                bodies.append(body)
                for name in carried:
                    if self.previous[name] in used and level > when[name]:
                        when[name], settled = level, False

        heads, small = self.place_small(needed, bodies, [roots(i) for i in range(passes)], passes)
        loops: list[Loop] = []
        for level in range(passes + 1):
            loops += self.group(small[level])
            if level < passes:
                inner: list[Statement] = [*bodies[level]]
                inner += [s for s in sums if self.level(s.expr) == level]
                inner += [s for s in large if when[s.name] == level]
                if inner:
                    loops.append(Loop("kv", tuple(inner), tuple(heads[level])))
        reloads = {s.expr: s.name for s in carried.values() if s.expr.is_Symbol and s.expr in self.known}
        loops += self.copies()
        return Schedule(tuple(loops), self.buffers(loops), self.axes, reloads)

    def closure(self, roots: list[sympy.Expr], memory: set[sympy.Expr]) -> tuple[list[Assign], set[sympy.Symbol]]:
        """kv assignments that ``roots`` need inside a nest, and every symbol read there; ``memory`` is loaded."""
        order: dict[sympy.Symbol, None] = {}
        used: set[sympy.Symbol] = set()

        def visit(symbol: sympy.Symbol) -> None:
            used.add(symbol)
            statement = self.known.get(symbol)
            if symbol in memory or symbol in order or not isinstance(statement, Assign) or statement.axes != "kv":
                return
            for s in sorted(statement.expr.free_symbols, key=lambda s: s.name):
                visit(s)
            order[symbol] = None

        for root in roots:
            for s in sorted(root.free_symbols, key=lambda s: s.name):
                visit(s)
        return [self.known[s] for s in order], used  # type: ignore[misc]

    def place_small(
        self, needed: list[Assign | Sum], bodies: list[list[Assign]], roots: list[list[sympy.Expr]], passes: int
    ) -> tuple[list[list[Assign]], list[list[Statement]]]:
        """Row heads of each nest, and the statements on "", k or v before each nest (and after the last)."""
        readers: dict[sympy.Symbol, set[object]] = {}
        for level, body in enumerate(bodies):
            for expr in [*(s.expr for s in body), *roots[level]]:
                for s in expr.free_symbols:
                    readers.setdefault(s, set()).add(level)
        vectors = [s for s in needed if s.axes != "kv" and not (isinstance(s, Sum) and s.loop == "kv")]
        for statement in vectors:
            for s in statement.expr.free_symbols:
                readers.setdefault(s, set()).add(statement.symbol)
        for store in self.stores:
            if store.axes != "kv":
                for s in store.expr.free_symbols:
                    readers.setdefault(s, set()).add("store")
        # A k-value that one nest alone uses is computed at the head of its rows; readers before what they read.
        home: dict[sympy.Symbol, int] = {}
        for statement in reversed(vectors):
            if isinstance(statement, Assign) and statement.axes == "k":
                places = {home.get(r, "loop") if isinstance(r, sympy.Symbol) else r for r in readers[statement.symbol]}
                if len(places) == 1 and isinstance(place := places.pop(), int):
                    home[statement.symbol] = place
        heads: list[list[Assign]] = [[] for _ in range(passes)]
        small: list[list[Statement]] = [[] for _ in range(passes + 1)]
        for statement in vectors:
            if statement.symbol in home:
                heads[home[statement.symbol]].append(statement)  # type: ignore[arg-type]
            else:
                small[self.symbol_level(statement.symbol)].append(statement)
        for store in self.stores:
            if store.axes != "kv" and store.name not in self.previous:
                small[self.level(store.expr)].append(store)
        return heads, small

    def group(self, statements: list[Statement]) -> list[Loop]:
        """Fuse statements on "", k and v into as few loops as their order allows."""
        loops: list[Loop] = []
        todo = list(statements)
        while todo:
            before = len(todo)
            for axes in ("", "v", "k"):
                waiting = {s.symbol for s in todo if not isinstance(s, Store)}
                taken: list[Statement] = []
                for s in todo:
                    loop = s.loop if isinstance(s, Sum) else s.axes
                    if loop == axes and not (s.expr.free_symbols & waiting):
                        taken.append(s)
                        if isinstance(s, Assign):
                            waiting.discard(s.symbol)
                if taken:
                    todo = [s for s in todo if s not in taken]
                    loops.append(Loop(axes, tuple(taken)))
            if len(todo) == before:
                raise CompilerBug(f"sequential plan: statements wait for one another: {todo}")
        return loops

    def copies(self) -> list[Loop]:
        """Small states change at the end of the token, when nothing reads their previous value any more."""
        last: dict[Axes, list[Statement]] = {}
        for store in self.stores:
            if store.axes != "kv" and store.name in self.previous:
                last.setdefault(store.axes, []).append(store)
        return [Loop(axes, tuple(body)) for axes, body in last.items()]

    def buffers(self, loops: list[Loop]) -> dict[sympy.Symbol, Axes]:
        """k- and v-vectors read in another loop than the one that makes them, or made by a contraction over kv."""
        made: dict[sympy.Symbol, int] = {}
        kept: dict[sympy.Symbol, Axes] = {}
        for number, loop in enumerate(loops):
            for statement in (*loop.head, *loop.body):
                if not isinstance(statement, Store) and statement.axes in ("k", "v"):
                    made[statement.symbol] = number
                    if isinstance(statement, Sum):
                        kept[statement.symbol] = statement.axes
                for s in statement.expr.free_symbols:
                    if s in made and made[s] != number:
                        kept[s] = self.axes[s]
        return kept


def schedule(token: Token, namer: Callable[[str], str]) -> Schedule:
    """Loop nests of one token; ``namer`` knows the names that are taken."""
    flattener, stores, previous = flatten(token, namer)
    small = set(s for n, s in previous.items() if token.carried[n][0] != "kv")
    for i, store in enumerate(stores):
        # The next value of a small state must outlive the change of the others it is made from.
        if store.name in previous and store.expr.free_symbols & small and store.expr.is_Symbol:
            symbol = flattener.fresh("next")
            flattener.axes[symbol] = flattener.axes[store.expr]
            flattener.statements[symbol] = Assign(symbol, flattener.axes[store.expr], store.expr)
            stores[i] = Store(store.name, store.axes, symbol, store.add)
    return Scheduler(flattener, stores, previous).run()

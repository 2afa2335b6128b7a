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

import sympy

from dspace.errors import CompilerBug
from dspace.math.ir import Axes
from dspace.plan.flatten import SIZES, Flattener, flatten
from dspace.plan.statements import Assign, Loop, Schedule, Statement, Store, Sum, Token

__all__ = ["SIZES", "Assign", "Loop", "Schedule", "Scheduler", "Store", "Sum", "Token", "flatten", "schedule"]


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

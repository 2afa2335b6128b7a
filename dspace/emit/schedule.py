"""A schedule as source lines: the loop nests of one token, spelled for a scalar language with explicit loops.

Row ``i`` runs over ``k``, lane ``j`` over ``v``. What a leaf or a store is called is given as arrays at token level:
a name for a scalar, something to index by ``[i]``, ``[j]`` or ``[i][j]`` for the others. Scratch arrays are zero when
the first token starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dspace.emit.naming import Namer
from dspace.emit.printers import NumbaPrinter
from dspace.errors import CompilerBug
from dspace.math.ir import Axes
from dspace.plan.sequential import Assign, Loop, Schedule, Store, Sum

INDENT = "    "


@dataclass(frozen=True)
class Arrays:
    """Names at token level: of every leaf symbol, and of every store's target."""

    loads: Mapping[sympy.Symbol, str]
    stores: Mapping[str, str]


class LoopWriter:
    """Writes the loops of one schedule."""

    def __init__(self, schedule: Schedule, arrays: Arrays, namer: Namer) -> None:
        self.schedule = schedule
        self.arrays = arrays
        self.namer = namer
        self.locals: dict[tuple[str, str], str] = {}
        self.cleared = self.cleared_by_readers()

    def cleared_by_readers(self) -> dict[int, list[sympy.Symbol]]:
        """Sums over k, on v, that the last loop to read them can set back to zero, by the place of that loop.

        Their array is zero when the token starts: a loop that only wrote zeros would cost a call of memset each token.
        """
        last: dict[sympy.Symbol, int] = {}
        for place, loop in enumerate(self.schedule.loops):
            for symbol in {x for s in (*loop.head, *loop.body) for x in s.expr.free_symbols}:
                last[symbol] = place
        found: dict[int, list[sympy.Symbol]] = {}
        for loop in self.schedule.loops:
            for s in loop.body:
                if isinstance(s, Sum) and loop.axes == "kv" and s.over == "k" and s.symbol in last:
                    if self.schedule.loops[last[s.symbol]].axes == "v":
                        found.setdefault(last[s.symbol], []).append(s.symbol)
        return found

    def local(self, base: str, suffix: str) -> str:
        """One identifier for element ``suffix`` of ``base``, the same in every loop."""
        key = (base, suffix)
        if key not in self.locals:
            self.locals[key] = self.namer(f"{base}_{suffix}")
        return self.locals[key]

    def lines(self) -> list[str]:
        out: list[str] = []
        for place, loop in enumerate(self.schedule.loops):
            out += self.nest(loop) if loop.axes == "kv" else self.flat(loop)
            out += [f"{INDENT}{s.name}[j] = zero" for s in self.cleared.get(place, ())]
        return out

    def source(self, symbol: sympy.Symbol) -> str:
        """Array that holds ``symbol`` outside the loop that makes it."""
        if symbol in self.arrays.loads:
            return self.arrays.loads[symbol]
        if symbol in self.schedule.buffers:
            return symbol.name
        if symbol in self.schedule.reloads:
            return self.arrays.stores[self.schedule.reloads[symbol]]
        raise CompilerBug(f"schedule: {symbol} is read where it is not known")

    def text(self, symbol: sympy.Symbol, made: set[sympy.Symbol], index: str) -> str:
        """How ``symbol`` is written inside a loop whose own values are ``made``."""
        axes = self.schedule.axes[symbol]
        if axes == "":
            return self.arrays.loads.get(symbol, symbol.name)
        if symbol in made:
            return self.local(symbol.name, index) if symbol in self.schedule.buffers else symbol.name
        return f"{self.source(symbol)}[{index}]"

    def flat(self, loop: Loop) -> list[str]:
        """A loop over k or v alone, or straight scalar code."""
        index, size = {"": ("", ""), "k": ("i", "size_k"), "v": ("j", "size_v")}[loop.axes]
        made = {s.symbol for s in loop.body if isinstance(s, Assign) and s.axes == loop.axes and loop.axes}
        used = {x for s in loop.body for x in s.expr.free_symbols}
        show = NumbaPrinter({x.name: self.text(x, made, index) for x in used})
        before, body = [], []
        for s in loop.body:
            value = show(s.expr)
            if isinstance(s, Sum):
                before.append(f"{s.symbol.name} = zero")
                body.append(f"{s.symbol.name} += {value}")
            elif isinstance(s, Store):
                target = self.arrays.stores[s.name] + (f"[{index}]" if index else "")
                body.append(f"{target} {'+=' if s.add else '='} {value}")
            elif s.symbol in self.schedule.buffers:
                local = self.local(s.symbol.name, index)
                body += [f"{local} = {value}", f"{s.symbol.name}[{index}] = {local}"]
            else:
                body.append(f"{s.symbol.name} = {value}")
        if not index:
            return before + body
        return [*before, f"for {index} in range({size}):", *(INDENT + line for line in body)]

    def nest(self, loop: Loop) -> list[str]:
        """Rows over k, lanes over v: everything on kv of one level."""
        rows: list[str] = []
        lanes: list[str] = []
        before: list[str] = []
        after: list[str] = []
        stores: list[str] = []

        def row_of(array: str) -> str:
            name = self.local(array, "row")
            if (line := f"{name} = {array}[i]") not in rows:
                rows.append(line)
            return name

        names: dict[str, str] = {}
        made = {s.symbol for s in (*loop.head, *loop.body) if isinstance(s, Assign)}
        used = {x for s in (*loop.head, *loop.body) for x in s.expr.free_symbols}
        for x in sorted(used, key=lambda s: s.name):
            axes = self.schedule.axes[x]
            if x in made or axes == "":
                names[x.name] = self.text(x, made, "i")
            elif axes == "v":
                names[x.name] = f"{self.source(x)}[j]"
            elif axes == "k":
                names[x.name] = self.local(x.name, "i")
                rows.append(f"{names[x.name]} = {self.source(x)}[i]")
            else:
                names[x.name] = self.local(x.name, "ij")
                lanes.append(f"{names[x.name]} = {row_of(self.source(x))}[j]")
        show = NumbaPrinter(names)
        rows += [f"{s.symbol.name} = {show(s.expr)}" for s in loop.head]
        for s in loop.body:
            value = show(s.expr)
            if isinstance(s, Assign):
                lanes.append(f"{s.symbol.name} = {value}")
            elif isinstance(s, Sum) and s.over == "v":
                local = self.local(s.symbol.name, "i")
                rows.append(f"{local} = zero")
                lanes.append(f"{local} += {value}")
                after.append(f"{s.symbol.name}[i] = {local}")
            elif isinstance(s, Sum):
                if not any(s.symbol in cleared for cleared in self.cleared.values()):
                    before.append(f"{s.symbol.name}[j] = zero")
                lanes.append(f"{s.symbol.name}[j] += {value}")
            else:
                stores.append(f"{row_of(self.arrays.stores[s.name])}[j] {'+=' if s.add else '='} {value}")
        out = ["for j in range(size_v):", *(INDENT + line for line in before)] if before else []
        out += ["for i in range(size_k):", *(INDENT + line for line in rows)]
        out += [INDENT + "for j in range(size_v):", *(2 * INDENT + line for line in lanes + stores)]
        return out + [INDENT + line for line in after]


def buffers_of(schedule: Schedule) -> list[tuple[str, Axes]]:
    """Scratch vectors that the loops of ``schedule`` need, by name and axis."""
    return sorted((s.name, axes) for s, axes in schedule.buffers.items())

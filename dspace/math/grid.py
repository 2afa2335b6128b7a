"""Alternatives refuted many at once: which combinations satisfy every equation at a random point.

Each equation keeps a set of allowed combinations of the alternatives that it involves. The combinations that are
still possible are rows over the variables met so far; a further equation is evaluated on every row, times the
alternatives of the variables that are new in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import sympy

from dspace.math.candidates import Candidate
from dspace.math.ir import Recurrence
from dspace.math.numeric import evaluate, full

MAX_GRID = 300_000
"""Most combinations evaluated at once; the dearest ones are left out beyond."""
MAX_ROWS = 15_000
"""Most combinations kept from one equation to the next."""


class Grid:
    """The choices of alternatives that are still possible."""

    def __init__(self, offers: Callable[[sympy.Symbol], Sequence[Candidate]], source: Recurrence, values) -> None:
        """``offers`` says what each variable of ``source`` may be; it is asked when an equation first needs it."""
        self.offers = offers
        self.axes = {v.symbol: v.axes for v in source.variables}
        self.values = values
        self._lists: dict[sympy.Symbol, list[Candidate]] = {}
        self._tables: dict[sympy.Symbol, np.ndarray] = {}
        self._costs: dict[sympy.Symbol, np.ndarray] = {}
        self.columns: list[sympy.Symbol] = []
        self.rows = np.zeros((1, 0), dtype=np.int64)
        self.row_costs = np.zeros(1)

    def fresh(self) -> Grid:
        """The same alternatives, none refuted yet."""
        new = copy.copy(self)
        new.columns, new.rows, new.row_costs = [], np.zeros((1, 0), dtype=np.int64), np.zeros(1)
        return new

    def list_of(self, x: sympy.Symbol) -> list[Candidate]:
        """Alternatives of ``x``: of those with one value the cheapest only, and none whose value is not finite."""
        if x not in self._lists:
            kept, values = [], []
            seen: set[bytes] = set()
            for c in self.offers(x):
                value = np.asarray(full(evaluate(c.expr, self.values), self.axes[x]), dtype=float)
                mark = np.round(value, 9).tobytes()
                if mark not in seen and np.isfinite(value).all():
                    seen.add(mark)
                    kept.append(c)
                    values.append(value)
            self._lists[x] = kept
            self._tables[x] = np.stack(values) if values else np.zeros((0, 1, 1))
            self._costs[x] = np.array([c.cost for c in kept])
        return self._lists[x]

    def restrict(self, left: sympy.Expr, right: np.ndarray, tolerance: float) -> bool:
        """Keep the combinations under which ``left`` is ``right``; False if there is none."""
        unknowns = sorted((x for x in left.free_symbols if x in self.axes), key=str)
        known = [x for x in unknowns if x in self.columns]
        fresh = [x for x in unknowns if x not in self.columns]
        # Rows that differ in what this equation does not ask for are evaluated once.
        groups, back = _distinct(self.rows[:, [self.columns.index(x) for x in known]])
        shape = [len(self.list_of(x)) for x in fresh]
        while len(groups) * np.prod(shape, dtype=float) > MAX_GRID and max(shape, default=0) > 1:
            shape[int(np.argmax(shape))] = max(max(shape) // 2, 1)
        if 0 in shape:
            return False
        ones = [1] * len(fresh)
        grid = dict(self.values)
        for i, x in enumerate(known):
            table = self._tables[x][groups[:, i]]
            grid[x] = table.reshape(len(groups), *ones, *table.shape[1:])
        for i, x in enumerate(fresh):
            lead = [1, *ones]
            lead[1 + i] = shape[i]
            table = self._tables[x][: shape[i]]
            grid[x] = table.reshape(*lead, *table.shape[1:])
        value = evaluate(left, grid)
        with np.errstate(all="ignore"):
            good = np.abs(value - right) <= tolerance * (1 + np.abs(right))
        allowed = np.argwhere(np.broadcast_to(good, (len(groups), *shape, 3, 2)).all((-1, -2)))
        return self._join(fresh, back, allowed)

    def _join(self, fresh: list[sympy.Symbol], back: np.ndarray, allowed: np.ndarray) -> bool:
        """Every row with each combination of new alternatives that its group allows."""
        if not len(allowed):
            return False
        order = np.argsort(allowed[:, 0], kind="stable")
        allowed = allowed[order]
        starts = np.searchsorted(allowed[:, 0], back, "left")
        counts = np.searchsorted(allowed[:, 0], back, "right") - starts
        mine = np.repeat(np.arange(len(self.rows)), counts)
        offsets = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
        picked = allowed[np.repeat(starts, counts) + offsets][:, 1:]
        if not len(mine):
            return False
        costs = self.row_costs[mine]
        for i, x in enumerate(fresh):
            costs = costs + self._costs[x][picked[:, i]]
        best = np.argsort(costs, kind="stable")[:MAX_ROWS]
        self.rows = np.concatenate([self.rows[mine[best]], picked[best]], 1)
        self.row_costs = costs[best]
        self.columns += fresh
        return True

    def choices(self, most: int) -> list[tuple[float, dict[sympy.Symbol, sympy.Expr]]]:
        """Complete choices with their costs, cheapest first; a variable that no equation asks for takes its cheapest."""
        rest = {x: c[0].expr for x in self.axes if x not in self.columns and (c := self.list_of(x))}
        found = []
        for cost, row in zip(self.row_costs.tolist(), self.rows[:most].tolist(), strict=False):
            found.append((cost, rest | {x: self._lists[x][i].expr for x, i in zip(self.columns, row, strict=True)}))
        return found


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows, and for each row the number of its like."""
    if rows.shape[1] == 0:
        return np.zeros((1, 0), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    groups, back = np.unique(rows, axis=0, return_inverse=True)
    return groups, back.reshape(-1)

"""Does variant A become variant B? A search for the substitution, and its proof.

Candidates for each variable of A: the variable of that name in B (which may have fewer axes: a tie), 0, 1, another
variable of B, its negative or complement, products of two, multiples by a parameter of A that stays free; each only
where its values lie in A's declared domain. All combinations that an equation involves are evaluated at once at a
random point; what survives every equation is handed to :mod:`dspace.math.proofs`, cheapest first. Floats refute,
only algebra proves. Limits repeat the search with one variable of A taken to infinity or to zero.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import sympy

from dspace.math.intervals import interval
from dspace.math.ir import DOMAINS, SCALE, Domain, Recurrence, Variable, join_axes
from dspace.math.numeric import draw, evaluate, full
from dspace.math.proofs import Claim, Verdict, prove, unread

MAX_GRID = 300_000
"""Most combinations evaluated at once; the dearest candidates are left out beyond."""
MAX_PROOFS = 12
BIG = 1e6
"""Stands for infinity where floats refute."""
EXACT, NEAR = 1e-7, 1e-3
"""Relative tolerances of that, without and with a limit."""


@dataclass(frozen=True)
class Candidate:
    """One value that a variable of A may take, and what choosing it costs (the cheapest proof is reported)."""

    expr: sympy.Expr
    cost: float


@dataclass(frozen=True)
class Reduction:
    """A proven way in which ``source`` becomes ``target``."""

    claim: Claim
    verdict: Verdict

    @property
    def exact(self) -> bool:
        return self.claim.limit is None

    @property
    def substitution(self) -> dict[str, sympy.Expr]:
        """What is substituted, by name; variables that keep their name and meaning are left out."""
        axes = {v.name: v.axes for v in self.claim.target.variables}
        kept = {v.name for v in self.claim.source.variables if axes.get(v.name) == v.axes}
        return {
            x.name: e
            for x, e in self.claim.variables.items()
            if not (e.is_Symbol and e.name == x.name and (x.name in kept or x.name not in axes))
        }


@dataclass(frozen=True)
class Failure:
    """Why no reduction was found: the equation at which every candidate failed, in words.

    ``nearest`` is the claim that came furthest, with the point at which it is false, where there is one.
    """

    what: str
    nearest: Claim | None = None
    counterexample: Mapping[str, list] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Everything found about A -> B."""

    source: str
    target: str
    exact: Reduction | None
    limit: Reduction | None
    failure: Failure | None
    seconds: float


def reduce(source: Recurrence, target: Recurrence, *, limits: bool = True, seconds: float = 25.0) -> Answer:
    """Search for substitutions and limits under which ``source`` becomes ``target`` (both in normal coordinates)."""
    start = time.perf_counter()
    deadline = start + seconds
    if source.read != target.read:
        why = f"{source.name} reads {source.read} the update, {target.name} {target.read} it"
        return Answer(source.name, target.name, None, None, Failure(why), time.perf_counter() - start)
    search = _Search(source, target, deadline)
    exact = search.run(None, "")
    limit = None
    if limits:
        for variable, direction in _limits(source, target):
            limit = search.run(variable, direction)
            if limit is not None:
                break
    failure = None if exact or limit else search.failure()
    return Answer(source.name, target.name, exact, limit, failure, time.perf_counter() - start)


def _limits(source: Recurrence, target: Recurrence) -> Iterator[tuple[Variable, str]]:
    taken = {v.name for v in target.variables}
    for v in (*source.parameters, *source.inputs):
        if v.axes or v.name in taken:
            continue
        domain = DOMAINS[v.domain]
        if domain.low == 0 and domain.high > 1:
            yield v, "infinity"
        if domain.low == 0:
            yield v, "zero"


class _Search:
    def __init__(self, source: Recurrence, target: Recurrence, deadline: float) -> None:
        self.source, self.target, self.deadline = source, target, deadline
        self.rng = np.random.default_rng(7)
        taken = {v.name for v in target.variables} | {s.name for s in target.states}
        self.free = [v for v in (*source.parameters, *source.inputs) if v.name not in taken]
        self.domains: dict[sympy.Symbol, Domain] = {v.symbol: DOMAINS[v.domain] for v in self.free}
        self.domains |= {v.symbol: DOMAINS[v.domain] for v in target.variables}
        self.values: dict[sympy.Symbol, np.ndarray] = {}
        for v in (*self.free, *target.variables):
            self.values[v.symbol] = full(draw(v, self.rng), v.axes)
        for s in target.states:
            self.values[s.symbol] = full(draw(s, self.rng), s.axes)
        for s in source.states:
            self.values[unread(s)] = full(draw(s, self.rng), s.axes)
        self._furthest = f"{source.name} has not a state for each of {target.name}, on its axes at least"
        self._reached = -1.0
        self._nearest: Claim | None = None

    def run(self, limit: Variable | None, direction: str) -> Reduction | None:
        values = dict(self.values)
        if limit is not None:
            values[limit.symbol] = np.full((1, 1), BIG if direction == "infinity" else 1 / BIG)
        candidates = {v.symbol: self._candidates(v, limit) for v in self.source.variables}
        found: list[tuple[float, int, dict, dict]] = []
        for states in self._state_maps(limit):
            if time.perf_counter() > self.deadline:
                break
            for cost, choice in self._solve(states, candidates, values, NEAR if limit else EXACT)[:MAX_PROOFS]:
                found.append((cost + self._cost_of(states), len(found), choice, states))
        symbol = limit.symbol if limit else None
        for _, _, choice, states in sorted(found, key=lambda x: x[:2])[:MAX_PROOFS]:
            claim = Claim(self.source, self.target, choice, states, symbol, direction or "infinity")
            verdict = prove(claim)
            # A limit under which nothing changes is no limit.
            if verdict.proven and (limit is None or verdict.errors):
                return Reduction(claim, verdict)
        return None

    def _cost_of(self, states) -> float:
        """States that only change their name are cheapest; a multiple costs more than substituting elsewhere."""
        kept = {t.symbol for t in self.target.states}
        return sum(
            0.0 if e in kept or e == unread(s) else 0.4 if not e.free_symbols & kept else 1.5
            for s, e in ((s, states[s.symbol]) for s in self.source.states)
        )

    def failure(self) -> Failure:
        """The equation that no candidate satisfied, and a point at which the nearest claim is false."""
        if self._nearest is None:
            return Failure(self._furthest)
        return Failure(self._furthest, self._nearest, prove(self._nearest).counterexample)

    def _state_maps(self, limit: Variable | None) -> Iterator[dict[sympy.Symbol, sympy.Expr]]:
        """Every way to give each state of A a state of B, its constant start, or (in a limit) no reader."""
        factors: list[sympy.Expr] = [sympy.S.One]
        for v in [limit] if limit is not None else self.free:
            if not v.axes and v.role == "parameter" and v.symbol.is_positive:
                factors += [v.symbol, 1 / v.symbol]
        options: list[list[sympy.Expr]] = []
        for s in self.source.states:
            fits = [t.symbol for t in self.target.states if set(t.axes) <= set(s.axes)]
            options.append([*fits, *([s.init] if not s.init.free_symbols else []), unread(s)])
        wanted = {t.symbol for t in self.target.states}
        for factor in factors:
            for chosen in itertools.product(*options):
                used = [c for c in chosen if c in wanted]
                if set(used) == wanted and len(used) == len(wanted):
                    yield {
                        s.symbol: c * factor if c in wanted else c
                        for s, c in zip(self.source.states, chosen, strict=True)
                    }

    def _candidates(self, v: Variable, limit: Variable | None) -> list[Candidate]:
        if limit is not None and v.name == limit.name:
            return [Candidate(v.symbol, 0.0)]
        found: dict[sympy.Expr, float] = {}

        def offer(expr: sympy.Expr, cost: float) -> None:
            if expr not in found and _within(interval(expr, self.domains), DOMAINS[v.domain]):
                found[expr] = cost

        if any(f.name == v.name for f in self.free):
            offer(v.symbol, 0.5)
        fits = [
            w
            for w in self.target.variables
            if set(w.axes) <= set(v.axes) and (v.role != "parameter" or w.role != "input")
        ]
        if v.name == SCALE.name:
            fits = [SCALE]
        for w in fits:
            if w.name == v.name:
                offer(w.symbol, 0.0 if w.axes == v.axes else 1.0)
        offer(sympy.S.Zero, 2.0)
        offer(sympy.S.One, 2.0)
        if v.name == SCALE.name:
            return [Candidate(e, c) for e, c in found.items()]
        multipliers = [f for f in ([limit] if limit else self.free) if not f.axes and f.symbol.is_nonnegative]
        for w in fits:
            same = w.name == v.name
            y = w.symbol
            offer(y, 3.0)
            for m in multipliers:
                offer(y * m.symbol, 1.2 if same else 4.0)
                offer(y / m.symbol, 1.3 if same else 4.1)
            offer(-y, 4.0)
            offer(1 - y, 4.0)
            offer(1 - sympy.exp(y), 4.5)
            if w.name != SCALE.name:
                offer(y * SCALE.symbol, 3.5 if same else 4.6)
        for a, b in itertools.combinations([w for w in fits if w.name != SCALE.name], 2):
            if join_axes(a.axes, b.axes) == v.axes:
                offer(a.symbol * b.symbol, 5.0)
                offer(-a.symbol * b.symbol, 5.5)
        return sorted((Candidate(e, c) for e, c in found.items()), key=lambda x: x.cost)

    def _solve(self, states, candidates, values, tolerance) -> list[tuple[float, dict[sympy.Symbol, sympy.Expr]]]:
        """Costs and choices of candidates under which every equation holds at the random point, cheapest first."""
        space = _Space({x: list(c) for x, c in candidates.items()}, self.source, values)
        every = list(self._equations(states))
        for step, (what, left, right) in enumerate(every):
            if not space.restrict(left.xreplace(states), evaluate(right, values), tolerance):
                if tolerance == EXACT and step / len(every) > self._reached:
                    self._reached = step / len(every)
                    self._furthest = f"no candidate makes {what} of {self.source.name} that of {self.target.name}"
                    self._nearest = Claim(self.source, self.target, space.choices()[0][1], states)
                return []
        return space.choices()

    def _equations(self, states) -> Iterator[tuple[str, sympy.Expr, sympy.Expr]]:
        """Equations, those with the fewest unknowns first: what a token writes before the whole update."""
        updates = {t.symbol: t.update for t in self.target.states}
        starts = {t.symbol: t.init for t in self.target.states}
        nothing = {t.symbol: sympy.S.Zero for t in self.target.states}
        kept = [(s, states[s.symbol]) for s in self.source.states if states[s.symbol] != unread(s)]
        unit = {s.name: next((v / b for b in updates if b in v.free_symbols), sympy.S.One) for s, v in kept}
        for s, value in kept:
            yield f"the start of {s.name}", s.init / unit[s.name], value.xreplace(starts) / unit[s.name]
        for s, value in kept:
            empty = {x.symbol: e.xreplace(nothing) for x, e in ((x, states[x.symbol]) for x in self.source.states)}
            yield (
                f"what a token writes to {s.name}",
                s.update.xreplace(empty),
                value.xreplace(updates).xreplace(nothing),
            )
        for s, value in kept:
            yield f"the update of {s.name}", s.update / unit[s.name], value.xreplace(updates) / unit[s.name]
        yield "the output", self.source.output, self.target.output
        if self.source.variance is not None and self.target.variance is not None:
            yield "the variance", self.source.variance, self.target.variance


class _Space:
    """The choices that are still possible: per equation a set of allowed combinations, joined as they come."""

    def __init__(self, lists: dict[sympy.Symbol, list[Candidate]], source: Recurrence, values) -> None:
        self.lists = lists
        self.axes = {v.symbol: v.axes for v in source.variables}
        self.values = values
        self.alive = {x: np.arange(len(c)) for x, c in lists.items()}
        self.columns: list[sympy.Symbol] = []
        self.rows = np.zeros((1, 0), dtype=np.int64)

    def restrict(self, left: sympy.Expr, right: np.ndarray, tolerance: float) -> bool:
        """Keep the combinations under which ``left`` is ``right``; False if there is none."""
        unknowns = sorted((x for x in left.free_symbols if x in self.lists), key=str)
        shape = [len(self.alive[x]) for x in unknowns]
        while np.prod(shape, dtype=float) > MAX_GRID:
            longest = int(np.argmax(shape))
            x = unknowns[longest]
            self.alive[x] = self.alive[x][: max(shape[longest] // 2, 1)]
            shape[longest] = len(self.alive[x])
        grid = dict(self.values)
        for position, x in enumerate(unknowns):
            lead = [1] * len(unknowns)
            lead[position] = shape[position]
            stack = [full(evaluate(self.lists[x][i].expr, self.values), self.axes[x]) for i in self.alive[x]]
            grid[x] = np.stack(stack).reshape(*lead, *stack[0].shape) if stack else np.zeros((*lead, 1, 1))
        value = evaluate(left, grid)
        size = 1 + np.abs(right)
        with np.errstate(all="ignore"):
            good = np.broadcast_to(np.abs(value - right) <= tolerance * size, (*shape, 3, 2)).all((-1, -2))
        allowed = np.argwhere(good)
        if not len(allowed):
            return False
        indices = np.stack([self.alive[x][allowed[:, i]] for i, x in enumerate(unknowns)], 1) if unknowns else allowed
        return self._join(unknowns, indices.astype(np.int64))

    def _join(self, unknowns: list[sympy.Symbol], indices: np.ndarray) -> bool:
        shared = [x for x in unknowns if x in self.columns]
        fresh = [x for x in unknowns if x not in self.columns]
        mine = [self.columns.index(x) for x in shared]
        theirs = [unknowns.index(x) for x in shared]
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(indices[:, theirs].tolist()):
            groups.setdefault(tuple(row), []).append(i)
        pick_mine: list[int] = []
        pick_theirs: list[int] = []
        for i, row in enumerate(self.rows[:, mine].tolist()):
            for j in groups.get(tuple(row), ()):
                pick_mine.append(i)
                pick_theirs.append(j)
        if not pick_mine:
            return False
        new = indices[pick_theirs][:, [unknowns.index(x) for x in fresh]]
        self.rows = np.concatenate([self.rows[pick_mine], new], 1)
        self.columns += fresh
        order = np.argsort(self._costs(), kind="stable")[: MAX_GRID // 20]
        self.rows = self.rows[order]
        for i, x in enumerate(self.columns):
            self.alive[x] = np.unique(self.rows[:, i])
        return True

    def _costs(self) -> np.ndarray:
        total = np.zeros(len(self.rows))
        for i, x in enumerate(self.columns):
            total += np.array([c.cost for c in self.lists[x]])[self.rows[:, i]]
        return total

    def choices(self) -> list[tuple[float, dict[sympy.Symbol, sympy.Expr]]]:
        """Complete choices with their costs, cheapest first; a variable that no equation asks for takes its cheapest candidate."""
        rest = {x: c[0].expr for x, c in self.lists.items() if x not in self.columns and c}
        found = []
        for cost, row in zip(self._costs().tolist(), self.rows[: 4 * MAX_PROOFS].tolist(), strict=False):
            found.append((cost, rest | {x: self.lists[x][i].expr for x, i in zip(self.columns, row, strict=True)}))
        return found


def _within(inner: Domain, outer: Domain) -> bool:
    low = inner.low > outer.low or (inner.low == outer.low and (inner.open_low or not outer.open_low))
    high = inner.high < outer.high or (inner.high == outer.high and (inner.open_high or not outer.open_high))
    return low and high

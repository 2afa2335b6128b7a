"""Does variant A become variant B? A search for the substitution, and its proof.

Alternatives for each variable of A come from :mod:`dspace.math.candidates`: first the plain ones, then, where those
lead nowhere, factors read off B's own terms. Each state of A is a multiple of a state of B, shifted by a constant
where they start apart, or a constant at which it stays. All combinations that an equation involves are evaluated at
once at a random point; what survives every equation is handed to :mod:`dspace.math.proofs`, cheapest first. Floats
refute, only algebra proves. Limits repeat the search with one variable of A taken to infinity or to zero.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import sympy

from dspace.math.candidates import Offers
from dspace.math.folding import carried, freed
from dspace.math.grid import Grid
from dspace.math.ir import DOMAINS, Recurrence, State, SumK, SumV, Variable
from dspace.math.numeric import draw, evaluate, full
from dspace.math.proofs import Claim, Verdict, compared_outputs, prove, unread
from dspace.math.witness import witness

MAX_PROOFS = 12
MAX_STATE_MAPS = 200
BIG = 1e6
"""Stands for infinity where floats refute."""
EXACT, NEAR = 1e-7, 1e-3
"""Relative tolerances of that, without and with a limit."""


@dataclass(frozen=True)
class Reduction:
    """A proven way in which ``source`` becomes ``target``."""

    claim: Claim
    verdict: Verdict
    carried: tuple[str, ...] = ()
    """In a fold: states of the target that are carried beside, and stand in the substitution (see ``folding``)."""

    @property
    def exact(self) -> bool:
        return self.claim.limit is None

    @property
    def order(self) -> int | None:
        """In a limit: the lowest order in the small quantity at which source and target differ; None if unknown."""
        orders = self.verdict.orders
        return None if self.exact or not orders or None in orders.values() else min(o for o in orders.values() if o)

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

    ``nearest`` is the claim that came furthest, where there is one; ``counterexample`` the point at which it is false:
    values of all variables and both sides, or the tokens after which the outputs differ.
    """

    what: str
    nearest: Claim | None = None
    counterexample: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Everything found about A -> B.

    ``fold`` is looked for where nothing exact is found: A becomes B once B's small states are carried beside it.
    """

    source: str
    target: str
    exact: Reduction | None
    limit: Reduction | None
    failure: Failure | None
    seconds: float
    fold: Reduction | None = None


def reduce(source: Recurrence, target: Recurrence, *, limits: bool = True, seconds: float = 25.0) -> Answer:
    """Search for substitutions and limits under which ``source`` becomes ``target`` (both in normal coordinates)."""
    start = time.perf_counter()
    search = _Search(source, target, start + seconds)
    exact = search.run(None, "", False) or search.run(None, "", True)
    limit = None
    moves = [m for m in _limits(source, target) if limits and not _trivial(exact, *m)]
    # The plain alternatives in every limit before the composed ones in any: they are many more.
    for composed in (False, True) if exact is None else (False,):
        for variable, direction in moves:
            limit = limit or search.run(variable, direction, composed)
    fold = _fold(source, target, start + seconds) if exact is None else None
    failure = None if exact or limit or fold else search.failure()
    return Answer(source.name, target.name, exact, limit, failure, time.perf_counter() - start, fold)


def _fold(source: Recurrence, target: Recurrence, deadline: float) -> Reduction | None:
    """How ``source`` becomes ``target`` with the small states of that one carried beside, if it does."""
    rest = freed(target)
    if rest is None:
        return None
    search = _Search(source, rest, deadline)
    found = search.run(None, "", False) or search.run(None, "", True)
    return None if found is None else replace(found, carried=tuple(s.name for s in carried(target)))


def _limits(source: Recurrence, target: Recurrence) -> Iterator[tuple[Variable, str]]:
    taken = {v.name for v in target.variables}
    for v in (*source.parameters, *source.inputs):
        domain = DOMAINS[v.domain]
        if v.name in taken or domain.low != 0:
            continue
        if domain.high > 1:
            yield v, "infinity"
        yield v, "zero"


def _trivial(exact: Reduction | None, variable: Variable, direction: str) -> bool:
    """A limit whose end is taken by an exact substitution says nothing new."""
    return exact is not None and direction == "zero" and exact.claim.variables[variable.symbol] == 0


class _Search:
    def __init__(self, source: Recurrence, target: Recurrence, deadline: float) -> None:
        self.source, self.target, self.deadline = source, target, deadline
        taken = {v.name for v in target.variables} | {s.name for s in target.states}
        self.free = [v for v in (*source.parameters, *source.inputs) if v.name not in taken]
        self.offers = Offers(source, target, self.free)
        rng = np.random.default_rng(7)
        self.values: dict[sympy.Symbol, np.ndarray] = {}
        for v in (*self.free, *target.variables):
            self.values[v.symbol] = full(draw(v, rng), v.axes)
        for s in target.states:
            self.values[s.symbol] = full(draw(s, rng), s.axes)
        for s in source.states:
            self.values[unread(s)] = full(draw(s, rng), s.axes)
        self._furthest = f"{source.name} has not a state for each of {target.name}, on its axes at least"
        self._reached = -1.0
        self._nearest: Claim | None = None

    def run(self, limit: Variable | None, direction: str, composed: bool) -> Reduction | None:
        values = dict(self.values)
        if limit is not None:
            values[limit.symbol] = np.full((1, 1), BIG if direction == "infinity" else 1 / BIG)
        by_symbol = {v.symbol: v for v in self.source.variables}
        grid = Grid(lambda x: self.offers.of(by_symbol[x], limit, composed), self.source, values)
        found: list[tuple[float, int, dict, dict]] = []
        for states in itertools.islice(self._state_maps(limit), MAX_STATE_MAPS):
            if time.perf_counter() > self.deadline:
                break
            for cost, choice in self._solve(states, grid, values, NEAR if limit else EXACT):
                found.append((cost + self._cost_of(states), len(found), choice, states))
        symbol = limit.symbol if limit else None
        for _, _, choice, states in sorted(found, key=lambda x: x[:2])[:MAX_PROOFS]:
            if time.perf_counter() > self.deadline:
                break
            claim = Claim(self.source, self.target, choice, states, symbol, direction or "infinity")
            verdict = prove(claim)
            # A limit under which nothing changes is no limit.
            if verdict.proven and (limit is None or verdict.errors):
                return Reduction(claim, verdict)
        return None

    def _cost_of(self, states) -> float:
        """States that only change their name are cheapest; a multiple costs more than substituting elsewhere."""
        kept = {t.symbol for t in self.target.states}

        def of(s: State, e: sympy.Expr) -> float:
            if e in kept or e == unread(s):
                return 0.0
            if not e.free_symbols & kept:
                return 0.4
            return 0.8 if e.is_Add else 1.5

        return sum(of(s, states[s.symbol]) for s in self.source.states)

    def failure(self) -> Failure:
        """The equation that no candidate satisfied, and a point at which the nearest claim is false."""
        point: Mapping[str, object] = prove(self._nearest).counterexample if self._nearest is not None else {}
        return Failure(self._furthest, self._nearest, point or witness(self.source, self.target, self._nearest))

    def _state_maps(self, limit: Variable | None) -> Iterator[dict[sympy.Symbol, sympy.Expr]]:
        """Every way to give each state of A a state of B, its constant start, or (in a limit) no reader."""
        multipliers: list[tuple[str, sympy.Expr]] = [("", sympy.S.One)]
        for v in [limit] if limit is not None else self.free:
            if v.role == "parameter" and v.symbol.is_positive:
                multipliers += [(v.axes, v.symbol), (v.axes, 1 / v.symbol)]
        free = {v.symbol for v in self.free}
        options: list[list[sympy.Expr]] = []
        for s in self.source.states:
            fits = [t for t in self.target.states if set(t.axes) <= set(s.axes)]
            constant = [s.init] if s.init.free_symbols <= free else []
            options.append([*(t.symbol for t in fits), *constant, unread(s), *self._shifted(s, fits)])
        wanted = {t.symbol for t in self.target.states}
        contracting = {t.symbol for t in self.target.states if _contracts(t)}
        for axes, factor in multipliers:
            for chosen in itertools.product(*options):
                used = [x for c in chosen for x in c.free_symbols & wanted]
                if set(used) != wanted or len(used) != len(wanted):
                    continue
                # Nothing that is substituted brings in a contraction of a state.
                if any(
                    c.free_symbols & contracting
                    for s, c in zip(self.source.states, chosen, strict=True)
                    if not _contracts(s)
                ):
                    continue
                scaled = [s for s, c in zip(self.source.states, chosen, strict=True) if c in wanted]
                if factor != 1 and (not scaled or any(not set(axes) <= set(s.axes) for s in scaled)):
                    continue
                yield {
                    s.symbol: c * factor if c in wanted else c for s, c in zip(self.source.states, chosen, strict=True)
                }

    def _shifted(self, s: State, fits: list[State]) -> list[sympy.Expr]:
        """States of B beside a constant, where A's state does not start where B's does."""
        if s.init == 0:
            return []
        constants = [p.symbol for p in self.target.parameters if set(p.axes) <= set(s.axes)]
        constants += [s.init] if s.init.free_symbols <= {v.symbol for v in self.free} else []
        return [t.symbol + c for t in fits if t.init == 0 for c in constants]

    def _solve(self, states, grid: Grid, values, tolerance) -> list[tuple[float, dict[sympy.Symbol, sympy.Expr]]]:
        """Costs and choices of candidates under which every equation holds at the random point, cheapest first."""
        space = grid.fresh()
        every = list(self._equations(states))
        for step, (what, left, right) in enumerate(every):
            if not space.restrict(left.xreplace(states), evaluate(right, values), tolerance):
                if tolerance == EXACT and step / len(every) > self._reached:
                    self._reached = step / len(every)
                    self._furthest = f"no candidate makes {what} of {self.source.name} that of {self.target.name}"
                    self._nearest = Claim(self.source, self.target, space.choices(1)[0][1], states)
                return []
        return space.choices(MAX_PROOFS)

    def _equations(self, states) -> Iterator[tuple[str, sympy.Expr, sympy.Expr]]:
        """Equations, those with the fewest unknowns first: what a token writes or keeps before the whole update."""
        updates = {t.symbol: t.update for t in self.target.states}
        starts = {t.symbol: t.init for t in self.target.states}
        nothing = {t.symbol: sympy.S.Zero for t in self.target.states}
        kept = [(s, states[s.symbol]) for s in self.source.states if states[s.symbol] != unread(s)]
        unit = {s.name: next((sympy.diff(v, b) for b in updates if b in v.free_symbols), sympy.S.One) for s, v in kept}
        for s, value in kept:
            yield f"the start of {s.name}", s.init / unit[s.name], value.xreplace(starts) / unit[s.name]
        for s, value in kept:
            yield from self._keeping(s, value, states)
        empty = {x.symbol: states[x.symbol].xreplace(nothing) for x in self.source.states}
        for s, value in kept:
            write = value.xreplace(updates).xreplace(nothing)
            yield f"what a token writes to {s.name}", _put(s.update, empty) / unit[s.name], write / unit[s.name]
        for s, value in kept:
            yield f"the update of {s.name}", s.update / unit[s.name], value.xreplace(updates) / unit[s.name]
        yield "the output", *compared_outputs(self.source, self.target)
        same_time = self.source.read == self.target.read
        if same_time and self.source.variance is not None and self.target.variance is not None:
            yield "the variance", self.source.variance, self.target.variance

    def _keeping(self, s: State, value: sympy.Expr, states) -> Iterator[tuple[str, sympy.Expr, sympy.Expr]]:
        """Coefficients outside of contractions, where both are linear: what a state keeps, and takes from one unread."""
        for other in self.source.states:
            if states[other.symbol] == unread(other) and other is not s:
                taken = retention(s.update, other.symbol)
                if taken is not None and taken != 0:
                    yield f"what {s.name} takes from {other.name}", taken, sympy.S.Zero
        t = next((t for t in self.target.states if t.symbol in value.free_symbols), None)
        if t is not None:
            mine, theirs = retention(s.update, s.symbol), retention(t.update, t.symbol)
            if mine is not None and theirs is not None:
                yield f"the retention of {s.name}", mine, theirs


def _contracts(state: State) -> bool:
    return any(state.symbol in node.free_symbols for node in state.update.atoms(SumK, SumV))


def _put(expr: sympy.Expr, values: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    """``expr`` with ``values`` put in, and the contractions of 0 that this leaves gone."""
    put = expr.xreplace(dict(values))
    return put.xreplace({SumK(sympy.S.Zero): sympy.S.Zero, SumV(sympy.S.Zero): sympy.S.Zero})


def retention(update: sympy.Expr, state: sympy.Symbol) -> sympy.Expr | None:
    """Factor by which ``update`` keeps ``state`` outside of contractions; None where it is not linear in it."""
    holes = {n: sympy.Dummy(real=True) for n in update.atoms(SumK, SumV) if state in n.free_symbols}
    kept = sympy.diff(update.xreplace(holes), state)
    return None if kept.free_symbols & {state, *holes.values()} else kept

"""What a variable of one recurrence may be, in the words of another: the alternatives that a search tries.

The plain ones are the variable of the same name (with fewer axes: a tie), 0, 1, another variable, its negative or
complement, products of two, multiples by a parameter that stays free. The composed ones are read off the target:
each term of its updates and its readout is split into the factors of the head, of the key and of the value, and any
of these, times any other's quotient, may be what the variable becomes; likewise its logarithm or exponential.
An alternative is offered only where its values provably lie in the declared domain of the variable.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from dspace.math.intervals import interval
from dspace.math.ir import DOMAINS, SCALE, Axes, Domain, Recurrence, SumK, SumV, Variable, join_axes
from dspace.math.separate import factors
from dspace.math.simplify import MAX_RATIONAL_OPS

MAX_SCALARS = 6
"""Factors that are combined with others; of a target with more the first ones are taken."""


@dataclass(frozen=True)
class Candidate:
    """One value that a variable of A may take, and what choosing it costs (the cheapest proof is reported)."""

    expr: sympy.Expr
    cost: float


@dataclass(frozen=True)
class Parts:
    """Factors that occur in a recurrence, by the axes that they live on."""

    by_axes: Mapping[Axes, tuple[sympy.Expr, ...]]

    @property
    def multipliers(self) -> tuple[sympy.Expr, ...]:
        """1, each factor of the head, and each quotient of two of them."""
        scalars = self.by_axes[""][:MAX_SCALARS]
        found = dict.fromkeys((sympy.S.One, *scalars))
        for a, b in itertools.permutations((sympy.S.One, *scalars), 2):
            found.setdefault(a / b)
        return tuple(found)


def parts_of(recurrence: Recurrence) -> Parts:
    """The factors of every term that ``recurrence`` writes, keeps or reads, states aside."""
    table = recurrence.axes_table()
    states = {s.symbol: sympy.S.One for s in recurrence.states}
    found: dict[Axes, dict[sympy.Expr, None]] = {"": {}, "k": {}, "v": {}, "kv": {}}

    def walk(expr: sympy.Expr) -> None:
        if sympy.count_ops(expr) > MAX_RATIONAL_OPS:
            return
        for term in sympy.Add.make_args(sympy.expand(expr)):
            sums = [f for f in sympy.Mul.make_args(term) if isinstance(f, (SumK, SumV)) and f.free_symbols & {*states}]
            rest = term / sympy.Mul(*sums)
            for inner in sums:
                walk(inner.args[0])
            bare = rest.xreplace(states)
            for axes, part in factors(bare, table).items():
                if part.is_number or part.has(sympy.zoo, sympy.nan):
                    continue
                found[axes].setdefault(-part if part.could_extract_minus_sign() else part)

    for expr in (*(s.update for s in recurrence.states), recurrence.output):
        walk(expr)
    return Parts({axes: tuple(parts) for axes, parts in found.items()})


class Offers:
    """The alternatives for each variable of a source, against one target."""

    def __init__(self, source: Recurrence, target: Recurrence, free: Sequence[Variable]) -> None:
        self.source, self.target, self.free = source, target, tuple(free)
        self.domains: dict[sympy.Symbol, Domain] = {v.symbol: DOMAINS[v.domain] for v in (*free, *target.variables)}
        self.table: dict[sympy.Symbol, Axes] = {v.symbol: v.axes for v in (*free, *target.variables)}
        self.inputs = {v.symbol for v in target.inputs}
        self.parts = parts_of(target)

    def of(self, v: Variable, limit: Variable | None, composed: bool) -> list[Candidate]:
        """Alternatives for ``v``, cheapest first. In a limit the variable that moves keeps its name."""
        if limit is not None and v.name == limit.name:
            return [Candidate(v.symbol, 0.0)]
        found: dict[sympy.Expr, float] = {}

        def offer(expr: sympy.Expr, cost: float) -> None:
            if expr in found:
                found[expr] = min(found[expr], cost)
            elif within(interval(expr, self.domains), DOMAINS[v.domain]):
                found[expr] = cost

        self._plain(v, limit, offer)
        if composed and v.name != SCALE.name:
            self._composed(v, offer)
        return sorted((Candidate(e, c) for e, c in found.items()), key=lambda x: x.cost)

    def _plain(self, v: Variable, limit: Variable | None, offer) -> None:
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
            return
        multipliers = [limit] if limit else self.free
        multipliers = [f for f in multipliers if set(f.axes) <= set(v.axes) and f.symbol.is_nonnegative]
        if v.role == "parameter":
            multipliers = [f for f in multipliers if f.role == "parameter"]
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

    def _composed(self, v: Variable, offer) -> None:
        """Factors of the target's terms and what follows from them by quotients, logarithms and exponentials."""

        def fits(expr: sympy.Expr) -> bool:
            return v.role != "parameter" or not expr.free_symbols & self.inputs

        # A tie is always possible: factors on fewer axes serve as well.
        bases = [e for axes, parts in self.parts.by_axes.items() if set(axes) <= set(v.axes) for e in parts]
        bases += [w.symbol for w in self.target.variables if set(w.axes) <= set(v.axes) and w.name != SCALE.name]
        bases = [e for e in dict.fromkeys(bases) if fits(e)]
        named = [e for e in bases if any(x.name == v.name for x in e.free_symbols)]
        usable = [(m, float(sympy.count_ops(m))) for m in self.parts.multipliers if fits(m)]
        for base in bases:
            # Dearer than what needs no factors, cheaper than the odd ones among the plain: those beyond 4.
            near = 3.2 if base in named else 4.2
            size = float(sympy.count_ops(base))
            for m, more in usable:
                worth = near + 0.05 * (size + more)
                offer(base * m, worth)
                offer(-base * m, worth + 0.3)
            for divisor in bases[:MAX_SCALARS]:
                offer(base / divisor, near + 0.25 + 0.05 * size)
            for other, extra in (
                (sympy.log(base), 0.2),
                (sympy.exp(base), 0.3),
                (sympy.exp(-base), 0.35),
                (1 - base, 0.4),
                (1 / base, 0.5),
            ):
                offer(other, near + extra)


def within(inner: Domain, outer: Domain) -> bool:
    """Whether every value of ``inner`` is one of ``outer``."""
    low = inner.low > outer.low or (inner.low == outer.low and (inner.open_low or not outer.open_low))
    high = inner.high < outer.high or (inner.high == outer.high and (inner.open_high or not outer.open_high))
    return low and high

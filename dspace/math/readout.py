"""The readout as contractions of large states (reads) and what is done with their results.

A sum over k that is linear in the states on ``kv`` is split: one linear read for each state and query, what is left
folded into the output, factors free of k pulled out. A sum that is not linear stays one elementwise read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from dspace.math.affinity import coefficients
from dspace.math.gradients import sum_over
from dspace.math.ir import Axes, Read, Readout, Recurrence, SumK, axes_of
from dspace.math.separate import factors, state_sums


@dataclass
class _Reads:
    table: dict[sympy.Symbol, Axes]
    found: list[Read] = field(default_factory=list)

    def add(self, body: sympy.Expr, queries: dict[str, sympy.Expr] | None) -> sympy.Symbol:
        for read in self.found:
            if read.body == body:
                return read.symbol
        symbol = sympy.Symbol(f"read_{len(self.found)}", real=True)
        self.found.append(Read(symbol, body, queries))
        return symbol


def readout_of(recurrence: Recurrence) -> Readout | None:
    """The readout of ``recurrence``; None where it contracts large states other than by single sums over k."""
    table = recurrence.axes_table()
    large = tuple(s.symbol for s in recurrence.states if s.axes == "kv")
    reads = _Reads(dict(table))
    results: list[sympy.Expr | None] = []
    for expr in (recurrence.output, recurrence.variance):
        if expr is None:
            results.append(None)
            continue
        swap = {}
        for node in state_sums(expr, frozenset(large)):
            value = _read(node, large, reads)
            if value is None:
                return None
            swap[node] = value
        expr = expr.xreplace(swap)
        if expr.free_symbols & set(large):
            return None  # a large state outside any sum over k
        results.append(expr)
    return Readout(tuple(reads.found), results[0], results[1])


def _read(node: sympy.Expr, large: tuple[sympy.Symbol, ...], reads: _Reads) -> sympy.Expr | None:
    if not isinstance(node, SumK):
        return None
    body, table = node.args[0], reads.table
    if state_sums(body, frozenset(large)):
        return None  # a sum within the sum: the state is read twice
    found = coefficients(body, large)
    if found is not None:
        linear, rest = found
        value = sum_over(rest, "k", table) if rest != 0 else sympy.S.Zero
        for state, coefficient in linear.items():
            for term in _terms(coefficient, table):
                part = factors(term, table)
                if part["kv"] != 1:
                    break
                query = part["k"]
                value += part[""] * part["v"] * reads.add(query * state, {state.name: query})
            else:
                continue
            break
        else:
            return value
    outside, inside = sympy.S.One, []
    for factor in sympy.Mul.make_args(body):
        if "k" in axes_of(factor, table):
            inside.append(factor)
        else:
            outside *= factor
    return outside * reads.add(sympy.Mul(*inside), None)


def _terms(coefficient: sympy.Expr, table: dict[sympy.Symbol, Axes]) -> tuple[sympy.Expr, ...]:
    """Terms of a query; those that differ on k only are one query."""
    if axes_of(coefficient, table) in ("", "k"):
        return (coefficient,)
    return sympy.Add.make_args(coefficient if _separable(coefficient, table) else sympy.expand(coefficient))


def _separable(expr: sympy.Expr, table: dict[sympy.Symbol, Axes]) -> bool:
    return factors(expr, table)["kv"] == 1


def divides(recurrence: Recurrence, readout: Readout) -> list[str]:
    """Where small states enter the readout: ``query`` (on k), ``output`` or ``variance``."""
    small = {s.symbol for s in recurrence.states if s.axes != "kv"}
    places = []
    if any(q.free_symbols & small for r in readout.reads if r.queries for q in r.queries.values()):
        places.append("query")
    if readout.output.free_symbols & small:
        places.append("output")
    if readout.variance is not None and readout.variance.free_symbols & small:
        places.append("variance")
    return places

"""Class c: what a chunkwise form needs to know of affine states that are read through a nonlinear sum over k.

Every state is affine with a decay that is one number per token, so inside a chunk its value at every token is a
matmul over the chunk's tokens for each value channel (THEORY.md section 3c); only the body of the read is evaluated
element by element. The plan splits the mathematics accordingly: *tensors* that the kernels load (inputs as they
are, anything else made beforehand), writes as separable keys and values of those, decays by group, and bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dspace.math.ir import SCALE, Analysis, Axes, SumK, SumV, Variable, axes_of

CHUNK = 16
"""Tokens a chunk: one fragment of the matrix units, so that a value channel's rows fill it exactly."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that the kernels load, ``[B, T, H, *axes]``: an input, or ``expr`` evaluated beforehand."""

    symbol: sympy.Symbol
    axes: Axes
    expr: sympy.Expr

    @property
    def name(self) -> str:
        return self.symbol.name


@dataclass(frozen=True)
class RatioWrite:
    """A term ``key * value``: indices into the plan's distinct keys and values."""

    key: int
    value: int


@dataclass(frozen=True)
class RatioState:
    """``S_t = exp(decay of its group) S_(t-1) + writes``."""

    name: str
    symbol: sympy.Symbol
    group: int
    writes: tuple[RatioWrite, ...]


@dataclass(frozen=True)
class RatioPlan:
    """All that the emitter needs.

    ``decays`` are the tensors of the distinct log decays (axes ""). ``keys`` and ``values`` are expressions of
    tensors on k and on v. ``bodies`` (one a read) are in terms of states, tensors, ``parameters`` (one number per
    head) and ``scale``. ``direct`` says for output and variance whether the read is the result already; else the
    result is the expression of the read symbols ``reads``.
    """

    tensors: tuple[Tensor, ...]
    parameters: tuple[Variable, ...]
    decays: tuple[Tensor, ...]
    keys: tuple[sympy.Expr, ...]
    values: tuple[sympy.Expr, ...]
    states: tuple[RatioState, ...]
    reads: tuple[sympy.Symbol, ...]
    bodies: tuple[sympy.Expr, ...]
    output_reads: int
    output: sympy.Expr | None
    variance: sympy.Expr | None
    direct_variance: bool
    exclusive: bool


class _Builder:
    def __init__(self, analysis: Analysis) -> None:
        self.recurrence = analysis.recurrence
        self.table: Mapping[sympy.Symbol, Axes] = analysis.recurrence.axes_table()
        self.inputs = {v.symbol: v for v in analysis.recurrence.inputs}
        self.parameters = {v.symbol: v for v in analysis.recurrence.parameters}
        self.tensors: list[Tensor] = []
        self.used: list[Variable] = []

    def tensor(self, expr: sympy.Expr, axes: Axes) -> sympy.Symbol:
        """The symbol of the tensor that holds ``expr`` on ``axes``."""
        for t in self.tensors:
            if t.expr == expr and t.axes == axes:
                return t.symbol
        plain = expr in self.inputs and self.inputs[expr].axes == axes
        symbol = expr if plain else sympy.Symbol(f"made_{len(self.tensors)}", real=True)
        self.tensors.append(Tensor(symbol, axes, expr))
        return symbol

    def factor(self, expr: sympy.Expr, axis: Axes) -> sympy.Expr:
        """A key or value: in the kernel if it needs inputs on its own axis only."""
        own = expr.free_symbols and all(s in self.inputs and self.inputs[s].axes == axis for s in expr.free_symbols)
        if own and not expr.atoms(SumK, SumV):
            for s in sorted(expr.free_symbols, key=str):
                self.tensor(s, axis)
            return expr
        return self.tensor(expr, axis)

    def body(self, expr: sympy.Expr, states: set[sympy.Symbol]) -> sympy.Expr | None:
        """``expr`` with everything but states, per-head numbers and ``scale`` turned into tensors."""
        swap: dict[sympy.Expr, sympy.Expr] = {}
        for node in sorted(expr.atoms(SumK, SumV), key=sympy.default_sort_key):
            axes = axes_of(node, self.table)
            if node.free_symbols & states or axes == "kv":
                return None
            swap[node] = self.tensor(node, axes or "k")
        expr = expr.xreplace(swap)
        swap = {}
        for s in sorted(expr.free_symbols - states - {SCALE.symbol} - {t.symbol for t in self.tensors}, key=str):
            axes = self.table[s]
            if axes == "kv":
                return None
            if s in self.parameters and axes == "":
                if self.parameters[s] not in self.used:
                    self.used.append(self.parameters[s])
            else:
                swap[s] = self.tensor(s, axes or "k")
        return expr.xreplace(swap)


def ratio_plan(analysis: Analysis) -> RatioPlan | None:
    """The plan, or None where the class or a decay has no such form."""
    known, recurrence = analysis.classification, analysis.recurrence
    if known.letter != "c" or known.affine is None or known.readout is None or not known.affine:
        return None
    if any(s.axes != "kv" or s.decay_axes or s.log_decay is None or not s.writes for s in known.affine):
        return None
    build = _Builder(analysis)
    symbols = {s.name: s.symbol for s in recurrence.states}
    keys: list[sympy.Expr] = []
    values: list[sympy.Expr] = []
    groups: list[sympy.Expr] = []
    states = []
    for s in known.affine:
        writes = []
        for w in s.writes:
            key, value = build.factor(w.key, "k"), build.factor(w.value, "v")
            keys += [key] if key not in keys else []
            values += [value] if value not in values else []
            writes.append(RatioWrite(keys.index(key), values.index(value)))
        assert s.log_decay is not None
        groups += [s.log_decay] if s.log_decay not in groups else []
        states.append(RatioState(s.name, symbols[s.name], groups.index(s.log_decay), tuple(writes)))

    readout = known.readout
    later = readout.variance.free_symbols if readout.variance is not None else set()
    first = [r for r in readout.reads if r.symbol in readout.output.free_symbols]
    second = [r for r in readout.reads if r not in first and r.symbol in later]
    bodies = []
    for read in (*first, *second):
        body = build.body(read.body, set(symbols.values()))
        if body is None:
            return None
        bodies.append(body)
    output: sympy.Expr | None = readout.output
    variance = readout.variance
    factor = _factor(readout.output, first)
    if factor is not None and not (later & {r.symbol for r in first}):
        bodies[0], output = factor * bodies[0], None
    factor = _factor(variance, second) if variance is not None else None
    if factor is not None:
        bodies[len(first)] = factor * bodies[len(first)]
    decays = [t for t in (build.tensor(g, "") for g in groups)]
    return RatioPlan(
        tensors=tuple(t for t in build.tensors if t.axes),
        parameters=tuple(build.used),
        decays=tuple(next(t for t in build.tensors if t.symbol == d) for d in decays),
        keys=tuple(keys),
        values=tuple(values),
        states=tuple(states),
        reads=tuple(r.symbol for r in (*first, *second)),
        bodies=tuple(bodies),
        output_reads=len(first),
        output=output,
        variance=variance,
        direct_variance=factor is not None,
        exclusive=recurrence.read == "before",
    )


def _factor(expr: sympy.Expr | None, reads: list) -> sympy.Expr | None:
    """``expr / read`` where that is a constant: the kernel can apply it and store the result."""
    if expr is None or len(reads) != 1:
        return None
    factor = sympy.cancel(expr / reads[0].symbol)
    return factor if factor.free_symbols <= {SCALE.symbol} else None

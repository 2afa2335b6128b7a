"""Formulas of a token -> flat statements: parts on fewer axes than the whole get a name, and so does what comes twice."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from dspace.math.functions import Softplus, one_reciprocal
from dspace.math.ir import CONTRACTED, Axes, SumK, SumV, axes_of, drop_axis
from dspace.plan.statements import Assign, Store, Sum, Token

SIZES = {"k": sympy.Symbol("size k", positive=True), "v": sympy.Symbol("size v", positive=True)}
"""Channel counts as numbers of the formulas: the sum over an axis that a value does not have. No name of a spec has a
space, so that none can be taken for them."""

_NAME_FIRST = (Softplus, sympy.Heaviside, sympy.sign)
"""Functions whose printed form repeats its argument, which therefore gets a name."""

_PREFIX: dict[Axes, str] = {"": "c", "k": "row", "v": "col", "kv": "x"}


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

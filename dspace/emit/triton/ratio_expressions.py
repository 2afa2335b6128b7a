"""Expressions of class c's bodies as statements on tiles: one division each, few multiplications."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import sympy

from dspace.emit.printers import Reciprocal
from dspace.emit.triton.printer import TritonPrinter


class RatioPrinter(TritonPrinter):
    def call(self, function: type, args: tuple[sympy.Expr, ...]) -> tuple[str, int]:
        if function is Reciprocal:
            return f"_reciprocal({self(args[0])}, FAST)", 5
        return super().call(function, args)


def one_reciprocal(expr: sympy.Expr) -> sympy.Expr:
    """Negative powers as powers of one :class:`Reciprocal`, so that each division happens once."""

    def negative(e: sympy.Expr) -> bool:
        return e.is_Pow and e.exp.is_number and e.exp.is_negative

    def turn(e: sympy.Expr) -> sympy.Expr:
        return Reciprocal(e.base) ** (-e.exp) if e.exp.is_Integer else Reciprocal(e.base ** (-e.exp))

    return expr.replace(negative, turn)


def _products(exprs: list[sympy.Expr]) -> tuple[list[tuple[sympy.Symbol, sympy.Expr]], list[sympy.Expr]]:
    """Name the pair of factors that most products have in common, again and again.

    Products are the terms of the expressions. What is left multiplies each tile as seldom as a person would: a
    gradient becomes the product of another one and a factor. Of pairs as common as each other, one that is a term
    itself costs nothing; adjoints of states stand first, and what comes later is added up, where a product is free.
    """
    terms = [[_Product(t) for t in sympy.Add.make_args(e)] for e in exprs]
    every = [t for row in terms for t in row]
    named: list[tuple[sympy.Symbol, sympy.Expr]] = []
    while True:
        seen = Counter(p for t in every for p in t.pairs())
        term = {p: i for i, t in reversed([*enumerate(every)]) if len(t.factors) == 2 for p in t.pairs()}
        order = {p: (-times, term.get(p, len(every)), str(p)) for p, times in seen.items()}
        pair, times = min(seen.items(), key=lambda x: order[x[0]], default=(None, 0))
        if pair is None or times < 2:
            break
        symbol = sympy.Symbol(f"p{len(named)}", real=True)
        named.append((symbol, pair[0] * pair[1]))
        for t in every:
            t.replace(pair, symbol)
    return named, [sympy.Add(*(t.expr() for t in row), evaluate=len(row) > 1) for row in terms]


class _Product:
    """A coefficient and factors, integer powers written out."""

    def __init__(self, term: sympy.Expr) -> None:
        self.coefficient, rest = term.as_coeff_Mul()
        self.factors: list[sympy.Expr] = []
        for f in sympy.Mul.make_args(rest):
            power = f.is_Pow and f.exp.is_Integer and 2 <= f.exp <= 8
            self.factors += [f.base] * int(f.exp) if power else [f] * (f != 1)

    def pairs(self) -> set[tuple[sympy.Expr, sympy.Expr]]:
        ordered = sorted(self.factors, key=str)
        return {(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]}

    def replace(self, pair: tuple[sympy.Expr, sympy.Expr], symbol: sympy.Symbol) -> None:
        if pair in self.pairs():
            for f in pair:
                self.factors.remove(f)
            self.factors.append(symbol)

    def expr(self) -> sympy.Expr:
        return sympy.Mul(self.coefficient, *self.factors)


def statements(exprs: Mapping[str, sympy.Expr], names: Mapping[str, str], indent: int) -> list[str]:
    """Assignments ``name = expr``, with common subexpressions named first."""
    pad = " " * indent
    show = RatioPrinter(names)
    named, rest = _products([one_reciprocal(e) for e in exprs.values()])
    numbered = (sympy.Symbol(f"c{i}", real=True) for i in range(10**6))
    shared, results = sympy.cse([*(e for _, e in named), *rest], symbols=numbered, optimizations=[])
    values = dict(shared) | dict(zip([s for s, _ in named], results, strict=False))
    lines: list[str] = []
    done: set[sympy.Symbol] = set()

    def define(expr: sympy.Expr) -> None:
        for s in sorted(expr.free_symbols, key=str):
            if s in values and s not in done:
                done.add(s)
                define(values[s])
                lines.append(f"{pad}{s.name} = {show(values[s])}")

    for name, value in zip(exprs, results[len(named) :], strict=True):
        define(value)
        lines.append(f"{pad}{name} = {show(value)}")
    return lines

"""Source text for Triton sections: expressions, and resolution of conditional lines."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from dspace.emit.printers import MUL, Printer
from dspace.errors import CompilerBug
from dspace.math.functions import Sigmoid, Softplus


class TritonPrinter(Printer):
    """Elementwise Triton on float32 tiles. Functions of which several copies are printed expect names as arguments."""

    functions = {
        sympy.exp: "tl.exp({})",
        sympy.log: "tl.log({})",
        sympy.sqrt: "tl.sqrt({})",
        sympy.tanh: "(2.0 * tl.sigmoid(2.0 * ({})) - 1.0)",
        sympy.Abs: "tl.abs({})",
        sympy.sign: "(tl.where({0} > 0, 1.0, 0.0) - tl.where({0} < 0, 1.0, 0.0))",
        sympy.Heaviside: "(tl.where({0} > 0, 0.5, 0.0) + tl.where({0} >= 0, 0.5, 0.0))",
        Sigmoid: "tl.sigmoid({})",
        Softplus: "(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))",
    }

    def number(self, value: sympy.Expr) -> tuple[str, int]:
        return super().number(sympy.Float(value))

    def mul(self, expr: sympy.Expr) -> tuple[str, int]:
        # Triton's minus subtracts from 0, an instruction of its own; a product with -1 becomes part of its neighbours.
        if expr.as_coeff_Mul()[0] == -1:
            return f"-1.0 * {self.at(-expr, MUL)}", MUL
        return super().mul(expr)

    def power(self, base: sympy.Expr, exponent: sympy.Expr) -> tuple[str, int]:
        if exponent.is_Integer and 2 <= exponent <= 8:
            return " * ".join([self.at(base, 5)] * int(exponent)), MUL
        if exponent == sympy.Rational(1, 2) or exponent.is_number and exponent.is_negative:
            return super().power(base, exponent)
        if exponent.is_Integer:  # the logarithm of a negative base is nan
            magnitude = f"tl.exp({exponent - exponent % 2} * tl.log(tl.abs({self(base)})))"
            return (f"{self.at(base, 5)} * {magnitude}", MUL) if exponent % 2 else (magnitude, 5)
        return f"tl.exp({self.at(exponent, MUL)} * tl.log({self(base)}))", 5

    def call(self, function: type, args: tuple[sympy.Expr, ...]) -> tuple[str, int]:
        if function in (sympy.Max, sympy.Min):
            name = "tl.maximum" if function is sympy.Max else "tl.minimum"
            ordered = sorted(args, key=sympy.default_sort_key)
            text = self(ordered[0])
            for other in ordered[1:]:
                text = f"{name}({text}, {self(other)})"
            return text, 5
        return super().call(function, args)


def specialise(text: str, flags: Mapping[str, bool]) -> str:
    """Keep the lines of ``text`` whose ``#if FLAG`` / ``#else`` / ``#endif`` conditions hold under ``flags``.

    >>> specialise("a\\n#if x\\nb\\n#else\\nc\\n#endif\\n", {"x": False})
    'a\\nc\\n'
    """
    kept: list[str] = []
    stack: list[bool] = []
    for line in text.splitlines(keepends=True):
        word, _, flag = line.strip().partition(" ")
        if word == "#if":
            if flag not in flags:
                raise CompilerBug(f"unknown flag {flag!r} in a kernel text")
            stack.append(flags[flag])
        elif word == "#else":
            stack[-1] = not stack[-1]
        elif word == "#endif":
            stack.pop()
        elif all(stack):
            kept.append(line)
    if stack:
        raise CompilerBug("a kernel text has an #if without #endif")
    return "".join(kept)


def inverses_of(exprs: Mapping[str, sympy.Expr]) -> tuple[dict[str, sympy.Expr], dict[str, sympy.Expr]]:
    """``exprs`` with factors in place of divisions, and what they are the reciprocals of: one division for all."""
    found: dict[sympy.Expr, sympy.Symbol] = {}

    def inverse(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
        symbol = found.setdefault(base, sympy.Symbol(f"inverse_{len(found)}", real=True))
        return symbol**-exponent

    def divides(e: sympy.Expr) -> bool:
        return e.is_Pow and e.exp.is_Integer and e.exp.is_negative

    changed = {n: e.replace(divides, lambda e: inverse(e.base, e.exp)) for n, e in exprs.items()}
    return changed, {symbol.name: base for base, symbol in found.items()}

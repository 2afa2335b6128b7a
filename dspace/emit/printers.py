"""SymPy expressions to source text: one base printer, one subclass per dialect."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from dspace.errors import CompilerBug
from dspace.math.functions import Reciprocal, Sigmoid, Softplus
from dspace.math.ir import Axes, SumK, SumV, axes_of

ADD, MUL, UNARY, POWER, ATOM = range(1, 6)
"""Binding strength of what was printed; a weaker operand gets parentheses."""


class Printer:
    """Prints an expression; subclasses say how numbers, functions and contractions look.

    ``names`` maps a symbol's name to its text (itself by default).
    """

    functions: Mapping[type, str] = {}

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names = dict(names or {})

    def __call__(self, expr: sympy.Expr) -> str:
        return self.show(sympy.sympify(expr))[0]

    def at(self, expr: sympy.Expr, strength: int) -> str:
        """Text of ``expr``, in parentheses where it binds more weakly than ``strength``."""
        text, own = self.show(expr)
        return text if own >= strength else f"({text})"

    def show(self, expr: sympy.Expr) -> tuple[str, int]:
        if expr.is_Symbol:
            return self.names.get(expr.name, expr.name), ATOM
        if expr.is_number and not expr.atoms(SumK, SumV):  # exp(-0.1) too: no dialect has it of a plain number
            return self.number(expr)
        if expr.is_Add:
            return self.add(expr), ADD
        if expr.is_Mul:
            return self.mul(expr)
        if expr.is_Pow:
            return self.power(expr.base, expr.exp)
        if isinstance(expr, sympy.exp):
            return self.call(sympy.exp, expr.args)
        return self.call(type(expr), expr.args)

    def number(self, value: sympy.Expr) -> tuple[str, int]:
        text = str(int(value)) if value.is_Integer else repr(float(value))
        return text, UNARY if text.startswith("-") else ATOM

    def add(self, expr: sympy.Expr) -> str:
        # Positive terms first: ``a - b`` rather than ``-b + a``.
        terms = sorted(expr.as_ordered_terms(), key=lambda t: t.could_extract_minus_sign())
        text = self.at(terms[0], ADD)
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            text += f" - {self.at(-term, MUL)}" if minus else f" + {self.at(term, ADD)}"
        return text

    def mul(self, expr: sympy.Expr) -> tuple[str, int]:
        coefficient, rest = expr.as_coeff_Mul()
        if coefficient.is_negative:
            return f"-{self.at(-expr, MUL)}", UNARY
        factors = self.ordered(rest)
        above = [f for f in factors if not self.below(f)]
        under = [1 / f for f in factors if self.below(f)]
        if coefficient != 1:
            above.insert(0, coefficient)
        text = " * ".join(self.at(f, MUL) for f in above) if above else self.number(sympy.Integer(1))[0]
        if under:
            bottom = sympy.Mul(*under)
            text += f" / {self.at(bottom, POWER)}"
        return text, MUL

    def ordered(self, product: sympy.Expr) -> list[sympy.Expr]:
        """Factors in the order in which they are multiplied."""
        return list(product.as_ordered_factors())

    def below(self, factor: sympy.Expr) -> bool:
        return factor.is_Pow and factor.exp.is_number and factor.exp.is_negative

    def power(self, base: sympy.Expr, exponent: sympy.Expr) -> tuple[str, int]:
        if exponent == sympy.Rational(1, 2):
            return self.call(sympy.sqrt, (base,))
        if exponent.is_number and exponent.is_negative:
            return f"{self.number(sympy.Integer(1))[0]} / {self.at(base**-exponent, POWER)}", MUL
        return f"{self.at(base, ATOM)} ** {self.at(exponent, ATOM)}", POWER

    def call(self, function: type, args: tuple[sympy.Expr, ...]) -> tuple[str, int]:
        if function is Reciprocal:
            return f"{self.number(sympy.Integer(1))[0]} / {self.at(args[0], POWER)}", MUL
        pattern = self.functions.get(function)
        if pattern is None:
            raise CompilerBug(f"{type(self).__name__} cannot print {function.__name__}: no case for this function")
        return pattern.format(*(self(a) for a in args)), ATOM


class TorchPrinter(Printer):
    """PyTorch on tensors aligned to ``[..., K, V]`` (size 1 where an axis is absent)."""

    functions = {
        sympy.exp: "torch.exp({})",
        sympy.log: "torch.log({})",
        sympy.sqrt: "torch.sqrt({})",
        sympy.tanh: "torch.tanh({})",
        sympy.Abs: "torch.abs({})",
        sympy.sign: "torch.sign({})",
        Sigmoid: "torch.sigmoid({})",
        Softplus: "_softplus({})",
    }

    def __init__(self, names: Mapping[str, str] | None, axes: Mapping[sympy.Symbol, Axes]) -> None:
        super().__init__(names)
        self.axes = axes

    def call(self, function: type, args: tuple[sympy.Expr, ...]) -> tuple[str, int]:
        if function in (SumK, SumV):
            axis, dim, size = ("k", -2, "size_k") if function is SumK else ("v", -1, "size_v")
            if axis not in axes_of(args[0], self.axes):
                return f"{size} * {self.at(args[0], MUL)}", MUL
            return f"({self(args[0])}).sum({dim}, keepdim=True)", ATOM
        if function in (sympy.Max, sympy.Min):
            name = "torch.maximum" if function is sympy.Max else "torch.minimum"
            tensors = sorted((a for a in args if not a.is_number), key=sympy.default_sort_key)
            text = self(tensors[0])
            for other in tensors[1:]:
                text = f"{name}({text}, {self(other)})"
            for value in (a for a in args if a.is_number):
                text = f"{name}({text}, torch.full_like({self(tensors[0])}, {float(value)!r}))"
            return text, ATOM
        if function is sympy.Heaviside:
            return f"(0.5 * (torch.sign({self(args[0])}) + 1))", ATOM
        return super().call(function, args)


class NumbaPrinter(Printer):
    """Scalar Python for numba; every literal is made ``real`` (float32 or float64), else numba widens.

    Arguments of ``Heaviside``, ``sign``, ``Softplus`` and bases of integer powers are printed several times:
    the scheduler gives each of them a name first.
    """

    functions = {
        sympy.exp: "math.exp({})",
        sympy.log: "math.log({})",
        sympy.sqrt: "math.sqrt({})",
        sympy.tanh: "math.tanh({})",
        sympy.Abs: "abs({})",
        sympy.sign: "((one if {0} > zero else zero) - (one if {0} < zero else zero))",
        sympy.Heaviside: "(one if {0} > zero else (real(0.5) if {0} == zero else zero))",
        Sigmoid: "(one / (one + math.exp(-({}))))",
        Softplus: "(max({0}, zero) + math.log1p(math.exp(-abs({0}))))",
    }

    def number(self, value: sympy.Expr) -> tuple[str, int]:
        if value == 1:
            return "one", ATOM
        if value == 0:
            return "zero", ATOM
        return f"real({super().number(value)[0]})", ATOM

    def power(self, base: sympy.Expr, exponent: sympy.Expr) -> tuple[str, int]:
        if exponent.is_Integer and 2 <= exponent <= 8:
            return " * ".join([self.at(base, ATOM)] * int(exponent)), MUL
        return super().power(base, exponent)

    def call(self, function: type, args: tuple[sympy.Expr, ...]) -> tuple[str, int]:
        if function in (sympy.Max, sympy.Min):
            name = "max" if function is sympy.Max else "min"
            ordered = sorted(args, key=sympy.default_sort_key)
            text = self(ordered[0])
            for other in ordered[1:]:
                text = f"{name}({text}, {self(other)})"
            return text, ATOM
        return super().call(function, args)

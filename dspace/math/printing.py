"""Formulas for people: one line of plain text, or LaTeX."""

from __future__ import annotations

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.str import StrPrinter

from dspace.math.ir import Axes

_GREEK = {"alpha", "beta", "gamma", "delta", "eta", "theta", "kappa", "lam", "mu", "nu", "rho", "sigma", "tau", "phi"}


class _Text(StrPrinter):
    """``Σₖ``, ``·`` and superscripts for small whole powers."""

    _DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

    def _print_Mul(self, expr: sympy.Expr) -> str:
        return super()._print_Mul(expr).replace("*", "·")

    def _print_Pow(self, expr: sympy.Expr, rational: bool = False) -> str:
        if expr.exp.is_Integer and expr.exp > 1:
            return self.parenthesize(expr.base, 60) + str(expr.exp).translate(self._DIGITS)
        return super()._print_Pow(expr, rational).replace("**", "^")

    def _print_SumK(self, expr: sympy.Expr) -> str:
        return f"Σₖ({self._print(expr.args[0])})"

    def _print_SumV(self, expr: sympy.Expr) -> str:
        return f"Σᵥ({self._print(expr.args[0])})"

    def _print_Sigmoid(self, expr: sympy.Expr) -> str:
        return f"sigmoid({self._print(expr.args[0])})"

    def _print_Softplus(self, expr: sympy.Expr) -> str:
        return f"softplus({self._print(expr.args[0])})"

    def _print_Abs(self, expr: sympy.Expr) -> str:
        return f"|{self._print(expr.args[0])}|"


class _Latex(LatexPrinter):
    def _sum(self, expr: sympy.Expr, axis: str) -> str:
        body = expr.args[0]
        inner = self._print(body)
        return rf"\sum_{{{axis}}} " + (rf"\left({inner}\right)" if body.is_Add else inner)

    def _print_SumK(self, expr: sympy.Expr, exp: str | None = None) -> str:
        text = self._sum(expr, "k")
        return rf"\left({text}\right)" + (rf"^{{{exp}}}" if exp is not None else "")

    def _print_SumV(self, expr: sympy.Expr, exp: str | None = None) -> str:
        text = self._sum(expr, "v")
        return rf"\left({text}\right)" + (rf"^{{{exp}}}" if exp is not None else "")

    def _print_Sigmoid(self, expr: sympy.Expr, exp: str | None = None) -> str:
        return rf"\sigma\left({self._print(expr.args[0])}\right)" + (rf"^{{{exp}}}" if exp is not None else "")

    def _print_Softplus(self, expr: sympy.Expr, exp: str | None = None) -> str:
        name = r"\operatorname{softplus}"
        return name + (rf"^{{{exp}}}" if exp is not None else "") + rf"\left({self._print(expr.args[0])}\right)"

    def _print_Symbol(self, expr: sympy.Symbol, style: str = "plain") -> str:
        return latex_name(expr.name)


def latex_name(name: str) -> str:
    """A symbol's name in LaTeX: Greek where it is spelled so, ``bar`` as an overline, the rest as a subscript."""
    if "@" in name:  # a value at a token, as show.py spells it
        base, _, when = name.partition("@")
        return f"{latex_name(base)}_{{{when}}}" if "_" not in base else f"({latex_name(base)})_{{{when}}}"
    if name == "lam":
        return r"\lambda"
    if name in _GREEK:
        return "\\" + name
    if name == "Ibar":
        return r"\bar I"
    if name.endswith("_bar"):
        return rf"\overline{{{latex_name(name.removesuffix('_bar'))}}}"
    if name.endswith("_new"):
        return latex_name(name.removesuffix("_new")) + "^{+}"
    if name.startswith("d_") and len(name) > 2:
        return rf"\mathrm{{d}}{latex_name(name[2:])}"
    head, _, tail = name.partition("_")
    first = head if len(head) == 1 else rf"\mathrm{{{head}}}"
    rest = tail.replace("_", r"\_")
    return first + (rf"_{{\mathrm{{{rest}}}}}" if rest else "")


def text_of(expr: sympy.Expr) -> str:
    """``expr`` as one line of plain text."""
    return _Text().doprint(expr)


def latex_of(expr: sympy.Expr) -> str:
    """``expr`` in LaTeX."""
    return _Latex().doprint(expr)


def axes_text(axes: Axes) -> str:
    """``"kv"`` as ``[k,v]``; nothing for one number per head."""
    return f"[{','.join(axes)}]" if axes else ""

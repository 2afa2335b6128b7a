"""SymPy expression -> text of the formula language (what a transform writes)."""

from __future__ import annotations

import sympy
from sympy.printing.str import StrPrinter

from dspace.math.functions import FUNCTIONS
from dspace.math.ir import SumK, SumV

_SPELLING = {
    SumK: "sum_k",
    SumV: "sum_v",
    sympy.Abs: "abs",
    **{f: name for name, f in FUNCTIONS.items() if isinstance(f, type)},
}


class _Printer(StrPrinter):
    def _print_Function(self, expr):
        return f"{_SPELLING[type(expr)]}({', '.join(self._print(a) for a in expr.args)})"

    def _print_extremum(self, expr):
        # SymPy joins nested ones; the language knows two arguments only. Sorted, so that the text is the same every time.
        first, *rest = sorted((self._print(a) for a in expr.args), key=str)
        for other in rest:
            first = f"{_SPELLING[type(expr)]}({first}, {other})"
        return first

    _print_Abs = _print_Function
    _print_Min = _print_Max = _print_extremum

    def _print_log(self, expr):
        return f"log({self._print(expr.args[0])})"

    def _print_Exp1(self, expr):
        return "exp(1)"


def formula(expr: sympy.Expr) -> str:
    """Text that parses back to ``expr`` (up to the assumptions of its symbols)."""
    return _Printer({"order": "none"}).doprint(expr)


def signature(expr: sympy.Basic) -> str:
    """Text of the tree of ``expr`` that is the same in every process and at any time.

    SymPy hands out a cached expression for any equal one, whose symbols may have been declared in other words
    (``real=True, positive=True`` equals ``positive=True``), so ``srepr`` depends on what ran before. Here a
    symbol is its name, and the arguments of sums, products and extrema are sorted as text.
    """
    if not expr.args:
        return str(expr)
    args = [signature(a) for a in expr.args]
    if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Min, sympy.Max)):
        args.sort()
    return f"{type(expr).__name__}({', '.join(args)})"

"""Elementwise functions of the formula language that SymPy lacks, with derivatives and signs.

They stay single nodes, so that printers can choose a stable form (``softplus(x)`` rather than
``log(1 + exp(x))``), and they know what simplification needs: sign, derivative, and the identities
``sigmoid(-x) = 1 - sigmoid(x)`` and ``log(sigmoid(x)) = -softplus(-x)``.
"""

from __future__ import annotations

import sympy


class Sigmoid(sympy.Function):
    """``1 / (1 + exp(-x))``, in (0, 1)."""

    nargs = 1
    is_real = True
    is_positive = True
    is_finite = True

    @classmethod
    def eval(cls, x):
        if x.is_zero:
            return sympy.Rational(1, 2)
        return None

    def fdiff(self, argindex=1):
        x = self.args[0]
        return Sigmoid(x) * Sigmoid(-x)

    def _eval_rewrite_as_exp(self, x, **kwargs):
        return 1 / (1 + sympy.exp(-x))

    def _eval_rewrite_as_Tanh(self, x, **kwargs):
        return (1 + sympy.tanh(x / 2)) / 2

    def _eval_evalf(self, prec):
        return self.rewrite(sympy.exp)._eval_evalf(prec)


class Softplus(sympy.Function):
    """``log(1 + exp(x))``, positive."""

    nargs = 1
    is_real = True
    is_positive = True

    @classmethod
    def eval(cls, x):
        if x.is_zero:
            return sympy.log(2)
        return None

    def fdiff(self, argindex=1):
        return Sigmoid(self.args[0])

    def _eval_rewrite_as_log(self, x, **kwargs):
        return sympy.log(1 + sympy.exp(x))

    def _eval_rewrite_as_exp(self, x, **kwargs):
        return sympy.log(1 + sympy.exp(x))

    def _eval_evalf(self, prec):
        return self.rewrite(sympy.log)._eval_evalf(prec)


class Reciprocal(sympy.Function):
    """``1 / x`` kept as one node, so that it is computed once however often it is used."""

    nargs = 1
    is_real = True


def one_reciprocal(expr: sympy.Expr) -> sympy.Expr:
    """Negative powers as powers of :class:`Reciprocal`, so that each division happens once."""

    def negative(e: sympy.Expr) -> bool:
        return e.is_Pow and e.exp.is_number and e.exp.is_negative

    def turn(e: sympy.Expr) -> sympy.Expr:
        return Reciprocal(e.base) ** (-e.exp) if e.exp.is_Integer else Reciprocal(e.base ** (-e.exp))

    return expr.replace(negative, turn)


def logarithm(x: sympy.Expr) -> sympy.Expr:
    """``log(x)`` in its stable form: ``log(exp(x)) = x``, ``log(sigmoid(x)) = -softplus(-x)``."""
    if isinstance(x, Sigmoid):
        return -Softplus(-x.args[0])
    if isinstance(x, sympy.exp):
        return x.args[0]
    return sympy.log(x)


FUNCTIONS = {
    "exp": sympy.exp,
    "log": logarithm,
    "sqrt": sympy.sqrt,
    "sigmoid": Sigmoid,
    "softplus": Softplus,
    "tanh": sympy.tanh,
    "abs": sympy.Abs,
    "minimum": sympy.Min,
    "maximum": sympy.Max,
}
"""Elementwise functions by their spelling in a spec; contractions are in :mod:`dspace.math.ir`."""

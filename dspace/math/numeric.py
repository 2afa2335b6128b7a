"""Expressions evaluated on NumPy arrays, quickly and many at once: used to refute, never to prove.

A value has trailing dimensions ``[K or 1, V or 1]``; leading dimensions broadcast, so that one evaluation covers a
whole grid of alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np
import sympy

from dspace.errors import CompilerBug
from dspace.math.functions import Sigmoid, Softplus
from dspace.math.ir import DOMAINS, State, SumK, SumV, Variable

SIZES = {"k": 3, "v": 2}
"""Sizes of the axes at which identities are tried."""
POSITION = {"k": -2, "v": -1}

Values = Mapping[sympy.Symbol, np.ndarray]


def evaluate(expr: sympy.Expr, values: Values) -> np.ndarray:
    """``expr`` at ``values``; every symbol must be given."""
    memory: dict[sympy.Expr, np.ndarray] = {}

    def visit(e: sympy.Expr) -> np.ndarray:
        if e.is_Symbol:
            return values[e]
        if not e.args:
            return np.asarray(float(e)).reshape(1, 1)
        if e not in memory:
            memory[e] = _apply(e, [visit(a) for a in e.args])
        return memory[e]

    with np.errstate(all="ignore"):
        return visit(expr)


def _apply(e: sympy.Expr, args: list[np.ndarray]) -> np.ndarray:
    if e.is_Add:
        return reduce(np.add, args)
    if e.is_Mul:
        return reduce(np.multiply, args)
    if e.is_Pow:
        exponent = e.exp
        return args[0] ** (int(exponent) if exponent.is_Integer else args[1])
    if isinstance(e, (SumK, SumV)):
        axis = "k" if isinstance(e, SumK) else "v"
        if args[0].shape[POSITION[axis]] == 1:
            return args[0] * SIZES[axis]
        return args[0].sum(POSITION[axis], keepdims=True)
    for kind, function in _FUNCTIONS.items():
        if isinstance(e, kind):
            return function(*args)
    raise CompilerBug(f"numeric: no rule for {type(e).__name__}")


_FUNCTIONS: dict[type, Callable[..., np.ndarray]] = {
    sympy.exp: np.exp,
    sympy.log: np.log,
    sympy.tanh: np.tanh,
    sympy.Abs: np.abs,
    sympy.sign: np.sign,
    Sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    Softplus: lambda x: np.logaddexp(x, 0.0),
    sympy.Max: lambda *xs: reduce(np.maximum, xs),
    sympy.Min: lambda *xs: reduce(np.minimum, xs),
}


def draw(variable: Variable | State, rng: np.random.Generator) -> np.ndarray:
    """A random value of ``variable`` in its domain."""
    shape = [SIZES[a] if a in variable.axes else 1 for a in "kv"]
    x = rng.normal(size=shape)
    domain = DOMAINS[variable.domain]
    if (domain.low, domain.high) == (0, 1):
        return 1 / (1 + np.exp(-x))
    if domain.low >= 0:
        return np.abs(x) + 0.2
    if domain.high <= 0:
        return -np.abs(x) - 0.2
    return x


def full(value: np.ndarray, axes: str) -> np.ndarray:
    """``value`` expanded to its whole size on ``axes``."""
    return np.broadcast_to(value, [SIZES[a] if a in axes else 1 for a in "kv"])

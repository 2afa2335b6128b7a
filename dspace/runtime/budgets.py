"""How far a kernel may be from the float64 oracle: relative RMS error by dtype and kind of quantity."""

from __future__ import annotations

from typing import Literal

import sympy

from dspace.math.ir import DOMAINS, Recurrence

Kind = Literal["output", "gradient", "gate gradient"]
"""``output`` covers o, variance and final states; gates are the inputs and parameters that decide what a state keeps."""

MATMUL_CLASSES = ("a", "b", "fold")
"""Classes whose chunkwise form multiplies matrices, in float32 through tf32x3 on a GPU."""

BUDGETS: dict[str, dict[Kind, float]] = {
    "float64": {"output": 1e-9, "gradient": 1e-9, "gate gradient": 1e-9},
    "float32": {"output": 1e-5, "gradient": 1e-5, "gate gradient": 3e-5},
    "float32 matmul": {"output": 1e-4, "gradient": 1e-4, "gate gradient": 3e-4},
    "float16": {"output": 2e-3, "gradient": 4e-3, "gate gradient": 1e-2},
    "bfloat16": {"output": 5e-3, "gradient": 8e-3, "gate gradient": 2e-2},
}
"""Relative RMS errors that are accepted (DESIGN.md section 6)."""

ABSOLUTE = 1e-6
"""A quantity whose largest deviation is below this is right whatever its relative error."""

ROUNDING = 4.0
"""A kernel may also err this many times as much as the recurrence itself does when it is merely evaluated in float32,
token by token: no kernel can be asked for digits that the problem does not have."""

FEW = 16
"""A 16-bit quantity of so few vectors (tensors without their last axis) may err ROUNDING times as much as the recurrence
from inputs that are rounded once more: few rounding errors do not average, and a few sums may all nearly cancel."""

ORDINARY = 0.6
"""What the recurrence errs so where nothing cancels, in units of the last digit (products of three rounded numbers:
0.5). Quantities of many vectors have their budgets, times as much as they are worse than that."""

MOST = 0.25
"""But no rounding to 16 bits excuses more than this."""


def excused(rounded: float, accepted: float, few: bool, digit: float) -> float:
    """What rounding of operands excuses of a 16-bit quantity, as relative error.

    ``rounded`` is how far the recurrence errs from inputs that are rounded once more, ``accepted`` the budget, ``few``
    whether the quantity has no more than FEW vectors, ``digit`` the last one of its type.
    """
    return min(ROUNDING * rounded if few else accepted * rounded / (ORDINARY * digit), MOST)


SAMPLES = 3
"""So many more times the recurrence is evaluated for that, from arguments that differ in their last digit."""


def budget(dtype: str, kind: Kind, form: str, letter: str) -> float:
    """The accepted relative RMS error of a quantity of ``form`` ("chunk", "recurrent", ...) in class ``letter``."""
    matmul = dtype == "float32" and form == "chunk" and letter in MATMUL_CLASSES
    return BUDGETS["float32 matmul" if matmul else dtype][kind]


def gates(recurrence: Recurrence, parameters: bool = False) -> frozenset[str]:
    """Names of the inputs on which the share of a state that survives a token depends, signed domains only.

    With those ``parameters`` on which it depends, if asked: their gradients are sums of gates' gradients.
    """
    found: set[sympy.Symbol] = set()
    for state in recurrence.states:
        for other in recurrence.states:
            if state.update.has(other.symbol):
                found |= _coefficient(state.update, other.symbol).free_symbols
    return frozenset(
        v.name
        for v in (*recurrence.inputs, *(recurrence.parameters if parameters else ()))
        if v.symbol in found and v.domain != "real" and DOMAINS[v.domain]
    )


def _coefficient(expr: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """The derivative of ``expr`` by a state, contractions looked through: what multiplies the state."""
    from dspace.math.ir import SumK, SumV

    opened = expr.replace(lambda e: isinstance(e, (SumK, SumV)), lambda e: e.args[0])
    return sympy.diff(opened, symbol)

"""A small interpreter: a SymPy expression over named axes, evaluated on torch tensors.

It shares no code with the printers on purpose: the oracle must not inherit their mistakes.
Every value is a tensor ``[..., K or 1, V or 1]``: an axis that an expression does not carry has size 1, so that
NumPy's broadcasting is the broadcasting over named axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, mul
from typing import TYPE_CHECKING

import sympy
import torch

from dspace.errors import CompilerBug
from dspace.math.ir import SumK, SumV

if TYPE_CHECKING:
    from torch import Tensor

AXIS_POSITION = {"k": -2, "v": -1}
"""Where each named axis lies in a value of the interpreter."""


def place(tensor: Tensor, axes: str) -> Tensor:
    """Give ``tensor [..., *axes]`` a size-1 dimension for each axis that it lacks: ``[..., K or 1, V or 1]``."""
    if "k" not in axes:
        tensor = tensor.unsqueeze(-1 if "v" not in axes else -2)
    if "v" not in axes:
        tensor = tensor.unsqueeze(-1)
    return tensor


def unplace(value: Tensor, axes: str, sizes: Mapping[str, int]) -> Tensor:
    """Inverse of :func:`place`; an axis in ``axes`` on which ``value`` is constant is expanded to its size."""
    shape = [*value.shape[:-2], *(sizes[a] if a in axes else 1 for a in "kv")]
    value = value.expand(shape)
    if "v" not in axes:
        value = value.squeeze(-1)
    if "k" not in axes:
        value = value.squeeze(-1 if "v" not in axes else -2)
    return value


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Abs": torch.abs,
    "sign": torch.sign,
    "Max": lambda *xs: reduce(torch.maximum, torch.broadcast_tensors(*xs)),
    "Min": lambda *xs: reduce(torch.minimum, torch.broadcast_tensors(*xs)),
    "Add": lambda *xs: reduce(add, xs),
    "Mul": lambda *xs: reduce(mul, xs),
}


@dataclass(frozen=True)
class _Step:
    """One operation of a tape: ``values[i] = apply(*values[arguments])``."""

    apply: Callable[..., Tensor]
    arguments: tuple[int, ...]


class Tape:
    """Several expressions, each common sub-expression evaluated once.

    Args:
        expressions: what to evaluate; only symbols that are given to :meth:`run` may occur.
        sizes: sizes of the axes, ``{"k": K, "v": V}``: a sum over an axis that its body does not carry counts it.
    """

    def __init__(self, expressions: Sequence[sympy.Expr], sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)
        self._index: dict[sympy.Expr, int] = {}
        self._leaves: list[tuple[int, str]] = []
        self._numbers: list[tuple[int, float]] = []
        self._steps: list[tuple[int, _Step]] = []
        self._results = [self._visit(sympy.sympify(e)) for e in expressions]

    def run(self, values: Mapping[str, Tensor], like: Tensor) -> list[Tensor]:
        """Values of the expressions, given those of their symbols by name (two symbols that differ in their
        assumptions alone are one). ``like`` gives dtype and device of the numbers."""
        memory: dict[int, Tensor] = {i: values[name] for i, name in self._leaves}
        for i, number in self._numbers:
            memory[i] = torch.full((1, 1), number, dtype=like.dtype, device=like.device)
        for i, step in self._steps:
            memory[i] = step.apply(*(memory[a] for a in step.arguments))
        return [memory[i] for i in self._results]

    def _visit(self, node: sympy.Expr) -> int:
        known = self._index.get(node)
        if known is not None:
            return known
        if node.is_Symbol:
            entry = self._new(node)
            self._leaves.append((entry, node.name))
        elif node.is_number and not node.args:
            entry = self._new(node)
            self._numbers.append((entry, float(node)))
        else:
            step = self._operation(node)
            entry = self._new(node)
            self._steps.append((entry, step))
        return entry

    def _new(self, node: sympy.Expr) -> int:
        self._index[node] = len(self._index)
        return self._index[node]

    def _operation(self, node: sympy.Expr) -> _Step:
        if isinstance(node, (SumK, SumV)):
            axis = "k" if isinstance(node, SumK) else "v"
            return _Step(self._sum(axis), (self._visit(node.args[0]),))
        if isinstance(node, sympy.Pow):
            base, exponent = node.args
            if exponent.is_number:
                value = int(exponent) if exponent.is_Integer else float(exponent)
                return _Step(_fixed_power(value), (self._visit(base),))
            return _Step(_power, (self._visit(base), self._visit(exponent)))
        name = type(node).__name__
        if name not in _FUNCTIONS:
            raise CompilerBug(
                f"the oracle does not know the function {name!r} in {node}; report the spec that led here"
            )
        return _Step(_FUNCTIONS[name], tuple(self._visit(a) for a in node.args))

    def _sum(self, axis: str) -> Callable[[Tensor], Tensor]:
        position, size = AXIS_POSITION[axis], self._sizes[axis]

        def total(value: Tensor) -> Tensor:
            if value.shape[position] == 1 and size != 1:
                return value * size
            return value.sum(position, keepdim=True)

        return total


def _fixed_power(exponent: int | float) -> Callable[[Tensor], Tensor]:
    if exponent == -1:
        return torch.reciprocal
    if exponent == 0.5:
        return torch.sqrt
    return lambda base: torch.pow(base, exponent)

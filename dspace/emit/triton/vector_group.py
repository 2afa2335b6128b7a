"""What the kernels of vector states are made from: states on one axis, and the features that are computed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dspace.math.ir import AffineState, Axes, Variable


@dataclass(frozen=True)
class VectorGroup:
    """States on the same axis, and the features on that axis that are computed with them.

    ``raw`` states are also stored themselves, for expressions outside the kernel. ``through`` are inputs that are
    used elsewhere too: their other gradient is added in the kernel.
    """

    axes: Axes
    states: tuple[AffineState, ...]
    symbols: Mapping[str, sympy.Symbol]
    inputs: tuple[Variable, ...]
    parameters: tuple[Variable, ...]
    features: Mapping[str, sympy.Expr]
    through: tuple[Variable, ...] = ()

    @property
    def tag(self) -> str:
        return self.axes or "scalar"

    @property
    def products(self) -> bool:
        """Whether every decay is one number per token, written as its logarithm: then states are products."""
        return bool(self.axes) and all(
            s.decay_axes == "" and s.log_decay is not None and not s.log_decay.atoms(sympy.log) for s in self.states
        )

    def wide(self, variable: Variable) -> bool:
        return bool(variable.axes and self.axes)

    def write(self, state: AffineState) -> sympy.Expr:
        return sympy.Add(*(w.key * w.value for w in state.writes))

    def log_decay(self, state: AffineState) -> sympy.Expr:
        """Of a group of products."""
        assert state.log_decay is not None
        return state.log_decay


@dataclass(frozen=True)
class Fold:
    """A group whose states only divide the query of a matrix state: then no kernel of its own walks over them."""

    group: VectorGroup
    query: sympy.Expr
    decay: str
    """Of the matrix state: "none" or "scalar"."""
    key: Variable | None
    """The input that is the key as it is, so that the key's gradient is part of that input's."""
    retention: Variable | None
    """The input that is the log decay of the matrix state as it is, likewise."""

    def shared(self, state: AffineState) -> bool:
        """Whether the state decays as the matrix state does, whose sums of decays are there."""
        return self.retention is not None and state.log_decay == self.retention.symbol

    @property
    def touched(self) -> frozenset[Variable]:
        """Inputs and parameters to whose gradients later chunks add: those of the writes and decays."""
        states = self.group.states
        symbols = set().union(
            *(self.group.write(s).free_symbols | self.group.log_decay(s).free_symbols for s in states)
        )
        return frozenset(v for v in (*self.group.inputs, *self.group.parameters) if v.symbol in symbols)

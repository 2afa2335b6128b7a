"""What a sequential plan is made of: the formulas of a token, flat statements with axes, loops, and their schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from dspace.math.ir import Axes


@dataclass(frozen=True)
class Assign:
    """``symbol = expr`` for every element of ``axes``."""

    symbol: sympy.Symbol
    axes: Axes
    expr: sympy.Expr


@dataclass(frozen=True)
class Sum:
    """``symbol`` (on ``axes``) is the sum of ``expr`` over the axis ``over``."""

    symbol: sympy.Symbol
    axes: Axes
    expr: sympy.Expr
    over: str

    @property
    def loop(self) -> Axes:
        """Axes of the loop that accumulates it."""
        return "".join(sorted(self.axes + self.over))


@dataclass(frozen=True)
class Store:
    """Write ``expr`` to the array ``name``; ``add`` accumulates over tokens instead."""

    name: str
    axes: Axes
    expr: sympy.Expr
    add: bool = False


Statement = Assign | Sum | Store


@dataclass(frozen=True)
class Loop:
    """One loop nest over ``axes``; ``head`` (nests over kv only) runs once a row, before the row's ``body``."""

    axes: Axes
    body: tuple[Statement, ...]
    head: tuple[Assign, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Loops of one token, in order.

    ``buffers`` are the k- and v-vectors that one loop leaves for another. ``stored`` maps the symbol of a carried
    value's next state to the array that holds it once its storing nest has run.
    """

    loops: tuple[Loop, ...]
    buffers: Mapping[sympy.Symbol, Axes]
    axes: Mapping[sympy.Symbol, Axes]
    reloads: Mapping[sympy.Symbol, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """The formulas of one token.

    ``leaves``: axes of every symbol that is loaded. ``defined``: symbols that formulas use by name (next states), in
    any order. ``carried``: array of a state -> (axes, symbol of its previous value, its next value). ``outputs`` and
    ``accumulated``: array -> (axes, value), written once a token or added up over tokens.
    """

    leaves: Mapping[sympy.Symbol, Axes]
    defined: Mapping[sympy.Symbol, sympy.Expr]
    carried: Mapping[str, tuple[Axes, sympy.Symbol, sympy.Expr]]
    outputs: Mapping[str, tuple[Axes, sympy.Expr]]
    accumulated: Mapping[str, tuple[Axes, sympy.Expr]] = field(default_factory=dict)

"""The intermediate representation: one token of one head, as SymPy expressions over named axes.

An expression is a SymPy expression in *scalar* notation: a symbol stands for one element of a tensor, and
the axes that it carries are looked up in a table, never in the expression. Expressions broadcast over named
axes; the axes of an expression are the union of its symbols' axes, less those contracted by
:class:`SumK` and :class:`SumV`. Time and head are implicit: inputs have one value per token and head,
parameters one per head, states one per head and carried from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import sympy

Axes = str
"""A subset of the axes in canonical order: ``""``, ``"k"``, ``"v"`` or ``"kv"``."""

ALL_AXES: Axes = "kv"


class SumK(sympy.Function):
    """Contraction over the key channels, kept unevaluated: ``SumK(e) = sum_k e``."""

    nargs = 1
    is_real = True


class SumV(sympy.Function):
    """Contraction over the value channels, kept unevaluated: ``SumV(e) = sum_v e``."""

    nargs = 1
    is_real = True


CONTRACTIONS: dict[str, type[sympy.Function]] = {"k": SumK, "v": SumV}
CONTRACTED: dict[type, str] = {SumK: "k", SumV: "v"}

Role = Literal["input", "parameter", "state", "constant", "cotangent", "temporary"]


@dataclass(frozen=True)
class Domain:
    """An interval of real numbers; ``open_low``/``open_high`` exclude its ends."""

    low: float = -float("inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    @property
    def assumptions(self) -> dict[str, bool]:
        """SymPy assumptions that hold on the whole interval."""
        known = {"real": True}
        if self.low > 0 or (self.low == 0 and self.open_low):
            known["positive"] = True
        elif self.low == 0:
            known["nonnegative"] = True
        if self.high < 0 or (self.high == 0 and self.open_high):
            known["negative"] = True
        elif self.high == 0:
            known["nonpositive"] = True
        return known


DOMAINS: dict[str, Domain] = {
    "real": Domain(),
    "positive": Domain(low=0, open_low=True),
    "nonnegative": Domain(low=0),
    "negative": Domain(high=0, open_high=True),
    "nonpositive": Domain(high=0),
    "unit": Domain(low=0, high=1),
}
"""The spellings a spec may use for ``domain``."""


@dataclass(frozen=True)
class Variable:
    """A named tensor element of the recurrence: an input, a parameter or a constant such as ``scale``."""

    name: str
    axes: Axes
    role: Role
    domain: str = "real"
    doc: str = ""
    init: float | None = None

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name, **DOMAINS[self.domain].assumptions)


@dataclass(frozen=True)
class State:
    """One carried tensor: ``update`` is its next value, in terms of *previous* states and this token.

    ``domain`` is what is known of its sign (used for simplification and range analysis), ``doc`` what it
    means in terms of the spec (for example ``mean * precision``).
    """

    name: str
    axes: Axes
    init: sympy.Expr
    update: sympy.Expr
    domain: str = "real"
    doc: str = ""

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name, **DOMAINS[self.domain].assumptions)


SCALE = Variable("scale", "", "constant", "positive", "readout scale, K**-0.5 unless given")


@dataclass(frozen=True)
class Recurrence:
    """One variant: inputs, parameters, states with their updates, and what is read out.

    ``output`` (axes ``v``) and ``variance`` (axes ``v`` or None) are in terms of the states *after* the update
    when ``read == "after"`` and *before* it when ``read == "before"``. All state updates happen at once
    (every state on a right side is the previous one). ``init`` of a state may use parameters only.
    """

    name: str
    inputs: tuple[Variable, ...]
    parameters: tuple[Variable, ...]
    states: tuple[State, ...]
    output: sympy.Expr
    variance: sympy.Expr | None = None
    read: Literal["after", "before"] = "after"
    title: str = ""
    references: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Inputs, parameters and ``scale``, in signature order."""
        return (*self.inputs, *self.parameters, SCALE)

    def axes_table(self) -> dict[sympy.Symbol, Axes]:
        """Axes of every symbol that may occur in an expression of this recurrence."""
        table = {v.symbol: v.axes for v in self.variables}
        table.update({s.symbol: s.axes for s in self.states})
        return table

    def replace(self, **changes) -> Recurrence:
        return replace(self, **changes)


def join_axes(*axes: Axes) -> Axes:
    """Union of axes in canonical order: ``join_axes("v", "k") == "kv"``."""
    present = set("".join(axes))
    return "".join(a for a in ALL_AXES if a in present)


def drop_axis(axes: Axes, axis: str) -> Axes:
    return axes.replace(axis, "")


def axes_of(expr: sympy.Expr, table: Mapping[sympy.Symbol, Axes]) -> Axes:
    """Axes on which ``expr`` lives. Raises KeyError for a symbol that is not in ``table``."""
    if isinstance(expr, (SumK, SumV)):
        return drop_axis(axes_of(expr.args[0], table), CONTRACTED[type(expr)])
    if expr.is_Symbol:
        return table[expr]
    return join_axes(*(axes_of(a, table) for a in expr.args)) if expr.args else ""


def contract(expr: sympy.Expr, over: Axes) -> sympy.Expr:
    """Sum ``expr`` over each axis in ``over``."""
    for axis in over:
        expr = CONTRACTIONS[axis](expr)
    return expr


def divisor_symbols(expr: sympy.Expr) -> set[sympy.Symbol]:
    """All symbols in what ``expr`` divides by."""
    divisors = (p.base for p in expr.atoms(sympy.Pow) if p.exp.could_extract_minus_sign())
    return set().union(*(d.free_symbols for d in divisors))


def contractions_in(expr: sympy.Expr) -> set[sympy.Expr]:
    """All contraction nodes in ``expr``, nested ones included."""
    return expr.atoms(SumK, SumV)


# ---------------------------------------------------------------------------------------------------------
# Normal forms, filled in by classification and used by the plans.


@dataclass(frozen=True)
class Write:
    """One separable term ``key * value`` that a token adds to a state (``key`` on k, ``value`` on v)."""

    key: sympy.Expr
    value: sympy.Expr


@dataclass(frozen=True)
class AffineState:
    """``S_t = decay * S_{t-1} + sum of writes``, elementwise; ``decay_axes`` is "", "k", "v" or "kv".

    ``log_decay`` is None where it cannot be written without a logarithm of something that may be zero;
    it is 0 for a state that never forgets. For states that are not on ``kv`` there is one write whose
    ``key`` is 1 or whose ``value`` is 1.
    """

    name: str
    axes: Axes
    decay: sympy.Expr
    log_decay: sympy.Expr | None
    decay_axes: Axes
    writes: tuple[Write, ...]


@dataclass(frozen=True)
class Read:
    """One contraction ``symbol = SumK(body)`` of the readout that touches a state on ``kv``.

    If ``body`` is linear in the kv states, ``queries`` maps each state's name to its coefficient (axes ``k``
    at most, possibly with states that are not on kv: that is the fold) and ``body`` has no other term;
    else ``queries`` is None and the read is elementwise in the states (class c and beyond).
    """

    symbol: sympy.Symbol
    body: sympy.Expr
    queries: Mapping[str, sympy.Expr] | None


@dataclass(frozen=True)
class Readout:
    """``output`` and ``variance`` in terms of the reads' symbols (axes ``v``), inputs and small states."""

    reads: tuple[Read, ...]
    output: sympy.Expr
    variance: sympy.Expr | None


@dataclass(frozen=True)
class Classification:
    """The class of a recurrence (``letter``: a, b, fold, c, d, e, f, g) and why, in words.

    ``affine`` is present when every state is affine and elementwise; ``readout`` beside it.
    """

    letter: str
    name: str
    reason: str
    affine: tuple[AffineState, ...] | None = None
    readout: Readout | None = None
    steps: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Adjoint:
    """Vector-Jacobian product of one token, in terms of cotangents of its results.

    Cotangent symbols are named ``d_output``, ``d_variance`` (only when there is a variance) and ``d_NAME``
    for each state (the cotangent of its value after the token). ``wrt`` maps the name of each input,
    parameter, previous state and ``scale`` to its cotangent expression (0 where it has none); for a previous
    state this is the cotangent handed to the token before. Expressions use previous states' symbols and
    ``NAME_new`` symbols for the updated ones.
    """

    wrt: Mapping[str, sympy.Expr]
    cotangents: tuple[Variable, ...]
    new_states: Mapping[str, sympy.Expr]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: operation counts before and after, seconds, and a line in words."""

    name: str
    ops_before: int
    ops_after: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Analysis:
    """All that the mathematics knows of a variant; the only thing that plans read."""

    source: Recurrence
    recurrence: Recurrence
    """The recurrence in its best coordinates, simplified: what is emitted."""
    classification: Classification
    adjoint: Adjoint
    ranges: tuple[str, ...]
    cost: Mapping[str, sympy.Expr]
    """``state_bytes``, ``flops``, ``bytes`` per token and head, in the symbols K, V (and C, the chunk)."""
    passes: tuple[PassRecord, ...]

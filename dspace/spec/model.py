"""The validated form of a spec file: what the tables and keys are, and what a compiler asks of them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import sympy
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from dspace.errors import Problem, SpecError
from dspace.math.ir import ALL_AXES, Axes, State, Variable, join_axes

if TYPE_CHECKING:
    from dspace.spec.check import Meanings
    from dspace.spec.syntax import Node

STRUCTURES: dict[str, Axes] = {"scalar": "", "key": "k", "value": "v", "key_value": "kv"}
"""Axes of the precision state of each elementwise structure (``constant`` and ``full`` have none)."""

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")


def _axes(value: Any) -> Any:
    if isinstance(value, str):
        if set(value) - set(ALL_AXES) or len(set(value)) != len(value):
            raise ValueError(f"axes must be one of '', 'k', 'v', 'kv', not {value[:24]!r}")
        return join_axes(value)
    return value


def _formula(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError("a formula must be finite")
        return repr(value)
    return value


def _declaration(value: Any) -> Any:
    return {"axes": value} if isinstance(value, str) else value


def _name(value: Any) -> Any:
    if isinstance(value, str) and (not _IDENTIFIER.match(value) or len(value) > 64):
        raise ValueError("a name has letters, digits and _ only, starts with a letter, and has at most 64 characters")
    return value


AxesField = Annotated[str, BeforeValidator(_axes)]
Formula = Annotated[str, BeforeValidator(_formula)]
DomainName = Literal["real", "positive", "nonnegative", "negative", "nonpositive", "unit"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class VariableDecl(_Table):
    """One input: its axes (time and head are implicit), the domain of its values, what it is."""

    axes: AxesField
    domain: DomainName = "real"
    doc: str = ""


class ParameterDecl(VariableDecl):
    """One parameter per head; ``init`` is where training starts."""

    init: Annotated[float, Field(strict=False, allow_inf_nan=False)] | None = None


class Prior(_Table):
    mean: Formula = "0"
    precision: Formula = "1"


class Forgetting(_Table):
    """``target``: what is left of the past returns to the prior, or the prior is forgotten with it."""

    retain: Formula = "1"
    target: Literal["prior", "zero"] = "prior"


class Precision(_Table):
    structure: Literal["constant", "scalar", "key", "value", "key_value", "full"] = "constant"
    evidence: Formula = "0"


class Mean(_Table):
    evidence: Formula


class StateDecl(_Table):
    axes: AxesField
    init: Formula = "0"
    update: Formula
    domain: DomainName = "real"
    doc: str = ""


class Readout(_Table):
    read: Literal["after", "before"] = "after"
    output: Formula
    variance: Formula | None = None


Input = Annotated[VariableDecl, BeforeValidator(_declaration)]
Parameter = Annotated[ParameterDecl, BeforeValidator(_declaration)]
StateEntry = Annotated[StateDecl, BeforeValidator(_declaration)]


class Spec(_Table):
    """A complete variant: a posterior approximation (``mean`` and its companions) or a recurrence (``state``).

    Formulas are kept as text; :meth:`expr` gives their meaning. Obtain one from :func:`dspace.spec.load`,
    :func:`dspace.spec.loads` or :func:`dspace.spec.from_dict`, which report all problems of a file at once.
    """

    name: Annotated[str, BeforeValidator(_name)]
    title: str = ""
    doc: str = ""
    references: tuple[str, ...] = Field(default=(), strict=False)
    inputs: dict[str, Input]
    parameters: dict[str, Parameter] = {}
    define: dict[str, Formula] = {}
    prior: Prior | None = None
    forgetting: Forgetting | None = None
    precision: Precision | None = None
    mean: Mean | None = None
    state: dict[str, StateEntry] = {}
    readout: Readout
    layer: dict[str, Formula] = {}

    _path: Path | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The file it was read from, if any."""
        return self._path

    @property
    def is_posterior(self) -> bool:
        """True for the posterior form, False for the recurrence form."""
        return self.mean is not None

    @functools.cached_property
    def meanings(self) -> Meanings:
        """Everything that the formulas mean. Raises SpecError when the spec does not hold together."""
        from dspace.spec.check import check

        return check(self)

    @functools.cached_property
    def locate(self) -> Callable[[str, int | None], dict[str, Any]]:
        """Where a dotted place stands in the file that the spec was read from, as fields of a Problem."""
        from dspace.spec.reader import Source, locator

        return locator([Source(f"<{self.name}>")])

    def error(self, place: str, message: str, cure: str) -> SpecError:
        """What to raise where a later pass cannot go on because of what the file says at ``place``."""
        return SpecError([Problem(message, where=place, cure=cure, **self.locate(place, 1))])

    @functools.cached_property
    def variables(self) -> dict[str, Variable]:
        """Inputs, then parameters, as the compiler's variables, in signature order."""
        return {v.name: v for v in (*self.input_variables, *self.parameter_variables)}

    @property
    def input_variables(self) -> tuple[Variable, ...]:
        return tuple(Variable(n, d.axes, "input", d.domain, d.doc) for n, d in self.inputs.items())

    @property
    def parameter_variables(self) -> tuple[Variable, ...]:
        return tuple(Variable(n, d.axes, "parameter", d.domain, d.doc, d.init) for n, d in self.parameters.items())

    @property
    def state_symbols(self) -> dict[str, sympy.Symbol]:
        """Symbols of the recurrence's states; of ``mean`` and ``precision`` for a posterior."""
        if self.is_posterior:
            return {"mean": sympy.Symbol("mean", real=True), "precision": sympy.Symbol("precision", positive=True)}
        zero = sympy.Integer(0)
        return {n: State(n, d.axes, zero, zero, d.domain).symbol for n, d in self.state.items()}

    @property
    def formulas(self) -> dict[str, str]:
        """Text of every formula by its dotted place, such as ``precision.evidence`` or ``state.S.update``."""
        found: dict[str, str] = {}
        if self.is_posterior:
            prior, forgetting = self.prior or Prior(), self.forgetting or Forgetting()
            precision = self.precision or Precision()
            found["prior.mean"], found["prior.precision"] = prior.mean, prior.precision
            found["forgetting.retain"] = forgetting.retain
            found["precision.evidence"] = precision.evidence
            found["mean.evidence"] = self.mean.evidence if self.mean else "0"
        for name, state in self.state.items():
            found[f"state.{name}.init"], found[f"state.{name}.update"] = state.init, state.update
        found["readout.output"] = self.readout.output
        if self.readout.variance is not None:
            found["readout.variance"] = self.readout.variance
        return found

    @property
    def structure(self) -> str:
        """Structure of the precision; ``constant`` where nothing is said."""
        return (self.precision or Precision()).structure

    def expr(self, place: str) -> sympy.Expr:
        """Meaning of the formula at ``place`` (see :attr:`formulas`), with defined names replaced.

        Symbols are those of :attr:`variables`, :attr:`state_symbols` and ``scale``. Raises KeyError for a
        place that the spec does not have.
        """
        return self.meanings.formulas[place].expr

    def axes(self, place: str) -> Axes:
        """Axes on which the formula at ``place`` lives; also for ``"mean"`` and ``"precision"`` themselves."""
        return self.meanings.formulas[place].axes if place in self.meanings.formulas else self.meanings.axes[place]

    @property
    def layer_ast(self) -> dict[str, Node]:
        """Parsed recipes of the layer, of inputs and of shared definitions."""
        return dict(self.meanings.layer)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the mathematics, the name and the layer.

        Independent of comments, spacing, the order of tables, the spelling of numerals, documentation, and of
        how a formula is written as far as SymPy sees it (``k*v`` is ``v*k``). The order of inputs, of
        parameters and of states is part of it, since it is the order of the generated signature.
        """
        from dspace.spec.printing import signature
        from dspace.spec.syntax import unparse

        content = {
            "name": self.name,
            "inputs": [(n, d.axes, d.domain) for n, d in self.inputs.items()],
            "parameters": [(n, d.axes, d.domain, d.init) for n, d in self.parameters.items()],
            "structure": self.structure,
            "states": [(n, d.axes, d.domain) for n, d in self.state.items()],
            "read": self.readout.read,
            "formulas": {place: signature(m.expr) for place, m in sorted(self.meanings.formulas.items())},
            "layer": {key: unparse(node) for key, node in sorted(self.meanings.layer.items())},
        }
        if self.forgetting is not None and self.forgetting.target != "prior":
            content["target"] = self.forgetting.target
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, complete and without defaults; :func:`dspace.spec.from_dict` takes them back."""
        return self.model_dump(exclude_defaults=True, mode="json")

    def to_toml(self) -> str:
        """A complete spec file without ``extends`` or ``transform`` that parses to the same hash."""
        from dspace.spec.write import to_toml

        return to_toml(self)

"""What a layer needs to know of a variant: its functions, inputs, parameters, states and recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dspace.errors import UserError
from dspace.nn.recipe import Declared
from dspace.spec.syntax import Node


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of the spec: one value per head (and axis)."""

    name: str
    axes: str
    domain: str = "real"
    init: float | None = None


@dataclass(frozen=True)
class Operator:
    """A compiled variant as :class:`~dspace.nn.layer.Mixer` uses it."""

    name: str
    chunk: Callable[..., Any]
    recurrent: Callable[..., Any]
    inputs: tuple[Declared, ...]
    parameters: tuple[ParameterInfo, ...]
    state_axes: tuple[str, ...]
    layer: Mapping[str, Node | str] = field(default_factory=dict)
    hash: str = ""
    native: bool = False
    """Whether ``recurrent`` is a native loop on a CPU: it then beats the chunkwise form there at every size tried."""
    spec: Any = None
    """The spec that it was compiled from, where it is at hand."""

    def state_numbers(self, heads: int, key_dim: int, value_dim: int) -> int:
        """Numbers that one sequence carries from token to token, all heads."""
        size = {"k": key_dim, "v": value_dim}
        total = 0
        for axes in self.state_axes:
            count = heads
            for axis in axes:
                count *= size[axis]
            total += count
        return total


def as_operator(source: Any) -> Operator:
    """Accept an :class:`Operator`, a compiled module, a Spec, or a path or name of a spec (compiled here)."""
    if isinstance(source, Operator):
        return source
    if isinstance(source, ModuleType):
        return _from_module(source)
    if isinstance(source, str | Path) or hasattr(source, "layer_ast"):
        import dspace
        from dspace import spec as spec_package

        spec = spec_package.load(source) if isinstance(source, str | Path) else source
        return _from_module(dspace.compile(spec), spec)
    raise UserError(
        f"a layer cannot be made from {type(source).__name__}\n"
        "  cure: pass the name or path of a spec, a Spec, or the module that dspace.compile returned"
    )


def _from_module(module: ModuleType, spec: Any = None) -> Operator:
    facts: Mapping[str, Any] = getattr(module, "SPEC", {})
    if "name" not in facts:
        raise UserError(f"module {module.__name__!r} has no SPEC: it is not a generated module of dspace")
    name = facts["name"]
    layer = dict(spec.layer_ast if spec is not None else facts.get("layer", {}))
    # A module appends "_" to names that Python reserves; the spec's own name is what recipes use.
    own = {n: n for n in layer} | {f"{n}_": n for n in layer}
    return Operator(
        name=name,
        chunk=getattr(module, f"chunk_{name}"),
        recurrent=getattr(module, f"recurrent_{name}"),
        inputs=tuple(Declared(own.get(n, n), d["axes"], d.get("domain", "real")) for n, d in _entries(facts["inputs"])),
        parameters=tuple(
            ParameterInfo(n, d["axes"], d.get("domain", "real"), d.get("init", _init(spec, n)))
            for n, d in _entries(facts["parameters"])
        ),
        state_axes=tuple(d["axes"] for _, d in _entries(facts["states"])),
        layer=layer,
        hash=facts.get("hash", ""),
        native="cpu/recurrent" in facts.get("forms", {}),
        spec=spec,
    )


def _entries(table: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """SPEC tables come as ``{name: {...}}`` or as a sequence of ``{"name": ..., ...}``."""
    if isinstance(table, Mapping):
        return list(table.items())
    return [(entry["name"], entry) for entry in table]


def _init(spec: Any, name: str) -> float | None:
    return None if spec is None else spec.parameters[name].init

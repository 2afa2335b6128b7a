"""What two specs must share to train alike: their mathematics, and how a layer makes each input of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dspace.spec.syntax import Binary, Call, Name, Node, Unary, unparse

if TYPE_CHECKING:
    from dspace.spec import Spec


def spec_identity(spec: Spec, starts: Mapping[str, float]) -> str:
    """A hash that names of inputs, parameters, states and definitions, and the spelling of formulas, do not enter.

    ``starts`` are values at which the model starts parameters of the spec, or atoms of its recipes, by name.
    """
    from dspace.math import analyse, canonical_hash

    recurrence = analyse(spec).recurrence
    labels = {}
    for v in recurrence.inputs:
        recipe = spec.meanings.layer.get(v.name)
        labels[v.name] = "default" if recipe is None else unparse(_inlined(recipe, spec))
    for p in recurrence.parameters:
        labels[p.name] = repr(float(starts[p.name] if p.name in starts else p.init or 0.0))
    atoms = sorted((k, v) for k, v in starts.items() if k not in spec.parameters)
    return canonical_hash(recurrence, labels) + (repr(atoms) if atoms else "")


def _inlined(node: Node, spec: Spec) -> Node:
    """A recipe with the shared definitions in it written out, marked as such: they are computed once for all."""
    match node:
        case Name(name, column) if name in spec.meanings.layer and name not in spec.inputs:
            inner = _inlined(spec.meanings.layer[name], spec)
            alike = [
                n for n, d in spec.meanings.layer.items() if n not in spec.inputs and d == spec.meanings.layer[name]
            ]
            # Two definitions of one text have weights of their own: then their names must tell them apart.
            return Call("shared" if len(alike) == 1 else f"shared_{name}", (inner,), column)
        case Unary(op, operand, column):
            return Unary(op, _inlined(operand, spec), column)
        case Binary(op, left, right, column):
            return Binary(op, _inlined(left, spec), _inlined(right, spec), column)
        case Call(func, args, column):
            return Call(func, tuple(_inlined(a, spec) for a in args), column)
    return node

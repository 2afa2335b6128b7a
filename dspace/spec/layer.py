"""The ``[layer]`` table: how a layer makes each input from the hidden state.

Recipes use the grammar of formulas with other words. A key that is an input gives that input; any other key
is a shared definition, one number per head unless it is used by an input with axes only through elementwise
products. Every occurrence of an atom has weights of its own; a shared definition is computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspace.spec.expressions import listed, nearest
from dspace.spec.syntax import Call, FormulaError, Name, Node, parse, walk

if TYPE_CHECKING:
    from dspace.spec.check import Report
    from dspace.spec.model import Spec

ATOMS = {
    "linear": "linear projection of the hidden state to the input's axes",
    "low_rank": "linear projection through a narrow waist",
    "head_scale": "one learned number per head",
    "dt_bias": "one learned number per head, initialised so that softplus of it is log-uniform in [1e-3, 0.1]",
    "A_log": "one learned number per head, the logarithm of a decay rate",
    "head_gain": "one learned number per head, never negative, initialised to exactly 0",
    "write_gate": "sigmoid of a linear projection, one number per head, shared by all recipes that name it",
}
"""Values that a recipe may start from, with what they are."""

LAYER_FUNCTIONS = {
    "conv": 1,
    "l2norm": 1,
    "silu": 1,
    "sigmoid": 1,
    "softplus": 1,
    "exp": 1,
    "log": 1,
    "tanh": 1,
    "sqrt": 1,
    "abs": 1,
    "minimum": 2,
    "maximum": 2,
}
"""Functions of recipes with their number of arguments."""


def check_layer(spec: Spec, report: Report) -> dict[str, Node]:
    """Parsed recipes; problems go to ``report``."""
    nodes: dict[str, Node] = {}
    for key, text in spec.layer.items():
        place = f"layer.{key}"
        if key in ATOMS or key in LAYER_FUNCTIONS:
            report(place, f"{key!r} is a word of the layer language", cure="name the definition differently")
        try:
            nodes[key] = parse(text)
        except FormulaError as error:
            report(place, error.message, error.column, error.cure, error.suggestion)
    if not spec.layer:
        return nodes
    shared = [key for key in spec.layer if key not in spec.inputs]
    used: set[str] = set()
    for key, node in nodes.items():
        used |= _check_recipe(f"layer.{key}", node, shared, report)
    for name in spec.inputs:
        told = any(p.where == f"inputs.{name}" for p in report.problems)
        if name not in spec.layer and not told:
            report("layer", f"no recipe for the input {name!r}", cure=f'add {name} = "linear", or drop the whole table')
    for key in shared:
        if key not in used:
            report(
                f"layer.{key}",
                f"{key!r} is neither an input nor used by another recipe",
                cure=f"the inputs are {listed(spec.inputs)}",
                suggestion=nearest(key, spec.inputs),
            )
    _check_cycles(nodes, shared, report)
    return nodes


def _check_recipe(place: str, node: Node, shared: list[str], report: Report) -> set[str]:
    used: set[str] = set()
    for part in walk(node):
        if isinstance(part, Name):
            used.add(part.id)
            if part.id in ATOMS or part.id in shared:
                continue
            known = [*ATOMS, *shared]
            if part.id in LAYER_FUNCTIONS:
                report(place, f"{part.id!r} is a function", part.column, cure=f"call it: {part.id}(...)")
                continue
            report(
                place,
                f"unknown name {part.id!r}",
                part.column,
                cure=f"a recipe uses {', '.join(ATOMS)} and shared definitions ({listed(shared)})",
                suggestion=nearest(part.id, known),
            )
        elif isinstance(part, Call):
            arity = LAYER_FUNCTIONS.get(part.func)
            if arity is None:
                report(
                    place,
                    f"unknown function {part.func!r}",
                    part.column,
                    cure=f"the functions are {', '.join(LAYER_FUNCTIONS)}",
                    suggestion=nearest(part.func, LAYER_FUNCTIONS),
                )
            elif arity != len(part.args):
                report(
                    place,
                    f"{part.func} takes {arity} argument{'s' * (arity > 1)}, {len(part.args)} given",
                    part.column,
                    cure=f"write {part.func}({', '.join('ab'[:arity])})",
                )
    return used


def _check_cycles(nodes: dict[str, Node], shared: list[str], report: Report) -> None:
    uses = {key: [n.id for n in walk(nodes[key]) if isinstance(n, Name)] for key in shared if key in nodes}
    free = [key for key in shared if not any(u in uses for u in uses.get(key, ()))]
    done = set(free)
    while True:
        ready = [k for k in uses if k not in done and all(u in done or u not in uses for u in uses[k])]
        if not ready:
            break
        done.update(ready)
    for key in uses:
        if key not in done:
            report(f"layer.{key}", f"{key!r} is defined through itself", cure="break the circle")

"""Which names of emitted functions a spec could have too, and so meet."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import dspace.math
import dspace.spec
from dspace.emit import naming


def left_to_a_spec(name: str, chosen: Callable[[str], bool], reserved: frozenset[str]) -> tuple[int, set[str]]:
    """Of the functions of ``kernels/NAME.py`` that are ``chosen`` by name: how many there are, and the names that they
    bind for themselves, which are neither reserved nor of a pattern that a spec's names are kept apart from."""
    bound: set[str] = set()
    functions = 0
    for function in ast.parse((Path(__file__).parents[2] / f"kernels/{name}.py").read_text()).body:
        if not isinstance(function, ast.FunctionDef) or not chosen(function.name):
            continue
        functions += 1
        nodes = list(ast.walk(function))
        inside = {id(n) for c in nodes if isinstance(c, ast.comprehension) for n in ast.walk(c.target)}
        bound |= {a.arg for a in function.args.args}
        bound |= {
            n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in inside
        }
    recurrence = dspace.math.analyse(dspace.spec.load(name)).recurrence
    own = {v.name for v in (*recurrence.inputs, *recurrence.parameters, *recurrence.states)}
    return functions, {n for n in bound - own - reserved - naming.INTERNAL if naming.KernelNamer()(n) == n}

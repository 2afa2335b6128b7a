"""A sequence on which two recurrences differ: what can be shown where no equation of a claim is false at a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import sympy

from dspace.math.ir import Recurrence
from dspace.math.numeric import draw, evaluate, full
from dspace.math.proofs import Claim

LENGTH = 6
"""Tokens of the sequence."""
DIFFERENT = 1e-3

Array = np.ndarray
Values = dict[sympy.Symbol, Array]


def run(recurrence: Recurrence, tokens: Sequence[Values], constants: Values) -> list[Array]:
    """Outputs of ``recurrence``, token by token; values of inputs and constants by symbol, sizes as in ``numeric``."""
    states = {s.symbol: full(evaluate(s.init, constants), s.axes) for s in recurrence.states}
    outputs = []
    for token in tokens:
        known = {**token, **constants}
        new = {s.symbol: full(evaluate(s.update, known | states), s.axes) for s in recurrence.states}
        outputs.append(evaluate(recurrence.output, known | (new if recurrence.read == "after" else states)))
        states = new
    return outputs


def witness(source: Recurrence, target: Recurrence, claim: Claim | None) -> Mapping[str, object]:
    """The first token at which the outputs differ, with every value up to there; empty if they do not in ``LENGTH``.

    The variables of ``source`` are what ``claim`` says; without one, those of the same name and axes are equal, the
    others are drawn in their domains.
    """
    rng = np.random.default_rng(5)
    constants = {v.symbol: full(draw(v, rng), v.axes) for v in target.variables if v.role != "input"}
    tokens = [{v.symbol: full(draw(v, rng), v.axes) for v in target.inputs} for _ in range(LENGTH)]
    drawn = {v.symbol: full(draw(v, rng), v.axes) for v in source.variables}
    chosen = _by_name(source, target) if claim is None else claim.variables
    known = [{**drawn, **constants, **t} for t in tokens]
    mapped = [
        {
            x: full(evaluate(chosen[x], k), v.axes) if x in chosen else drawn[x]
            for v in source.variables
            for x in [v.symbol]
        }
        for k in known
    ]
    inputs = {v.symbol for v in source.inputs}
    fixed = {x: e for x, e in mapped[0].items() if x not in inputs}
    found = run(source, [{x: e for x, e in m.items() if x in inputs} for m in mapped], fixed)
    wanted = run(target, tokens, constants)
    for t, (a, b) in enumerate(zip(found, wanted, strict=True)):
        gap = np.abs(a - b)
        if np.isfinite(gap).all() and gap.max() > DIFFERENT * (1 + np.abs(b).max()):
            point: dict[str, object] = {f"{x} of {target.name}": _list(e) for x, e in constants.items()}
            point |= {f"{x} of {source.name}": _list(e) for x, e in fixed.items()}
            for x in tokens[0]:
                point[f"{x} of {target.name}, by token"] = [_list(token[x]) for token in tokens[: t + 1]]
            for x in inputs:
                point[f"{x} of {source.name}, by token"] = [_list(m[x]) for m in mapped[: t + 1]]
            return point | {"token": t + 1, "source": _list(a), "target": _list(b)}
    return {}


def _by_name(source: Recurrence, target: Recurrence) -> dict[sympy.Symbol, sympy.Expr]:
    """The variables of ``source`` that may stand for those of ``target`` with their names."""
    known = {v.name: v for v in target.variables}
    chosen: dict[sympy.Symbol, sympy.Expr] = {}
    for v in source.variables:
        w = known.get(v.name)
        if w is not None and set(w.axes) <= set(v.axes) and (v.role == "input" or w.role != "input"):
            chosen[v.symbol] = w.symbol
    return chosen


def _list(value: Array) -> object:
    return np.round(value, 6).squeeze().tolist()

"""Identities of the theory that the pipeline relies on: symbolically, and by running tokens."""

from __future__ import annotations

import sympy
import torch
from variants import ALL, Tape, build, metaplastic

from dspace.math import analyse
from dspace.math.coordinates import normalise
from dspace.math.ir import Recurrence, SumK
from dspace.math.simplify import is_zero, simplify

SIZES = {"k": 4, "v": 3}
LIKE = torch.zeros(1, 1, dtype=torch.float64)


def run(recurrence: Recurrence, tokens: int = 12, **fixed: float) -> list[torch.Tensor]:
    """Outputs and variances for inputs drawn by name from one seed."""
    constants = {"scale": 0.7} | {p.name: 0.8 for p in recurrence.parameters} | fixed
    base = {v.symbol: LIKE + constants[v.name] for v in recurrence.variables if v.name in constants}
    states = Tape([s.init for s in recurrence.states], SIZES).run(base, LIKE)
    exprs = [recurrence.output] + ([recurrence.variance] if recurrence.variance is not None else [])
    read, update = Tape(exprs, SIZES), Tape([s.update for s in recurrence.states], SIZES)
    found = []
    for t in range(tokens):
        token = dict(base)
        for v in recurrence.inputs:
            if v.name not in constants:
                torch.manual_seed(1000 * t + sum(map(ord, v.name)))
                x = torch.randn([SIZES[a] if a in v.axes else 1 for a in "kv"], dtype=torch.float64)
                token[v.symbol] = {"nonnegative": x.abs(), "nonpositive": -x.abs() / 5}.get(v.domain, x)
        before = {s.symbol: x for s, x in zip(recurrence.states, states, strict=True)}
        states = update.run(token | before, LIKE)
        found += read.run(token | {s.symbol: x for s, x in zip(recurrence.states, states, strict=True)}, LIKE)
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(a, b, strict=True))


def test_information_form_is_exact():
    """E1: mean and precision are M/(Ibar + I_p) and Ibar + I_p, token after token."""
    source = metaplastic()
    change = normalise(source)
    to_source = change.to_source
    new = {s.symbol: s.update for s in change.recurrence.states}
    for s in source.states:
        stepped = to_source[s.name].xreplace(new)
        stated = s.update.xreplace({x.symbol: to_source[x.name] for x in source.states})
        assert is_zero(stepped - stated)
    assert same(run(source), run(change.recurrence))


def test_every_normal_form_runs_as_its_source():
    for r in ALL.values():
        if r.read == "after":
            assert same(run(r), run(analyse(r).recurrence)), r.name


def test_without_importance_it_is_its_twin():
    """E2: b = 0 gives the affine twin divided by the prior, exactly."""
    r = normalise(metaplastic()).recurrence
    b, I_p = (next(v.symbol for v in r.variables if v.name == n) for n in ("b", "I_p"))
    M, Ibar = (s.symbol for s in r.states)
    assert r.states[1].update.xreplace({b: 0, Ibar: 0}) == 0
    output = simplify(r.output.xreplace({Ibar: sympy.S.Zero}), r.axes_table())
    scale, q = (sympy.Symbol("scale", positive=True), sympy.Symbol("q", real=True))
    assert is_zero(output - scale * SumK(M * q) / I_p)
    twin = run(ALL["scalar"])
    assert same([x / 0.8 for x in twin], run(r, b=0.0)[::2])


def test_importance_free_of_v_folds_into_the_query():
    """E15: one precision for all values is the affine twin with the query divided by it."""
    folded = build(
        "by_hand",
        {"S": ("kv", "0", "exp(g)*S + v*k"), "P": ("k", "0", "exp(g)*P + b*k**2")},
        "scale*sum_k(S*(q/(P + I_p)))",
        parameters={"I_p": ""},
        **{"q": "k", "k": "k", "v": "v", "b": "", "g": ""},
    )
    assert same(run(ALL["folded"])[::2], run(folded))
    assert same(run(ALL["folded_wide"])[::2], run(folded))
    found, wide = analyse(ALL["folded"]), analyse(ALL["folded_wide"])
    assert found.recurrence.states == wide.recurrence.states
    assert is_zero(found.recurrence.output - wide.recurrence.output)

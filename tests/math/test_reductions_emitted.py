"""Reductions and transforms on emitted modules: the source's own code, substituted, gives the target's outputs."""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import pytest
import torch

import dspace
from dspace.math import analyse, reduce
from dspace.math.ir import DOMAINS, SCALE, Variable
from dspace.math.map import build_map
from dspace.math.numeric import evaluate
from dspace.math.reductions import Reduction
from dspace.spec import load

B, T, H = 2, 6, 2
SIZES = {"k": 4, "v": 3}
SCALE_VALUE = 0.37


@pytest.fixture(scope="module")
def module_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return functools.cache(lambda name: dspace.compile(name, certify=False, cache_dir=folder))


def draw(variable: Variable, rng: np.random.Generator) -> np.ndarray:
    """A value aligned to ``[B, T, H, K, V]``, with size 1 where there is no such axis."""
    lead = (B, T, H) if variable.role == "input" else (1, 1, H)
    x = rng.normal(size=(*lead, *(SIZES[a] if a in variable.axes else 1 for a in "kv")))
    domain = DOMAINS[variable.domain]
    if (domain.low, domain.high) == (0, 1):
        return 1 / (1 + np.exp(-x))
    return abs(x) + 0.1 if domain.low == 0 else -abs(x) - 0.1 if domain.high == 0 else x


def shaped(value: np.ndarray, variable: Variable) -> torch.Tensor:
    """The aligned value as a module takes it."""
    lead = (B, T, H) if variable.role == "input" else (1, 1, H)
    whole = np.broadcast_to(value, (*lead, *(SIZES[a] if a in variable.axes else 1 for a in "kv")))
    for axis, at in (("k", -2), ("v", -1)):
        if axis not in variable.axes:
            whole = whole.take(0, axis=at)
    return torch.from_numpy(np.array(whole if variable.role == "input" else whole[0, 0]))


def outputs(module: ModuleType, variables, values, scale: float) -> torch.Tensor:
    function = getattr(module, f"reference_{module.SPEC['name']}")
    return function(*(shaped(values[v.symbol], v) for v in variables), scale=scale)[0]


def both(reduction: Reduction, module_of) -> tuple[torch.Tensor, torch.Tensor]:
    claim, rng = reduction.claim, np.random.default_rng(11)
    source, target = claim.source, claim.target
    known = {v.symbol: draw(v, rng) for v in (*target.inputs, *target.parameters)}
    known[SCALE.symbol] = np.full((1, 1), SCALE_VALUE)
    wanted = outputs(module_of(target.name), (*target.inputs, *target.parameters), known, SCALE_VALUE)
    for v in source.variables:
        if v.symbol not in known and claim.variables[v.symbol] == v.symbol:  # it may have any value
            known[v.symbol] = draw(v, rng)
    if claim.limit is not None:
        known[claim.limit] = np.full((1, 1), 1e7 if claim.direction == "infinity" else 1e-7)
    mapped = {x: evaluate(e, known) for x, e in claim.variables.items()}
    scale = float(np.asarray(mapped[SCALE.symbol]).reshape(-1)[0])
    return outputs(module_of(source.name), (*source.inputs, *source.parameters), mapped, scale), wanted


def test_every_edge_holds_on_the_emitted_modules(answers, module_of):
    """Exactly, or in a limit nearly, at random inputs, for all that is proven between built-in variants."""
    seen = 0
    for pair, answer in answers.items():
        for reduction, tolerance in ((answer.exact, 1e-9), (answer.limit, 1e-4)):
            if reduction is not None:
                seen += 1
                found, wanted = both(reduction, module_of)
                assert wanted.abs().max() > 1e-3, pair
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=str(pair))
    assert seen > 80


def test_a_wrong_substitution_is_seen(module_of):
    answer = reduce(analyse(load("gla")).recurrence, analyse(load("hgrn2")).recurrence, limits=False)
    key = next(x for x in answer.exact.claim.variables if x.name == "k")
    answer.exact.claim.variables[key] *= 1.01
    found, wanted = both(answer.exact, module_of)
    assert not torch.allclose(found, wanted, rtol=1e-4)


def test_transforms_are_edges_of_the_map():
    names = ("simple_gla", "palimpsa", "gla", "mamba2", "meta_mamba2")
    specs = {n: load(n) for n in names}
    drawn = build_map({n: analyse(s) for n, s in specs.items()}, limits=False, specs=specs)
    moves = {(e.source, e.text, e.target) for e in drawn.edges if e.kind == "transform"}
    assert moves == {
        ("simple_gla", "metaplastic", "palimpsa"),
        ("palimpsa", "non_metaplastic", "simple_gla"),
        ("simple_gla", "per_channel", "gla"),
        ("mamba2", "metaplastic", "meta_mamba2"),
        ("meta_mamba2", "non_metaplastic", "mamba2"),
    }
    shown = {(e.source, e.text) for e in drawn.skeleton() if e.kind == "transform"}
    assert shown == {("simple_gla", "metaplastic"), ("simple_gla", "per_channel"), ("mamba2", "metaplastic")}
    assert 'label="per_channel", style=dotted' in drawn.dot() and "simple_gla ⇒ gla: per_channel" in drawn.text()

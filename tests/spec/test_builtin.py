"""Every built-in spec: reads, writes itself back, and says what its paper says."""

from __future__ import annotations

import pytest
import sympy

from dspace.math.ir import SumK
from dspace.spec import builtin_names, from_dict, load, loads

SIXTEEN = """linear_attention normalized_linear_attention retnet lightning_attention simple_gla mamba2 gla hgrn2 rwkv6
palimpsa meta_mamba2 palimpsa_folded metaplastic_gla delta_net gated_delta_net kda""".split()


def test_the_sixteen_are_there():
    assert set(SIXTEEN) <= set(builtin_names())


@pytest.mark.parametrize("name", builtin_names())
def test_reads_and_writes_itself_back(name):
    spec = load(name)
    assert spec.name == name
    assert spec.title
    assert spec.references
    assert spec.path.stem == name
    assert set(spec.inputs) <= set(spec.layer), "every built-in has a recipe for each input"
    again = loads(spec.to_toml())
    assert again.hash == spec.hash
    assert again.to_toml() == spec.to_toml()
    assert from_dict(spec.to_dict()).hash == spec.hash
    assert again.title == spec.title
    assert again.inputs == spec.inputs
    assert spec.axes("readout.output") == "v"


def test_palimpsa_is_the_published_one():
    spec = load("palimpsa")
    q, k, v, b, g, prior = (spec.variables[n].symbol for n in ("q", "k", "v", "b", "g", "I_p"))
    mean, precision = spec.state_symbols["mean"], spec.state_symbols["precision"]
    scale = sympy.Symbol("scale", real=True, positive=True)
    assert spec.expr("forgetting.retain") == sympy.exp(g)
    assert spec.expr("precision.evidence") == b * k**2
    assert spec.expr("mean.evidence") == v * k
    assert spec.expr("prior.precision") == prior
    assert spec.expr("readout.output") == scale * SumK(mean * q)
    assert spec.expr("readout.variance") == scale**2 * SumK(q**2 / precision)
    assert spec.axes("mean") == spec.axes("precision") == "kv"
    assert list(spec.variables) == ["q", "k", "v", "b", "g", "I_p"]
    assert spec.variables["g"].domain == "nonpositive"
    assert spec.variables["I_p"].init == 1.0


def test_meta_mamba2_is_two_lines_on_mamba2():
    spec = load("meta_mamba2")
    lines = [line for line in spec.path.read_text().splitlines() if line and not line.startswith(("name", "title"))]
    assert len(lines) == 2
    assert list(spec.state) == ["S", "S_importance"]
    g, k, b = (spec.variables[n].symbol for n in ("g", "k", "b"))
    importance = spec.state_symbols["S_importance"]
    assert spec.expr("state.S.update") == load("mamba2").expr("state.S.update")
    assert sympy.expand(spec.expr("state.S_importance.update") - (sympy.exp(g) * importance + b * k**2)) == 0
    assert spec.layer["b"] == "dt * sigmoid(low_rank) * softplus(head_scale)"


def test_folded_differs_by_the_axes_of_its_precision():
    assert load("palimpsa_folded").axes("precision") == "k"
    assert load("palimpsa_folded").axes("mean") == "kv"
    assert load("metaplastic_gla").axes("forgetting.retain") == "k"
    assert load("metaplastic_gla").axes("prior.precision") == "k"


def test_rwkv6_reads_before_the_update():
    assert load("rwkv6").readout.read == "before"


def test_hgrn2_writes_the_complement_of_its_retention():
    spec = load("hgrn2")
    g, v, s = spec.variables["g"].symbol, spec.variables["v"].symbol, spec.state_symbols["S"]
    assert sympy.expand(spec.expr("state.S.update") - (sympy.exp(g) * s + v * (1 - sympy.exp(g)))) == 0


def test_gated_delta_net_is_the_delta_rule_on_the_decayed_state():
    spec = load("gated_delta_net")
    k, v, g, beta = (spec.variables[n].symbol for n in ("k", "v", "g", "beta"))
    s = spec.state_symbols["S"]
    decayed = sympy.exp(g) * s
    assert sympy.expand(spec.expr("state.S.update") - decayed - beta * k * (v - SumK(decayed * k))) == 0

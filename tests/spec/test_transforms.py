"""extends, remove and transform: what they make, and why they refuse."""

from __future__ import annotations

import pytest
import sympy

from dspace.errors import SpecError
from dspace.spec import from_dict, load, loads, metaplastic


def posterior(base: str) -> dict:
    """``base`` with a constant precision and no gain."""
    tables = loads(base).to_dict()
    del tables["inputs"]["b"], tables["layer"]["b"]
    del tables["precision"], tables["prior"], tables["parameters"]
    return tables


def test_metaplastic_of_a_constant_posterior_is_the_full_one(base):
    made = from_dict({**posterior(base), "transform": "metaplastic"})
    wanted = loads(base)
    for place in ("prior.precision", "precision.evidence", "mean.evidence", "forgetting.retain", "readout.output"):
        assert made.expr(place) == wanted.expr(place)
    assert made.structure == "key_value"
    assert made.layer["b"] == "write_gate * sigmoid(low_rank) * softplus(head_scale)"
    assert list(made.inputs) == ["q", "k", "v", "g", "b"]


def test_a_prior_that_the_file_has_is_kept(base):
    tables = posterior(base)
    tables["parameters"] = {"P": {"axes": "k", "domain": "positive"}}
    tables["prior"] = {"precision": "P"}
    made = metaplastic(from_dict(tables))
    assert list(made.parameters) == ["P"]
    assert made.expr("prior.precision") == made.variables["P"].symbol


def test_what_the_transform_adds_may_be_declared_beforehand():
    made = loads("""
name = "mine"
extends = "gla"
transform = "metaplastic"
[inputs]
b = { axes = "", domain = "nonnegative" }
[parameters]
I_p = { axes = "k", domain = "positive", init = 2.0 }
[layer]
b = "softplus(linear)"
""")
    assert made.state["S_importance"].axes == "k"
    assert made.parameters["I_p"].init == 2.0
    assert made.layer["b"] == "softplus(linear)"


@pytest.mark.parametrize("name", ["simple_gla", "gla", "hgrn2", "retnet", "rwkv6", "linear_attention", "mamba2"])
def test_metaplastic_is_the_identity_without_importance(name):
    base = load(name)
    made = metaplastic(base)
    off = {made.state_symbols["S_importance"]: 0, made.variables["I_p"].symbol: 1}
    assert sympy.simplify(made.expr("readout.output").subs(off) - base.expr("readout.output")) == 0
    assert made.expr("state.S.update") == base.expr("state.S.update")
    decay = sympy.diff(base.expr("state.S.update"), base.state_symbols["S"])
    importance = made.state_symbols["S_importance"]
    assert sympy.simplify(sympy.diff(made.expr("state.S_importance.update"), importance) - decay) == 0
    assert loads(made.to_toml()).hash == made.hash


def test_the_key_is_found_in_the_write():
    made = metaplastic(load("hgrn2"))
    g, b = made.variables["g"].symbol, made.variables["b"].symbol
    importance = made.state_symbols["S_importance"]
    gained = made.expr("state.S_importance.update") - sympy.exp(g) * importance
    assert sympy.simplify(gained - b * (1 - sympy.exp(g)) ** 2) == 0


def test_the_variance_is_derived():
    made = metaplastic(load("simple_gla"))
    scale = sympy.Symbol("scale", real=True, positive=True)
    assert made.expr("readout.variance").has(scale**2)
    assert metaplastic(load("rwkv6")).readout.variance is None


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("delta_net", "not diagonal"),
        ("gated_delta_net", "not diagonal"),
        ("kda", "not diagonal"),
        ("palimpsa", "learns one already"),
        ("meta_mamba2", "over an importance, S_importance, already"),
        ("normalized_linear_attention", "2 states"),
    ],
)
def test_it_says_why_not(base, words):
    with pytest.raises(SpecError, match=words) as caught:
        loads(f'name = "x"\nextends = "{base}"\ntransform = "metaplastic"\n')
    (problem,) = caught.value.problems
    assert problem.where == "transform"
    assert problem.line == 3
    assert problem.cure


def test_a_write_that_does_not_factorise():
    with pytest.raises(SpecError, match="does not factorise"):
        loads("""
name = "x"
transform = "metaplastic"
[inputs]
q = "k"
k = "k"
v = "v"
[state.S]
axes = "kv"
update = "S + tanh(v * k)"
[readout]
output = "sum_k(S * q)"
""")


def test_extends_overrides_key_by_key(tmp_path):
    (tmp_path / "a.toml").write_text('name = "a"\nextends = "palimpsa"\n[parameters.I_p]\ninit = 4.0\n')
    (tmp_path / "b.toml").write_text(
        'name = "b"\ntitle = "B"\nextends = "a.toml"\n[forgetting]\nretain = "1"\nremove = 3\n'
    )
    with pytest.raises(SpecError, match="unknown key 'remove'"):
        load(tmp_path / "b.toml")
    (tmp_path / "b.toml").write_text(
        'name = "b"\ntitle = "B"\nextends = "a"\nremove = ["inputs.g", "layer.g"]\n[forgetting]\nretain = "1"\n'
    )
    made = load(tmp_path / "b.toml")
    assert made.parameters["I_p"].init == 4.0
    assert made.parameters["I_p"].domain == "positive"
    assert "g" not in made.inputs
    assert made.title == "B"


def test_circles_and_lost_bases(tmp_path):
    (tmp_path / "a.toml").write_text('name = "a"\nextends = "b"\n')
    (tmp_path / "b.toml").write_text('name = "b"\nextends = "a"\n')
    with pytest.raises(SpecError, match=r"circle: a\.toml -> b\.toml -> a\.toml"):
        load(tmp_path / "a.toml")
    with pytest.raises(SpecError, match="did you mean 'palimpsa'"):
        loads('name = "x"\nextends = "palimpsia"\n')
    with pytest.raises(SpecError, match="no 'parameters.nope' to remove"):
        loads('name = "x"\nextends = "palimpsa"\nremove = ["parameters.nope"]\n')


def test_a_base_of_one_name_may_extend_the_builtin_of_the_same_name(tmp_path):
    (tmp_path / "gla.toml").write_text('name = "gla"\nextends = "simple_gla"\n')
    assert load(tmp_path / "gla.toml").axes("state.S.update") == "kv"

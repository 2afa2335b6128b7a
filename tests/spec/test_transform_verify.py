"""Every transform of every built-in spec: says why not, or gives a spec that compiles and agrees with the oracle."""

from __future__ import annotations

import pytest

from dspace.math import analyse, canonical_hash
from dspace.spec import TRANSFORMS, Spec, builtin_names, load, loads
from dspace.spec.transforms import TransformError
from tests import cheap


@pytest.fixture(scope="module")
def made() -> dict[str, Spec]:
    found = {}
    for name in builtin_names():
        for transform, function in TRANSFORMS.items():
            try:
                found[f"{name}_{transform}"] = function(load(name))
            except TransformError as error:
                assert error.message and error.cure
    return found


def test_each_applies_somewhere_but_forget_to_prior(made):
    assert {t for t in TRANSFORMS if any(n.endswith(f"_{t}") for n in made)} == {*TRANSFORMS} - {"forget_to_prior"}
    assert len(made) >= 40


def test_results_are_files_that_mean_the_same(made):
    for spec in made.values():
        assert loads(spec.to_toml()).hash == spec.hash


def test_results_agree_with_the_oracle(made):
    zero = {n: s for n, s in made.items() if n.endswith("_forget_to_zero")}
    back = {f"{n}_back": TRANSFORMS["forget_to_prior"](s) for n, s in zero.items() if s.is_posterior}
    assert back
    told = cheap.verify({**made, **back})
    assert len(told) == len(made) + len(back)
    assert not [t for t in told if not t["passed"]]
    assert all(t["forms"] == ["chunk", "recurrent", "reference"] and t["gradients"] for t in told)


def mathematics(spec: Spec) -> str:
    return canonical_hash(analyse(spec).recurrence)


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("gated_delta_net per_channel", "kda"),
        ("simple_gla per_channel", "gla"),
        ("palimpsa per_channel", "metaplastic_gla"),
        ("mamba2 metaplastic non_metaplastic", "mamba2"),
        ("palimpsa non_metaplastic", "simple_gla"),
        ("simple_gla metaplastic", "palimpsa"),
        ("palimpsa forget_to_zero forget_to_prior", "palimpsa"),
        ("palimpsa forget_to_zero", "simple_gla metaplastic forget_to_zero"),
        ("palimpsa prior_mean", "simple_gla metaplastic prior_mean"),
        ("palimpsa variance_readout", "simple_gla metaplastic variance_readout"),
        ("palimpsa prior_mean variance_readout", "simple_gla metaplastic variance_readout prior_mean"),
    ],
)
def test_paths_that_meet(path, same):
    assert end_of(path) == end_of(same)


def test_the_prior_precision_is_per_channel_only_where_it_was_there_before():
    assert end_of("simple_gla per_channel metaplastic") != end_of("simple_gla metaplastic per_channel")


def end_of(path: str) -> str:
    start, *steps = path.split()
    spec = load(start)
    for step in steps:
        spec = TRANSFORMS[step](spec)
    return mathematics(spec)


def test_a_list_with_what_later_transforms_need():
    spec = loads("""
name = "x"
extends = "simple_gla"
transform = ["per_channel", "metaplastic", "prior_mean", "variance_readout"]
[parameters]
tau = { axes = "v", domain = "positive", init = 2.0 }
I_p = { axes = "k", domain = "positive" }
mu_p = { axes = "v" }
""")
    assert spec.parameters["tau"].axes == "v" and spec.parameters["mu_p"].axes == "v"
    assert spec.inputs["g"].axes == "k" and analyse(spec).classification.letter == "c"


def test_a_start_is_returned_to():
    spec = loads("""
name = "x"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "", domain = "nonpositive" }
[parameters]
m = "kv"
[state.S]
axes = "kv"
init = "m"
update = "exp(g) * S + v * k"
[readout]
output = "sum_k(S * q)"
""")
    back = TRANSFORMS["forget_to_prior"](spec)
    assert mathematics(TRANSFORMS["forget_to_zero"](back)) == mathematics(spec)
    assert mathematics(back) == mathematics(TRANSFORMS["prior_mean"](load("mamba2")))


MOMENTS = """
name = "moments"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "v", domain = "nonnegative" }
g = { axes = "", domain = "nonpositive" }
[parameters]
I_p = { axes = "", domain = "positive" }
[define]
new = "exp(g) * P + (1 - exp(g)) * I_p + b * k**2"
[state.P]
axes = "kv"
init = "I_p"
update = "new"
[state.mu]
axes = "kv"
update = "(exp(g) * P * mu + v * k) / new"
[readout]
output = "scale * sum_k(mu * q)"
variance = "scale**2 * sum_k(q**2 / P)"
"""


def test_a_mean_follows_the_precision_that_it_is_divided_by():
    """Stated by its moments, a posterior is forgotten to zero as a whole, not in its precision alone."""
    zero = TRANSFORMS["forget_to_zero"](loads(MOMENTS))
    assert mathematics(zero) == end_of("palimpsa forget_to_zero")
    assert mathematics(TRANSFORMS["forget_to_prior"](zero)) == end_of("palimpsa")
    scattered = MOMENTS.replace("/ new", "/ (exp(g) * P + b * k**2 + I_p * (1 - exp(g)) + 0 * I_p**2 + 1)")
    with pytest.raises(TransformError, match="the start of P in it"):
        TRANSFORMS["forget_to_zero"](loads(scattered))


def test_a_prior_that_forget_to_zero_does_not_know_is_not_called_forgotten():
    spec = load("simple_gla")
    for name in ("metaplastic", "prior_mean"):
        spec = TRANSFORMS[name](spec)
    with pytest.raises(TransformError, match="the readout adds I_p, mu_p to a state"):
        TRANSFORMS["forget_to_zero"](spec)
    with pytest.raises(TransformError, match="forgotten to zero already"):
        TRANSFORMS["forget_to_zero"](load("simple_gla"))

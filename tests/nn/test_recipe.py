"""Layer tables become plans; wrong ones are refused with a cure."""

from __future__ import annotations

import pytest

from dspace.errors import UserError
from dspace.nn.recipe import Declared, Slot, default_recipe, make_plan

Q, K, V = Declared("q", "k"), Declared("k", "k"), Declared("v", "v")
G = Declared("g", "", "nonpositive")


def test_every_bare_projection_is_one_slot():
    plan = make_plan([Q, V, G], {}, {"q": "silu(conv(linear)) + linear", "v": "conv(linear)", "g": "-exp(linear)"})
    assert plan.slots == [
        Slot("silu_conv", "key", "k"),
        Slot("plain", "key", "k"),
        Slot("conv", "value", "v"),
        Slot("plain", "value", ""),
    ]


def test_a_definition_lives_on_the_axes_common_to_its_users():
    layer = {"dt": "softplus(linear + dt_bias)", "v": "dt * conv(linear)", "g": "-dt * exp(A_log)"}
    plan = make_plan([V, G], {}, layer)
    assert [(name, axes) for name, _, axes, _ in plan.programs] == [("dt", ""), ("v", "v"), ("g", "")]
    f = {"f": "sigmoid(linear)", "k": "1 - f", "gk": "log(f)"}
    plan = make_plan([K, Declared("gk", "k", "nonpositive")], {}, f)
    assert plan.programs[0][:3] == ("f", "value", "k") and len(plan.slots) == 1


def test_a_definition_of_a_definition_is_narrowed_too_and_unused_ones_cost_nothing():
    layer = {"a": "linear", "c": "2 * a", "v": "c * linear", "g": "-exp(c)", "spare": "linear"}
    plan = make_plan([V, G], {}, layer)
    places = {name: axes for name, _, axes, _ in plan.programs}
    assert places == {"a": "", "c": "", "v": "v", "g": ""} and len(plan.slots) == 2


def test_write_gate_is_one_number_per_head_shared_by_all():
    plan = make_plan([V, Declared("b", "v", "nonnegative")], {}, {"v": "write_gate * linear", "b": "write_gate"})
    assert plan.programs[0][0] == "write_gate" and plan.programs[0][2] == ""
    assert len(plan.slots) == 2


def test_inputs_without_a_recipe_get_one_by_axes_and_domain():
    assert default_recipe(Q) == "l2norm(silu(conv(linear)))" and default_recipe(V) == "silu(conv(linear))"
    assert "dt_bias" in default_recipe(G) and default_recipe(Declared("b", "v", "nonnegative")) == "sigmoid(linear)"
    assert default_recipe(Declared("s", "")) == "linear"
    assert [p[0] for p in make_plan([Q, V, G], {}).programs] == ["q", "v", "g"]


@pytest.mark.parametrize(
    "layer, words",
    [
        ({"q": "linaer"}, ["'linaer'", "did you mean 'linear'"]),
        ({"q": "sulu(linear)"}, ["no function 'sulu'", "did you mean 'silu'"]),
        ({"q": "silu(linear, linear)"}, ["silu takes 1 argument"]),
        ({"a": "b", "b": "a", "q": "a"}, ["circle", "a -> b -> a"]),
        ({"q": "q * linear"}, ["circle", "q -> q"]),
    ],
)
def test_wrong_recipes_are_refused(layer, words):
    with pytest.raises(UserError) as error:
        make_plan([Q], {}, layer)
    assert all(word in str(error.value) for word in [*words, "cure:"])

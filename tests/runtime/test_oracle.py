"""The oracle against formulas written out by hand, on hand-built recurrences."""

from __future__ import annotations

import pytest
import sympy
import torch

from dspace.errors import CompilerBug, UserError
from dspace.math.ir import SCALE, Recurrence, State, SumK, SumV, Variable
from dspace.runtime.oracle import Coordinates, evaluate
from dspace.runtime.tape import Tape, place, unplace

Q, KEY = Variable("q", "k", "input"), Variable("k", "k", "input")
VALUE = Variable("v", "v", "input")
GATE = Variable("g", "", "input", "nonpositive")
GAIN = Variable("b", "v", "input", "nonnegative")
PRIOR = Variable("I_p", "", "parameter", "positive", init=1.0)


def affine() -> Recurrence:
    """``S = exp(g) S + v k``, ``o = scale * sum_k S q``."""
    state = State("S", "kv", sympy.Integer(0), sympy.Integer(0))
    state = State("S", "kv", sympy.Integer(0), sympy.exp(GATE.symbol) * state.symbol + VALUE.symbol * KEY.symbol)
    return Recurrence("affine", (Q, KEY, VALUE, GATE), (), (state,), SCALE.symbol * SumK(state.symbol * Q.symbol))


def posterior() -> Recurrence:
    """Mean and precision of the (v, k) posterior of THEORY.md 1.2, un-normalised."""
    mean, precision = sympy.Symbol("mean", real=True), sympy.Symbol("precision", real=True, positive=True)
    alpha, q, k, v = sympy.exp(GATE.symbol), Q.symbol, KEY.symbol, VALUE.symbol
    new = alpha * precision + (1 - alpha) * PRIOR.symbol + GAIN.symbol * k**2
    return Recurrence(
        "posterior",
        (Q, KEY, VALUE, GAIN, GATE),
        (PRIOR,),
        (
            State("mean", "kv", sympy.Integer(0), (alpha * precision * mean + v * k) / new),
            State("precision", "kv", PRIOR.symbol, new, "positive"),
        ),
        SCALE.symbol * SumK(mean * q),
        SCALE.symbol**2 * SumK(q**2 / precision),
    )


def draw(B: int = 2, T: int = 7, H: int = 2, K: int = 3, V: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(B, T, H, K, dtype=torch.float64),
        "k": torch.randn(B, T, H, K, dtype=torch.float64),
        "v": torch.randn(B, T, H, V, dtype=torch.float64),
        "b": torch.rand(B, T, H, V, dtype=torch.float64),
        "g": -torch.rand(B, T, H, dtype=torch.float64),
        "I_p": 0.5 + torch.rand(H, dtype=torch.float64),
    }


def test_affine_matches_einsum():
    x = draw()
    S = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    expected = []
    for t in range(7):
        S = x["g"][:, t].exp()[..., None, None] * S + torch.einsum("bhk,bhv->bhkv", x["k"][:, t], x["v"][:, t])
        expected.append(3**-0.5 * torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t]))
    found = evaluate(affine(), x)
    torch.testing.assert_close(found.output, torch.stack(expected, 1))
    torch.testing.assert_close(found.states[0], S)
    assert found.variance is None


def test_posterior_matches_information_form():
    x = draw()
    M = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    extra = torch.zeros_like(M)
    expected, variances = [], []
    for t in range(7):
        alpha = x["g"][:, t].exp()[..., None, None]
        M = alpha * M + torch.einsum("bhk,bhv->bhkv", x["k"][:, t], x["v"][:, t])
        extra = alpha * extra + torch.einsum("bhk,bhv->bhkv", x["k"][:, t] ** 2, x["b"][:, t])
        full = extra + x["I_p"][:, None, None]
        expected.append(0.5 * torch.einsum("bhkv,bhk->bhv", M / full, x["q"][:, t]))
        variances.append(0.25 * torch.einsum("bhkv,bhk->bhv", 1 / full, x["q"][:, t] ** 2))
    found = evaluate(posterior(), x, scale=0.5)
    torch.testing.assert_close(found.output, torch.stack(expected, 1))
    torch.testing.assert_close(found.variance, torch.stack(variances, 1))
    torch.testing.assert_close(found.states[0], M / full)
    torch.testing.assert_close(found.states[1], full)


def test_coordinates_translate_states_both_ways():
    source = posterior()
    mean, precision = (s.symbol for s in source.states)
    M, extra = sympy.Symbol("M", real=True), sympy.Symbol("Ibar", real=True)
    states = (State("M", "kv", sympy.Integer(0), M), State("Ibar", "kv", sympy.Integer(0), extra))
    both = Coordinates(
        source,
        source.replace(states=states),
        {"mean": M / (extra + PRIOR.symbol), "precision": extra + PRIOR.symbol},
        {"M": mean * precision, "Ibar": precision - PRIOR.symbol},
    )
    x = draw()
    whole = evaluate(source, x, coordinates=both)
    first = {n: t if n == "I_p" else t[:, :3] for n, t in x.items()}
    rest = {n: t if n == "I_p" else t[:, 3:] for n, t in x.items()}
    carried = evaluate(source, first, coordinates=both).states
    second = evaluate(source, rest, initial_states=carried, coordinates=both)
    torch.testing.assert_close(second.output, whole.output[:, 3:])
    for a, b in zip(second.states, whole.states, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_equals_separate_with_empty_sequence():
    x = draw(B=1)
    bounds = torch.tensor([0, 2, 2, 7])
    found = evaluate(posterior(), x, cu_seqlens=bounds)
    for n, (start, stop) in enumerate([(0, 2), (2, 2), (2, 7)]):
        part = evaluate(posterior(), {k: t if k == "I_p" else t[:, start:stop] for k, t in x.items()})
        torch.testing.assert_close(found.output[:, start:stop], part.output)
        for a, b in zip(found.states, part.states, strict=True):
            torch.testing.assert_close(a[n : n + 1], b)
    torch.testing.assert_close(found.states[1][1], x["I_p"][:, None, None].expand(2, 3, 5))


def test_read_before_and_grouped_heads():
    x = draw(H=2)
    shared = {**x, "q": x["q"][:, :, :1], "k": x["k"][:, :, :1]}
    repeated = {**shared, "q": shared["q"].repeat(1, 1, 2, 1), "k": shared["k"].repeat(1, 1, 2, 1)}
    before = affine().replace(read="before")
    found = evaluate(before, shared)
    torch.testing.assert_close(found.output, evaluate(before, repeated).output)
    assert found.output[:, 0].abs().max() == 0
    torch.testing.assert_close(found.states[0], evaluate(affine(), shared).states[0])


def test_gradients_pass_gradcheck():
    x = draw(B=1, T=3, H=1, K=2, V=2)
    names = list(x)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r = evaluate(posterior(), dict(zip(names, tensors, strict=True)))
        return (r.output, r.variance, *r.states)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in x.values()])


def test_empty_sequence_and_errors():
    assert evaluate(affine(), draw(T=0)).output.shape == (2, 0, 2, 5)
    with pytest.raises(UserError, match="channels on axis k"):
        evaluate(affine(), {**draw(), "k": torch.zeros(2, 7, 2, 4)})
    with pytest.raises(UserError, match="does not divide"):
        evaluate(affine(), {**draw(), "g": torch.zeros(2, 7, 3)})
    with pytest.raises(CompilerBug, match="erf"):
        Tape([sympy.erf(GATE.symbol)], {"k": 1, "v": 1})


def test_sums_count_axes_that_the_body_lacks():
    sizes = {"k": 3, "v": 5}
    one = torch.ones(2, 1, 1)
    table = [SumK(GATE.symbol), SumV(SumK(GATE.symbol)), sympy.Max(GATE.symbol, 2, 4), sympy.sqrt(GATE.symbol + 3)]
    got = Tape(table, sizes).run({GATE.name: one}, one)
    assert [float(g[0].max()) for g in got] == [3, 15, 4, 2]


@pytest.mark.parametrize("axes", ["", "k", "v", "kv"])
def test_place_and_unplace_are_inverse(axes: str):
    sizes = {"k": 3, "v": 5}
    tensor = torch.randn(2, 4, *(sizes[a] for a in axes))
    torch.testing.assert_close(unplace(place(tensor, axes), axes, sizes), tensor)

"""What people and machines are shown, and the limit in which forgetting dominates."""

from __future__ import annotations

import json

import pytest
import sympy
import torch
from variants import ALL, Tape

from dspace.math import analyse, show
from dspace.math.cost import K, V
from dspace.math.ir import SumK
from dspace.math.printing import latex_name, text_of
from dspace.math.stability import HORIZON, PHI, sentences, stationary
from dspace.spec import TRANSFORMS, load, loads, metaplastic


@pytest.mark.parametrize("name", ALL)
def test_everything_is_shown(name):
    analysis = analyse(ALL[name])
    text = show.text(analysis, passes=True)
    for part in ("class ", "why:", "runs:", "states", "readout", "gradients", "ranges", "cost", "passes"):
        assert part in text
    latex = show.latex(analysis)
    assert latex.count("{") == latex.count("}")
    assert "align*" in latex
    assert json.loads(json.dumps(show.as_dict(analysis)))["class"] == analysis.classification.letter


def test_text_of_formulas():
    k, q = sympy.symbols("k q", real=True)
    assert text_of(2 * SumK(k**2 * q)) == "2·Σₖ(k²·q)"


def test_latex_names():
    assert latex_name("Ibar") == r"\bar I"
    assert latex_name("I_p") == r"I_{\mathrm{p}}"
    assert latex_name("lam") == r"\lambda"


def test_delta_rules_say_that_they_run_sequentially():
    assert "sequential" in show.text(analyse(ALL["delta"]))


@pytest.mark.parametrize(
    ("axes", "words"), [("", "boundaries by matmul"), ("k", "boundaries by matmul"), ("kv", "composing")]
)
def test_ratios_say_how_their_chunks_begin(axes: str, words: str) -> None:
    spec = load("metaplastic_gla").to_toml().partition("[layer]")[0]
    changed = spec.replace('g = { axes = "k"', f'g = {{ axes = "{axes}"')
    assert axes == "k" or changed != spec
    assert words in show.text(analyse(loads(changed)))


@pytest.mark.parametrize(
    ("axes", "words"), [("", "chunkwise"), ("k", "chunkwise"), ("v", "composing"), ("kv", "composing")]
)
def test_decays_that_no_matmul_knows_are_said_to_be_composed(axes: str, words: str) -> None:
    spec = load("simple_gla").to_toml().partition("[layer]")[0].replace('g = { axes = ""', f'g = {{ axes = "{axes}"')
    assert words in show.text(analyse(loads(spec)))


def test_state_bytes():
    assert analyse(ALL["metaplastic"]).cost["state_bytes"] == 8 * K * V
    assert analyse(ALL["folded"]).cost["state_bytes"] == 4 * K * V + 4 * K


def test_importance_settles_where_theory_says():
    (found,) = stationary(analyse(ALL["metaplastic"]))
    I_p = ALL["metaplastic"].parameters[0].symbol
    assert found.state == "Ibar"
    assert found.stationary == HORIZON * PHI
    assert found.prior == I_p and found.ratio == HORIZON * PHI / I_p
    assert "forgetting dominates" in show.text(analyse(ALL["metaplastic"]))
    assert stationary(analyse(ALL["scalar"])) == ()


def test_forgetting_dominates_on_data():
    """The importance settles at N phi; where that is small the readout is its twin's, up to the first correction."""
    analysis = analyse(ALL["metaplastic"])
    (found,) = stationary(analysis)
    r = analysis.recurrence
    symbols = {x.name: x.symbol for x in (*r.variables, *r.states)}
    torch.manual_seed(0)
    sizes, decay, prior = {"k": 4, "v": 3}, 0.95, 2.0
    like = torch.zeros(1, 1, dtype=torch.float64)
    update = Tape([s.update for s in r.states], sizes)
    read = Tape([r.output, found.first_correction, found.divisor], sizes)
    for gain in (1e-4, 1e-2):
        M = Ibar = torch.zeros(4, 3, dtype=torch.float64)
        history = []
        for _ in range(600):
            k = torch.nn.functional.normalize(torch.randn(4, 1, dtype=torch.float64), dim=0)
            values = {
                "q": torch.randn(4, 1, dtype=torch.float64),
                "k": k,
                "v": torch.randn(1, 3, dtype=torch.float64),
                "b": torch.full((1, 3), gain, dtype=torch.float64),
                "g": like + sympy.log(decay),
                "I_p": like + prior,
                "scale": like + 0.5,
                "M": M,
                "Ibar": Ibar,
            }
            known = {symbols[n]: torch.as_tensor(x, dtype=torch.float64) for n, x in values.items()}
            M, Ibar = update.run(known, like)
            history.append(Ibar.mean())
        output, correction, divisor = read.run(known | {symbols["M"]: M, symbols["Ibar"]: Ibar}, like)
        expected = float(found.stationary.xreplace({HORIZON: 1 / (1 - decay), PHI: gain / 4}))
        assert abs(float(torch.stack(history[200:]).mean()) / expected - 1) < 0.05
        terms = 0.5 * M * values["q"] / prior  # of the twin's readout
        assert ((output - terms.sum(0)).abs() <= (terms * correction).abs().sum(0)).all()
        assert torch.allclose(1 / divisor * prior - 1, correction, rtol=0.1, atol=0)


def test_what_never_forgets_and_what_forgets_its_prior_is_said():
    endless = "\n".join(sentences(analyse(metaplastic(load("linear_attention")))))
    assert "never forgets" in endless and "t·φ ≪ I_p" in endless and "settles" not in endless
    without = "\n".join(sentences(analyse(TRANSFORMS["forget_to_zero"](load("palimpsa")))))
    assert "settles at N·φ: the prior is forgotten" in without and "forgetting dominates where" not in without
    assert "N·b ≪ K·I_p" in "\n".join(sentences(analyse(load("palimpsa"))))
    assert "b·(1 - exp(g))²" in "\n".join(sentences(analyse(metaplastic(load("hgrn2")))))


BAYES_DELTA = """
name = "bayes_delta"
[inputs]
q = "k"
k = "k"
v = "v"
beta = { axes = "", domain = "unit" }
g = { axes = "", domain = "nonpositive" }
[parameters]
I_p = { axes = "k", domain = "positive" }
[define]
Pn = "exp(g) * P + (1 - exp(g)) * I_p + beta * k**2"
D = "exp(g) * S"
[state.P]
axes = "k"
init = "I_p"
update = "Pn"
[state.S]
axes = "kv"
update = "D + beta * (v - sum_k(D * k)) * k / Pn"
[readout]
output = "scale * sum_k(S * q)"
"""


def test_a_precision_that_divides_what_is_written_settles_too():
    """In an error-correcting rule the precision preconditions the key: the same limit, on data."""
    analysis = analyse(loads(BAYES_DELTA))
    (found,) = stationary(analysis)
    assert found.place == "S" and str(found.prior) == "I_p" and found.stationary == HORIZON * PHI
    assert "the write to S is that of the twin" in "\n".join(sentences(analysis))
    r = analysis.recurrence
    decay, beta, x = 0.9, 0.2, 0.0
    P = next(s for s in r.states if s.name == found.state)
    update = sympy.lambdify([P.symbol, *(v.symbol for v in r.inputs if v.name in ("k", "beta", "g"))], P.update)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(4000):
        key = float(torch.randn((), generator=generator, dtype=torch.float64))
        x = float(update(x, key, beta, float(sympy.log(decay))))
        history.append(x)
    expected = float(found.stationary.xreplace({HORIZON: 1 / (1 - decay), PHI: beta * 1.0}))
    assert abs(sum(history[200:]) / len(history[200:]) / expected - 1) < 0.1

"""Random recurrences: analysis ends quickly, changes no value, and its gradients agree with autograd."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from test_gradients import check
from test_identities import run
from variants import build

from dspace.math import analyse, show
from dspace.math.ir import SumK

AXES = {"q": "k", "k": "k", "v": "v", "b": "v", "g": "", "p": "k", "P": "kv"}
UNARY = ["sigmoid({})", "tanh({})", "softplus({})", "abs({})", "exp(-abs({}))", "({})**2", "sqrt(1 + ({})**2)"]
BINARY = ["({} + {})", "({} - {})", "{} * {}", "minimum({}, {})", "maximum({}, {})", "{} / (1 + abs({}))"]


def formula(rng: random.Random, names: dict[str, str], depth: int) -> tuple[str, str]:
    """A random formula and its axes."""
    if depth == 0 or rng.random() < 0.15:
        name = rng.choice(list(names))
        return name, names[name]
    choice = rng.random()
    if choice < 0.2:
        inner, axes = formula(rng, names, depth - 1)
        if axes:
            axis = rng.choice(axes)
            return f"sum_{axis}({inner})/4", axes.replace(axis, "")
        return f"({inner})/2", axes
    if choice < 0.5:
        inner, axes = formula(rng, names, depth - 1)
        return rng.choice(UNARY).format(inner), axes
    left, a = formula(rng, names, depth - 1)
    right, b = formula(rng, names, depth - 1)
    return rng.choice(BINARY).format(left, right), "".join(x for x in "kv" if x in a + b)


def on(rng: random.Random, names: dict[str, str], depth: int, axes: str) -> str:
    text, found = formula(rng, names, depth)
    for axis in found:
        if axis not in axes:
            text = f"sum_{axis}({text})/4"
    return text


def recurrence(seed: int):
    rng = random.Random(seed)
    states = {f"S{i}": rng.choice(["kv", "kv", "k", "v", ""]) for i in range(rng.randint(1, 3))}
    names = {n: AXES[n] for n in AXES} | states
    decays = ["exp(g)*{}", "sigmoid(p)*{}", "0.5*{}", "{}"]
    coupled = seed % 2 == 1
    written = names if coupled else dict(AXES)
    updates = {}
    for name, axes in states.items():
        decay = rng.choice([d for d in decays if "p" not in d or "k" in axes or d[1] == "x"]).format(name)
        if "sigmoid(p)" in decay and "k" not in axes:
            decay = f"0.5*{name}"
        updates[name] = (axes, "0", f"{decay} + ({on(rng, written, rng.randint(1, 3), axes)})/8")
    output = (
        on(rng, names, 3, "v")
        + " + "
        + " + ".join({"kv": f"sum_k({n}*q)", "k": f"sum_k({n}*q)*v"}.get(a, f"{n}*v") for n, a in states.items())
    )
    inputs = {n: a for n, a in AXES.items() if n != "P"}
    return build(f"random_{seed}", updates, output, parameters={"P": "kv"}, **inputs)


@pytest.mark.parametrize("seed", range(60))
def test_random_recurrence(seed):
    source = recurrence(seed)
    start = time.process_time()
    analysis = analyse(source)
    assert time.process_time() - start < 3
    show.text(analysis)
    check(analysis.recurrence, 1e-9)
    for a, b in zip(run(source, 5), run(analysis.recurrence, 5), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_plans_read_the_same_recurrence(seed):
    """Decay, writes and reads of an affine recurrence, put together again, are the recurrence."""
    r = analyse(recurrence(seed)).recurrence
    c = analyse(r).classification
    assert c.affine is not None
    states = tuple(
        replace(s, update=a.decay * s.symbol + sum(w.key * w.value for w in a.writes))
        for s, a in zip(r.states, c.affine, strict=True)
    )
    output = r.output
    if c.readout is not None:
        symbols = {s.name: s.symbol for s in r.states}
        bodies = {
            x.symbol: x.body if x.queries is None else sum(q * symbols[n] for n, q in x.queries.items())
            for x in c.readout.reads
        }
        output = c.readout.output.xreplace({x: SumK(b) for x, b in bodies.items()})
    for a, b in zip(run(r, 5), run(replace(r, states=states, output=output), 5), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)

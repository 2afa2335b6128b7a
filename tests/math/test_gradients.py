"""Symbolic gradients of one token against torch autograd through the oracle's interpreter, in float64."""

from __future__ import annotations

import pytest
import sympy
import torch
from variants import ALL, Tape

from dspace.math import analyse
from dspace.math.gradients import adjoint, new_symbol, pull_back, pull_readout, pull_update, sum_over
from dspace.math.ir import SumK, SumV

SIZES = {"k": 3, "v": 2}


def draw(variable, generator) -> torch.Tensor:
    shape = [SIZES[a] if a in variable.axes else 1 for a in "kv"]
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    if variable.domain in ("positive", "nonnegative"):
        x = x.abs() + 0.1
    elif variable.domain in ("negative", "nonpositive"):
        x = -x.abs() - 0.1
    elif variable.domain == "unit":
        x = torch.sigmoid(x)
    return x.requires_grad_()


def check(recurrence, tolerance=1e-10):
    generator = torch.Generator().manual_seed(0)
    values = {v.symbol: draw(v, generator) for v in (*recurrence.variables, *recurrence.states)}
    like = torch.zeros(1, 1, dtype=torch.float64)
    updated = Tape([s.update for s in recurrence.states], SIZES).run(values, like)
    new = {}
    for s, u in zip(recurrence.states, updated, strict=True):
        new[s.symbol] = u.expand([SIZES[a] if a in s.axes else 1 for a in "kv"])
    seen = values if recurrence.read == "before" else values | new
    readouts = [recurrence.output] + ([recurrence.variance] if recurrence.variance is not None else [])
    results = [r.expand(1, SIZES["v"]) for r in Tape(readouts, SIZES).run(seen, like)] + list(new.values())
    result = adjoint(recurrence)
    cotangents = [torch.randn(r.shape, dtype=torch.float64, generator=generator) for r in results]
    expected = torch.autograd.grad(results, list(values.values()), cotangents, allow_unused=True)
    known = dict(values)
    known |= {c.symbol: x for c, x in zip(result.cotangents, cotangents, strict=True)}
    known |= {new_symbol(s): new[s.symbol] for s in recurrence.states}
    known = {k: x.detach() for k, x in known.items()}
    found = Tape(list(result.wrt.values()), SIZES).run(known, like)
    for (name, value), want, x in zip(zip(result.wrt, found, strict=True), expected, values.values(), strict=True):
        want = torch.zeros_like(x) if want is None else want
        error = (value - want).abs().max() / (1 + want.abs().max())
        assert error < tolerance, f"{recurrence.name}: gradient of {name} is off by {error}"


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_autograd_in_source_coordinates(name):
    check(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_autograd_in_normal_coordinates(name):
    check(analyse(ALL[name]).recurrence)


def test_factors_without_the_axis_leave_the_sum():
    k, v = sympy.symbols("k v", real=True)
    table = {k: "k", v: "v"}
    assert sum_over(k * v, "k", table) == v * SumK(k)
    assert sum_over(k * v, "kv", table) == SumK(k) * SumV(v)


def test_gradient_of_a_broadcast_symbol_is_contracted():
    k, c, d = sympy.symbols("k c d", real=True)
    table = {k: "k", c: "", d: "k"}
    assert pull_back([(c * k, d, "k")], table) == {k: c * d, c: SumK(d * k)}


def test_sum_over_an_axis_that_the_body_lacks_counts_it():
    c, d = sympy.symbols("c d", real=True)
    assert pull_back([(SumK(c), d, "")], {c: "", d: ""}) == {c: SumK(d)}


def test_readout_and_update_apart_make_the_whole():
    r = analyse(ALL["metaplastic"]).recurrence
    readout, update = pull_readout(r), pull_update(r)
    swap = {}
    for s in r.states:
        d = sympy.Symbol(f"d_{s.name}", real=True)
        swap[d] = d + readout.get(new_symbol(s), sympy.S.Zero)
    whole = adjoint(r).wrt
    b = next(x for x in r.inputs if x.name == "b").symbol
    assert update[b].xreplace(swap) == whole["b"]


def test_the_variant_that_reads_before_gives_its_readout_gradient_to_the_previous_state():
    wrt = adjoint(ALL["before"]).wrt
    assert sympy.Symbol("d_output", real=True) in wrt["S"].free_symbols
    assert not any(x.name.endswith("_new") for e in wrt.values() for x in e.free_symbols)

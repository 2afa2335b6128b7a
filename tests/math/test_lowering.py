"""From a posterior approximation to states with updates."""

from __future__ import annotations

import pytest

from dspace.math import analyse, lower
from dspace.spec import from_dict

CONSTANT = {
    "name": "constant",
    "inputs": {"q": "k", "k": "k", "v": "v", "g": {"axes": "", "domain": "nonpositive"}},
    "parameters": {"I_p": {"axes": "k", "domain": "positive", "init": 2.0}},
    "prior": {"precision": "I_p"},
    "forgetting": {"retain": "exp(g)"},
    "mean": {"evidence": "v * k"},
    "readout": {"output": "scale * sum_k(mean * q)"},
}


@pytest.mark.parametrize(
    ("place", "formula"),
    [("variance", "scale**2 * sum_k(q**2 / precision)"), ("output", "sum_k(mean * q / sqrt(precision))")],
)
def test_a_constant_precision_can_be_read(place, formula):
    """It is the prior's, and no state."""
    spec = from_dict({**CONSTANT, "readout": CONSTANT["readout"] | {place: formula}})
    recurrence = lower(spec)
    assert [s.name for s in recurrence.states] == ["mean"]
    read = recurrence.output if place == "output" else recurrence.variance
    assert "I_p" in {x.name for x in read.free_symbols} and "precision" not in {x.name for x in read.free_symbols}
    assert analyse(spec).classification.letter == "a"

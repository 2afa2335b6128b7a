"""Chunkwise Triton of rank-one transitions: interpreted against float64; which recurrences have it, and which do not."""

from __future__ import annotations

import pytest

import dspace.math
import dspace.spec
from dspace.plan.delta import delta_plan
from dspace.runtime import offline
from tests.emit.interpreting import interpreted as run
from tests.emit.triton_interpreted import build

HEAD = """
name = "tried"
[inputs]
q = "k"
k = "k"
p = "k"
v = "v"
beta = { axes = "", domain = "unit" }
g = { axes = "", domain = "nonpositive" }
w = { axes = "k", domain = "nonpositive" }
[state.S]
axes = "kv"
"""
STEP = "beta / (1 + sum_k(k**2))"
"""A step that keeps the transition's norm below one, whatever the key: drawn ones are not of unit length."""
UPDATES = {
    "decayed": f"exp(g) * S + {STEP} * k * (v - sum_k(exp(g) * S * k))",
    "not decayed where it is read": f"exp(g) * S + {STEP} * k * (v - sum_k(S * k))",
    "channels": f"exp(w) * S + {STEP} * k * (v - sum_k(exp(w) * S * k))",
    "no decay": f"S + {STEP} * k * (v - sum_k(S * k))",
    "another probe": "exp(g) * S + beta * k / (1 + sum_k(k**2) + sum_k(p**2)) * (tanh(v) + sum_k(S * p))",
    "other keys": f"exp(w) * S + {STEP} * tanh(k) * (v * g - sum_k(S * tanh(k)) / 2)",
}
READS = {"after": "scale * sum_k(S * q)", "before": "scale * sum_k(S * q) + v * sum_k(q * k)"}
ODD = {"k": 20, "v": 24}


def text(update: str, read: str = "after") -> str:
    used = [line for line in HEAD.splitlines() if " = " not in line or _used(line.split(" = ")[0], update)]
    return "\n".join(used) + f'\nupdate = "{update}"\n[readout]\nread = "{read}"\noutput = "{READS[read]}"\n'


def _used(name: str, update: str) -> bool:
    return (
        name in ("name", "axes", "q", "k", "v", "beta")
        or f"({name})" in update
        or f"* {name}" in update
        or f"{name}**" in update
    )


CASES = {
    **{f"{name}, packed": (text(update), 75, ODD, True, {}) for name, update in UPDATES.items()},
    "one token": (text(UPDATES["decayed"]), 1, {"k": 48, "v": 40}, False, {}),
    "many channels": (text(UPDATES["channels"]), 34, {"k": 100, "v": 16}, False, {}),
    "read before": (text(UPDATES["decayed"], "before"), 75, ODD, True, {}),
    "read before, channels": (text(UPDATES["channels"], "before"), 40, ODD, False, {}),
    "no states given or wanted": (text(UPDATES["decayed"]), 75, ODD, True, {"lean": True}),
    "no states, channels": (text(UPDATES["channels"]), 75, ODD, True, {"lean": True}),
    "operators": (text(UPDATES["decayed"]), 40, ODD, False, {"operators": True}),
    "operators, no decay": (text(UPDATES["no decay"]), 40, ODD, False, {"operators": True}),
    "gates that keep all or nothing": (text(UPDATES["decayed"]), 75, ODD, True, {"gates": [0.0, -60.0]}),
    "channels that keep all or nothing": (text(UPDATES["channels"]), 75, ODD, True, {"gates": [0.0, -60.0]}),
    "chunks of 32": (text(UPDATES["decayed"]), 75, ODD, True, {"settings": {"_CHUNKS": 32}}),
    "chunks of 64, channels": (text(UPDATES["channels"]), 130, ODD, False, {"settings": {"_CHUNKS": 64}}),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    fields = ("spec", "steps", "sizes", "packed")
    asked = [{"id": n, "delta": True, **dict(zip(fields, c[:4], strict=True)), **c[4]} for n, c in CASES.items()]
    return run("triton_interpreted.py", asked)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_every_gradient_match_float64(interpreted: dict[str, dict[str, float]], case: str) -> None:
    limit = 2e-4 if "all or nothing" in case else 5e-6  # sums of log decays lose digits to the steps that forget all
    assert len(interpreted[case]) > 5
    assert not {name: error for name, error in interpreted[case].items() if not error < limit}


@pytest.mark.parametrize("name", UPDATES)
def test_what_is_read_comes_before_the_decay(name: str) -> None:
    plan = delta_plan(dspace.math.analyse(dspace.spec.loads(text(UPDATES[name]))))
    assert plan is not None and set(plan.probes) == {"S"}


@pytest.mark.parametrize(
    "update",
    [
        "exp(g) * S + v * k - beta * p * sum_k(S * p)",  # what is erased lies elsewhere than what is written
        "exp(g) * S + tanh(v * k) - beta * k * sum_k(S * k)",  # what is written is no product
        "exp(g) * S + v * k + tanh(v) * p - beta * k * sum_k(S * k)",  # two writes
        "(1 - beta) * g * S + k * (v - sum_k(S * k))",  # a decay without a logarithm
    ],
)
def test_others_run_token_by_token(update: str) -> None:
    spec = dspace.spec.loads(text(update))
    analysis = dspace.math.analyse(spec)
    assert analysis.classification.letter == "d" and delta_plan(analysis) is None


def test_no_length_compiles_anything_anew_and_nothing_known_to_be_wrong_is_compiled() -> None:
    """One chunk and many: the number of chunks, too, is no part of what a kernel is compiled for."""
    made = build(text(UPDATES["channels"]), delta=True)
    made._CORES["cuda", "recurrent"] = made._CORES["cuda", "chunk"]
    tried = {n: offline.launches_of(made, B=1, T=n, H=2, K=64, V=64) for n in (2, 32, 33, 1000)}
    assert len({tuple(sorted(x.key for x in found)) for found in tried.values()}) == 1
    kernels = [x for x in tried[33] if "erase" in x.name]
    assert {x.options["REVERSE"] for x in kernels if "REVERSE" in x.options} == {False, True}
    reports = [offline.build(x, "sm_90") for x in kernels]
    assert len(reports) == 3 and not [b for b in reports if b.faults or b.spilled > 64]

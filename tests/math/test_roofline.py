"""Costs on a named GPU: what limits each class, how the time grows, what is refused."""

from __future__ import annotations

import pytest
import sympy

from dspace.errors import UserError
from dspace.math import analyse
from dspace.math.cost import K, V
from dspace.math.roofline import GPUS, Sizes, costs_of, estimate, find_gpu, special
from dspace.spec import builtin_names, load


def of(name: str, gpu: str = "H100", **sizes: int):
    return estimate(costs_of(analyse(load(name))), find_gpu(gpu), Sizes(**sizes))


def test_every_builtin_spec_has_a_time_on_every_gpu():
    for name in builtin_names():
        costs = costs_of(analyse(load(name)))
        for gpu in GPUS.values():
            found = estimate(costs, gpu)
            assert 0 < found.seconds < 1 and found.limit in ("bandwidth", "tensor", "fp32", "special")


def test_special_functions_are_counted_once():
    assert special(analyse(load("palimpsa")).recurrence) == sympy.expand(K * V + 1)
    assert special(analyse(load("metaplastic_gla")).recurrence) == sympy.expand(K * V + K)
    assert special(analyse(load("simple_gla")).recurrence) == 1
    assert special(analyse(load("palimpsa_folded")).recurrence) == K + 1
    assert V not in special(analyse(load("gla")).recurrence).free_symbols


def test_a_division_per_entry_of_the_state_costs_more_than_a_matmul():
    assert of("palimpsa").seconds > 3 * of("simple_gla").seconds
    assert of("palimpsa").limit in ("fp32", "special")
    assert of("palimpsa_folded").seconds < of("palimpsa").seconds / 3


def test_a_hand_count():
    tokens, heads = 1000, 2
    found = of("simple_gla", tokens=tokens, heads=heads, K=64, V=64)
    # q, k, v, o and one gate in bfloat16, and a boundary state in float32 written and read once a chunk of 64
    moved = 2 * (3 * 64 + 1 + 64) + 2 * 4 * 64 * 64 / 64
    assert found.bytes == pytest.approx(tokens * heads * moved)
    assert found.state_bytes == heads * 4 * 64 * 64
    assert found.limit == "bandwidth" and found.seconds == pytest.approx(found.bytes / GPUS["H100"].bandwidth)


def test_time_is_linear_in_tokens_and_falls_with_the_gpu():
    assert of("palimpsa", tokens=2000).seconds == pytest.approx(2 * of("palimpsa", tokens=1000).seconds)
    assert of("gla", "h200").seconds < of("gla", "A100").seconds
    assert find_gpu("rtx 4090").name == "RTX4090"


def test_what_is_not_known_is_refused():
    with pytest.raises(UserError, match="did you mean 'H100'"):
        find_gpu("H10O")
    with pytest.raises(UserError, match="at least 1"):
        Sizes(K=0)
    with pytest.raises(UserError, match="numbers, K, V, C"):
        estimate({"flops": "exit(1)", "flops_tensor": "0", "bytes": "1", "state_bytes": "1"}, find_gpu("H100"))

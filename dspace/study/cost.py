"""What a composed point would cost on a named GPU, before anything is trained: a measure and a limit of studies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspace.study.schema import CostTable, ModelTable


@dataclass(frozen=True)
class Cost:
    """``gpu_ms``: expected milliseconds of one forward pass of the recurrences of all layers over the batch of
    ``[cost]``; ``state_bytes`` of one sequence, all layers and heads; ``limit``: the resource that takes the time."""

    gpu: str
    gpu_ms: float
    state_bytes: float
    limit: str


def expected(costs: Mapping[str, Any], table: CostTable, model: ModelTable) -> Cost:
    """Cost of a variant with these formulas (:func:`dspace.math.roofline.costs_of`) in this model."""
    from dspace.math.roofline import Sizes, estimate, find_gpu

    keys = model.head_dim or model.hidden_size // model.num_heads
    sizes = Sizes(
        K=max(keys, 1),
        V=max(int(keys * model.expand_v), 1),
        heads=model.num_v_heads or model.num_heads,
        tokens=table.tokens,
    )
    found = estimate(costs, find_gpu(table.gpu), sizes)
    layers = model.num_layers
    return Cost(found.gpu, 1e3 * layers * found.seconds, layers * found.state_bytes, found.limit)


def refusal(table: CostTable, cost: Cost) -> str:
    """Which limit of ``[cost]`` the point exceeds, in words; empty where it exceeds none."""
    if table.max_ms is not None and cost.gpu_ms > table.max_ms:
        return f"{cost.gpu_ms:.4g} ms expected on {cost.gpu}, more than max_ms = {table.max_ms:g}"
    if table.max_state_bytes is not None and cost.state_bytes > table.max_state_bytes:
        return f"{cost.state_bytes:.0f} bytes of state, more than max_state_bytes = {table.max_state_bytes:g}"
    return ""

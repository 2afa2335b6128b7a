"""What a variant costs on a named GPU before it is built: the slowest of memory, tensor cores, fp32 and special functions.

A lower bound from counted work and vendors' peak rates, for ranking and for constraints: kernels reach a part of it.
The counts are those of :mod:`dspace.math.cost` with the algorithm of the variant's class; an overlap of the four
resources is assumed to be perfect.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dspace.errors import UserError
from dspace.spec.syntax import Binary, Name, Node, Number, Unary, parse

if TYPE_CHECKING:
    import sympy

    from dspace.math.ir import Analysis, Recurrence


@dataclass(frozen=True)
class Gpu:
    """Peak rates per second of one GPU: bytes of memory, dense bfloat16 tensor FLOP, fp32 FLOP, special functions."""

    name: str
    bandwidth: float
    tensor: float
    fp32: float
    special: float


def _special(multiprocessors: int, clock: float) -> float:
    """Special functions (exp2, reciprocal, ...) per second: 16 a cycle on each multiprocessor."""
    return 16.0 * multiprocessors * clock


GPUS: dict[str, Gpu] = {
    g.name: g
    for g in (
        Gpu("A100", 2.04e12, 312e12, 19.5e12, _special(108, 1.41e9)),
        Gpu("H100", 3.35e12, 989e12, 67e12, _special(132, 1.83e9)),
        Gpu("H200", 4.8e12, 989e12, 67e12, _special(132, 1.83e9)),
        Gpu("B200", 8.0e12, 2250e12, 75e12, _special(148, 1.85e9)),
        Gpu("L40S", 0.864e12, 362e12, 91.6e12, _special(142, 2.52e9)),
        Gpu("RTX4090", 1.008e12, 165e12, 82.6e12, _special(128, 2.52e9)),
    )
}
"""SXM boards where there are several; data sheets' dense peaks at boost clocks."""

RESOURCES = {"bytes": "bandwidth", "flops_tensor": "tensor", "flops_fp32": "fp32", "special": "special"}


@dataclass(frozen=True)
class Sizes:
    """Channels of one head, heads, tokens of a batch altogether, and the chunk of the chunkwise forms."""

    K: int = 64
    V: int = 64
    heads: int = 16
    tokens: int = 65_536
    chunk: int = 64

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1:
            raise UserError(f"sizes must be at least 1, not {asdict(self)}\n  cure: give positive sizes")


@dataclass(frozen=True)
class Estimate:
    """``seconds`` of one forward pass of one layer's recurrence; ``limit`` is the resource that takes them.

    ``state_bytes`` are those of one sequence, all heads; the other counts are of the whole batch.
    """

    gpu: str
    seconds: float
    limit: str
    state_bytes: float
    flops: float
    bytes: float
    special: float

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in any case. Raises UserError for one that is not in the table."""
    wanted = name.upper().replace(" ", "").replace("-", "")
    if wanted in GPUS:
        return GPUS[wanted]
    near = difflib.get_close_matches(wanted, GPUS, 1)
    hint = f"\n  did you mean {near[0]!r}?" if near else ""
    raise UserError(f"no peak rates are known of {name[:40]!r}{hint}\n  cure: one of {', '.join(GPUS)}")


def estimate(costs: Mapping[str, Any], gpu: Gpu, sizes: Sizes | None = None) -> Estimate:
    """Time of a variant whose ``costs`` (see :func:`costs_of`) are formulas in K, V and C per token and head."""
    sizes = sizes or Sizes()
    places = {"K": sizes.K, "V": sizes.V, "C": sizes.chunk}
    value = {name: _value(parse(str(text)), places) for name, text in costs.items()}
    value["flops_fp32"] = value["flops"] - value["flops_tensor"]
    amount = sizes.heads * sizes.tokens
    times = {rate: amount * value.get(count, 0.0) / getattr(gpu, rate) for count, rate in RESOURCES.items()}
    limit = max(times, key=lambda rate: times[rate])
    return Estimate(
        gpu.name,
        times[limit],
        limit,
        sizes.heads * value["state_bytes"],
        amount * value["flops"],
        amount * value["bytes"],
        amount * value.get("special", 0.0),
    )


def costs_of(analysis: Analysis) -> dict[str, str]:
    """Cost formulas of a variant as text: those of ``analysis.cost`` and the special functions of a token."""
    return {name: str(e) for name, e in analysis.cost.items()} | {"special": str(special(analysis.recurrence))}


def special(recurrence: Recurrence) -> sympy.Expr:
    """Special functions per token and head: divisions, roots and transcendental functions, each distinct one once."""
    import sympy

    from dspace.math.cost import size
    from dspace.math.functions import Sigmoid, Softplus
    from dspace.math.ir import axes_of

    table = recurrence.axes_table()
    kinds = (sympy.exp, sympy.log, sympy.tanh, Sigmoid, Softplus)
    found: set[sympy.Expr] = set()
    for expr in [*(s.update for s in recurrence.states), recurrence.output]:
        for e in sympy.preorder_traversal(expr):
            if isinstance(e, kinds):
                found.add(e)
            elif e.is_Pow and not (e.exp.is_Integer and e.exp > 0) and e.base.free_symbols:
                found.add(e.base)  # one reciprocal serves every power
    return sympy.expand(sympy.Add(*(size(axes_of(e, table)) for e in found)))


_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}


def _value(node: Node, places: Mapping[str, int]) -> float:
    match node:
        case Number(value):
            return float(value)
        case Name(name) if name in places:
            return float(places[name])
        case Unary("-", operand):
            return -_value(operand, places)
        case Binary(op, left, right):
            return _OPERATIONS[op](_value(left, places), _value(right, places))
    raise UserError(f"a cost has numbers, K, V, C and + - * / ** only, not {node!r}")

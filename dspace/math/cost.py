"""State bytes, floating-point operations and memory traffic of one token of one head, in the sizes K, V and chunk C."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from dspace.math.ir import Axes, Classification, Recurrence, SumK, SumV, axes_of, join_axes

K, V, C = sympy.symbols("K V C", positive=True, integer=True)
SIZES = {"k": K, "v": V}

STATE_BYTES = 4
"""States are float32."""
ELEMENT_BYTES = 2
"""Inputs and outputs in bfloat16."""


def size(axes: Axes) -> sympy.Expr:
    """Number of elements on ``axes``."""
    return sympy.Mul(*(SIZES[a] for a in axes))


def cost(recurrence: Recurrence, classification: Classification) -> Mapping[str, sympy.Expr]:
    """``state_bytes``; ``flops`` and ``bytes`` per token and head; ``flops_tensor``: those that are matmuls.

    A division, an exponential or a comparison counts as one operation; a multiply-add as two.
    """
    state_bytes = STATE_BYTES * sympy.Add(*(size(s.axes) for s in recurrence.states))
    moved = sympy.Add(*(size(v.axes) for v in recurrence.inputs)) + V
    if recurrence.variance is not None:
        moved += V
    traffic = ELEMENT_BYTES * moved
    elementwise = sequential_flops(recurrence)
    if classification.letter in ("a", "b", "fold"):
        large = sum(1 for s in recurrence.states if s.axes == "kv")
        small = [s for s in recurrence.states if s.axes != "kv"]
        reads = len(classification.readout.reads) if classification.readout else 1
        matmul = large * (2 * C * (K + V) * reads + 4 * K * V)
        rest = sympy.Add(*(4 * size(s.axes) for s in small)) + 2 * K + 2 * V
        traffic += 2 * STATE_BYTES * large * K * V / C
        return {"state_bytes": state_bytes, "flops": matmul + rest, "flops_tensor": matmul, "bytes": traffic}
    if classification.letter == "c":
        large = sum(1 for s in recurrence.states if s.axes == "kv")
        matmul = 2 * large * K * V
        traffic += 2 * STATE_BYTES * large * K * V / C
        return {
            "state_bytes": state_bytes,
            "flops": elementwise + matmul,
            "flops_tensor": matmul,
            "bytes": sympy.expand(traffic),
        }
    return {"state_bytes": state_bytes, "flops": elementwise, "flops_tensor": sympy.S.Zero, "bytes": traffic}


def sequential_flops(recurrence: Recurrence) -> sympy.Expr:
    """Operations of one token as the recurrence states it; equal sub-expressions are counted once."""
    table = recurrence.axes_table()
    seen: set[sympy.Expr] = set()
    total = sympy.S.Zero

    def visit(e: sympy.Expr) -> None:
        nonlocal total
        if e in seen or not e.args:
            return
        seen.add(e)
        for a in e.args:
            visit(a)
        if isinstance(e, (SumK, SumV)):
            total += size(axes_of(e.args[0], table))
        elif e.is_Add or e.is_Mul:
            # A product is formed from its narrowest factors outwards.
            axes: Axes = ""
            first = True
            for a in sorted(e.args, key=lambda x: len(axes_of(x, table))):
                axes = join_axes(axes, axes_of(a, table))
                if not first and a != -1:
                    total += size(axes)
                first = False
        else:
            total += size(axes_of(e, table))

    for expr in [*(s.update for s in recurrence.states), recurrence.output]:
        visit(expr)
    return sympy.expand(total)

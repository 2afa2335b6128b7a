"""A plain evaluation of a recurrence, sharing nothing with printers and plans: the measure of these tests."""

from __future__ import annotations

import sympy
import torch

from dspace.math.functions import Sigmoid, Softplus
from dspace.math.ir import Recurrence, SumK, SumV

_ALIGN = {"": (..., None, None), "k": (..., slice(None), None), "v": (..., None, slice(None)), "kv": (...,)}


def value(expr: sympy.Expr, known: dict[sympy.Symbol, torch.Tensor], sizes: tuple[int, int]) -> torch.Tensor:
    """``expr`` on tensors aligned to ``[B, H, K or 1, V or 1]``."""
    if expr.is_Symbol:
        return known[expr]
    if expr.is_number:
        return torch.full((1, 1, 1, 1), float(expr), dtype=torch.float64)
    args = [value(a, known, sizes) for a in expr.args]
    if expr.is_Add or expr.is_Mul:
        result = args[0]
        for a in args[1:]:
            result = result + a if expr.is_Add else result * a
        return result
    if expr.is_Pow:
        return args[0] ** float(expr.exp)
    for kind, dim, size in ((SumK, 2, sizes[0]), (SumV, 3, sizes[1])):
        if isinstance(expr, kind):
            return args[0].expand(*args[0].shape[:dim], size, *args[0].shape[dim + 1 :]).sum(dim, keepdim=True)
    simple = {
        sympy.exp: torch.exp,
        sympy.log: torch.log,
        sympy.tanh: torch.tanh,
        sympy.Abs: torch.abs,
        Sigmoid: lambda x: 1 / (1 + torch.exp(-x)),
        Softplus: lambda x: torch.log(1 + torch.exp(x)),
    }
    if expr.func in simple:
        return simple[expr.func](args[0])
    result = args[0]
    for a in args[1:]:
        result = (torch.maximum if expr.func is sympy.Max else torch.minimum)(*torch.broadcast_tensors(result, a))
    return result


def evaluate(r: Recurrence, inputs, parameters, states, scale: float, variance: bool):
    """One unpacked batch in float64: ``[o, (variance), *final states]``."""
    k = next(t.shape[-1 if v.axes == "k" else -2] for v, t in zip(r.inputs, inputs, strict=True) if "k" in v.axes)
    v = next(t.shape[-1] for x, t in zip(r.inputs, inputs, strict=True) if "v" in x.axes)
    sizes = (k, v)
    full = {
        s.symbol: (*states[0].shape[:2], *(n if a in s.axes else 1 for a, n in zip("kv", sizes, strict=True)))
        for s in r.states
    }
    now = {s.symbol: t.double()[_ALIGN[s.axes]] for s, t in zip(r.states, states, strict=True)}
    fixed = {p.symbol: t.double()[_ALIGN[p.axes]][None] for p, t in zip(r.parameters, parameters, strict=True)}
    fixed[sympy.Symbol("scale", positive=True)] = torch.full((1, 1, 1, 1), scale, dtype=torch.float64)
    read = [r.output, r.variance] if variance else [r.output]
    rows: list[list[torch.Tensor]] = [[] for _ in read]
    for t in range(inputs[0].shape[1]):
        token = {x.symbol: a.double()[:, t][_ALIGN[x.axes]] for x, a in zip(r.inputs, inputs, strict=True)}
        new = {s.symbol: value(s.update, fixed | token | now, sizes).expand(full[s.symbol]) for s in r.states}
        seen = fixed | token | (new if r.read == "after" else now)
        for row, expr in zip(rows, read, strict=True):
            shape = (inputs[0].shape[0], inputs[0].shape[2], 1, v)
            row.append(value(expr, seen, sizes).expand(shape)[:, :, 0])
        now = new
    strip = {"": (..., 0, 0), "k": (..., 0), "v": (..., 0, slice(None)), "kv": (...,)}
    return [torch.stack(row, 1) for row in rows] + [now[s.symbol][strip[s.axes]] for s in r.states]

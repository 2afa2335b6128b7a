"""The metaplastic transform and its inverse (arXiv:2602.09075)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from dspace.math.ir import SumK, SumV, Write
from dspace.spec.model import STRUCTURES, Spec
from dspace.spec.printing import formula
from dspace.spec.syntax import Binary, Name, Node, parse
from dspace.spec.transforms.base import TransformError, axes_in, factorise, free_name, query_of, rebuild

GAIN, PRIOR, SUFFIX = "b", "I_p", "_importance"
"""Names that the metaplastic transform gives to the importance gain, the prior precision, the new state."""


def metaplastic(spec: Spec) -> Spec:
    """Give every entry of a linear state an importance that accumulates, decays and slows its reading.

    For ``M_t = T_t M_{t-1} + f(v) g(k)`` with a diagonal ``T_t``: adds ``Ibar_t = T_t Ibar_{t-1} + b g(k)**2``
    with ``b >= 0`` gated like the write, a prior ``I_p > 0``, and reads ``M / (Ibar + I_p)`` instead of ``M``
    (arXiv:2602.09075). At ``b = 0, I_p = 1`` it is the identity. Raises TransformError where the transition
    is not diagonal, the write does not factorise, or the precision is learned already.
    """
    gain, prior = free_name(spec, GAIN, "inputs"), free_name(spec, PRIOR, "parameters")
    tables = spec.to_dict()
    tables.setdefault("parameters", {})
    tables["inputs"].setdefault(gain, {"axes": "v", "domain": "nonnegative", "doc": "importance gain of this write"})
    tables["parameters"].setdefault(prior, {"axes": "", "domain": "positive", "init": 1.0, "doc": "prior precision"})
    gain_axes, prior_axes = tables["inputs"][gain]["axes"], tables["parameters"][prior]["axes"]
    if spec.is_posterior:
        write = factorise(spec.expr("mean.evidence"), spec)
        _importance_of_posterior(spec, tables, write, gain, prior, gain_axes, prior_axes)
    else:
        write = _importance_of_recurrence(spec, tables, gain, prior, gain_axes)
    if spec.layer and gain not in spec.layer:
        low_rank = "low_rank" if gain_axes else "linear"
        recipe = f"sigmoid({low_rank}) * softplus(head_scale)"
        gates = _gates(spec, write.value)
        tables["layer"] = {**spec.layer, gain: " * ".join([*gates, recipe])}
    return rebuild(spec, tables)


def _importance_of_posterior(
    spec: Spec, tables: dict[str, Any], write: Write, gain: str, prior: str, gain_axes: str, prior_axes: str
) -> None:
    if not spec.expr("precision.evidence").is_zero:
        raise TransformError(
            "the metaplastic transform needs a constant precision, and this posterior learns one already",
            "remove the transform, or set [precision] structure = 'constant' and evidence = '0'",
        )
    if spec.expr("prior.precision") == 1:
        tables["prior"] = {**tables.get("prior", {}), "precision": prior}
    else:  # the file has a prior precision of its own: nothing to add
        prior_axes = spec.axes("prior.precision")
        if prior not in spec.parameters:
            del tables["parameters"][prior]
    total = set(gain_axes) | set(prior_axes) | set(spec.axes("forgetting.retain")) | set(axes_in(write.key, spec))
    structure = next(name for name, axes in STRUCTURES.items() if set(axes) == total)
    tables["precision"] = {"structure": structure, "evidence": formula(sympy.Symbol(gain) * write.key**2)}


def _importance_of_recurrence(spec: Spec, tables: dict[str, Any], gain: str, prior: str, gain_axes: str) -> Write:
    matrices = [name for name, state in spec.state.items() if state.axes == "kv"]
    learned = find_importance(spec)
    if learned is not None:
        raise TransformError(
            f"{learned.state} is read over an importance, {learned.importance}, already",
            "remove the transform",
        )
    if len(spec.state) != 1 or not matrices:
        raise TransformError(
            f"the metaplastic transform needs one state on 'kv', this spec has {len(spec.state)} states"
            if len(spec.state) != 1
            else f"the metaplastic transform needs a state on 'kv', not on {next(iter(spec.state.values())).axes!r}",
            "state the metaplastic variant by hand, with [state.NAME] for each importance",
        )
    name = matrices[0]
    state = spec.state_symbols[name]
    update = spec.expr(f"state.{name}.update")
    if spec.expr(f"state.{name}.init") != 0:
        raise TransformError("the state must start at 0", "remove its init")
    if any(state in node.free_symbols for node in update.atoms(SumK, SumV)):
        raise TransformError(
            f"the transition of {name} is not diagonal: its update contracts the state (a rank-1 erase, as in"
            " delta rules), and an elementwise importance would not follow it",
            "keep a precision over k only and divide the key by it, k / P: a recurrence with a state P on 'k'",
        )
    transition = sympy.simplify(sympy.diff(update, state))
    if state in transition.free_symbols:
        raise TransformError(f"the update of {name} is not linear in {name}", "the transform needs T * S + write")
    write = factorise(sympy.simplify(update - transition * state), spec)
    importance = f"{name}{SUFFIX}"
    new = sympy.Symbol(importance)
    total = set(gain_axes) | set(axes_in(transition, spec)) | set(axes_in(write.key, spec))
    axes = "".join(a for a in "kv" if a in total)
    tables["state"] = dict(tables["state"])
    tables["state"][importance] = {
        "axes": axes,
        "update": formula(transition * new + sympy.Symbol(gain) * write.key**2),
        "domain": "nonnegative",
        "doc": f"importance of {name} beyond the prior",
    }
    read = state / (new + sympy.Symbol(prior))
    readout = {**tables["readout"], "output": formula(spec.expr("readout.output").subs(state, read))}
    if spec.readout.variance is not None:
        readout["variance"] = formula(spec.expr("readout.variance").subs(state, read))
    else:
        query = query_of(spec.expr("readout.output"), state)
        if query is not None:
            coefficient, inner = query
            readout["variance"] = formula(coefficient**2 * SumK(inner**2 / (new + sympy.Symbol(prior))))
    tables["readout"] = readout
    return write


def _gates(spec: Spec, value: sympy.Expr) -> list[str]:
    """Factors per head by which the layer gates what is written: importance is gated by the same ones."""
    names = [s.name for s in sorted(value.free_symbols, key=lambda s: s.name) if s.name in spec.layer]
    gates: list[str] = []
    for name in names:
        for factor in _factors(parse(spec.layer[name])):
            if isinstance(factor, Name) and (factor.id == "write_gate" or factor.id in spec.layer):
                gates.append(factor.id)
    return list(dict.fromkeys(gates))


def _factors(node: Node) -> list[Node]:
    if isinstance(node, Binary) and node.op == "*":
        return [*_factors(node.left), *_factors(node.right)]
    return [node]


@dataclass(frozen=True)
class Importance:
    """How a recurrence reads ``S / (X + p)``: names of the state ``S``, of its importance ``X``, the prior's symbol."""

    state: str
    importance: str
    prior: sympy.Symbol


def find_importance(spec: Spec) -> Importance | None:
    """The state that a recurrence reads divided by an accumulated importance, or None."""
    if spec.is_posterior:
        return None
    output = spec.expr("readout.output")
    priors = [p.symbol for p in spec.parameter_variables if p.domain == "positive"]
    matrices = [n for n, s in spec.state.items() if s.axes == "kv"]
    for importance in spec.state:
        x = spec.state_symbols[importance]
        for prior in priors:
            total = sympy.Dummy(positive=True)
            read = output.xreplace({x: total - prior})
            if x not in output.free_symbols or prior in read.free_symbols:
                continue
            for name in matrices:
                if name != importance and _coupled(spec, name, importance, read, total):
                    return Importance(name, importance, prior)
    return None


def _coupled(spec: Spec, name: str, importance: str, read: sympy.Expr, total: sympy.Symbol) -> bool:
    """Whether both are kept alike, neither feeds the other, and the output reads their ratio."""
    s, x = spec.state_symbols[name], spec.state_symbols[importance]
    update, growth = spec.expr(f"state.{name}.update"), spec.expr(f"state.{importance}.update")
    if x in update.free_symbols or s in growth.free_symbols or spec.expr(f"state.{importance}.init") != 0:
        return False
    if sympy.simplify(sympy.diff(update, s) - sympy.diff(growth, x)) != 0:
        return False
    return _in_ratio(read, s, total)


def _in_ratio(read: sympy.Expr, state: sympy.Symbol, total: sympy.Symbol) -> bool:
    """Whether the state is read over ``total`` only; what has no state in it may read ``total`` too, as a variance does."""
    swap = {state: sympy.Dummy(real=True) * total}
    if total not in read.xreplace(swap).free_symbols:
        return True
    sums = [n for n in read.atoms(SumK, SumV) if state in n.free_symbols]
    rest = read.xreplace({n: sympy.Dummy(real=True) for n in sums})
    return state not in rest.free_symbols and not any(total in n.xreplace(swap).free_symbols for n in sums)


def non_metaplastic(spec: Spec) -> Spec:
    """The inverse of :func:`metaplastic`: no importance is learned, the state is read as it is.

    A posterior gets a constant precision of 1; of a recurrence the importance state goes, and with it whatever only
    the importance used. The variance goes too: it would be the same for every state. Raises TransformError where no
    importance is learned.
    """
    tables = spec.to_dict()
    readout = {k: v for k, v in tables["readout"].items() if k != "variance"}
    if spec.is_posterior:
        if spec.expr("precision.evidence").is_zero:
            raise TransformError("the precision of this posterior is constant already", "remove the transform")
        precision = spec.state_symbols["precision"]
        output = spec.expr("readout.output")
        if precision in output.free_symbols:
            readout["output"] = formula(output.xreplace({precision: sympy.S.One}))
        tables.pop("precision")
        tables["prior"] = {k: v for k, v in tables.get("prior", {}).items() if k != "precision"}
    else:
        found = find_importance(spec)
        if found is None:
            raise TransformError(
                "no state is read as S / (X + p) with an importance X that is kept as S is, and a prior p > 0",
                "remove the transform, or state the variant without importance by hand",
            )
        x = spec.state_symbols[found.importance]
        readout["output"] = formula(spec.expr("readout.output").xreplace({x: 1 - found.prior}))
        tables["state"] = {n: s for n, s in tables["state"].items() if n != found.importance}
    tables["readout"] = readout
    return rebuild(spec, tables)

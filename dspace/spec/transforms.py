"""Named transforms: pure functions from one spec to another.

A transform takes a spec of valid shape and returns a complete one, in the same form as it came. What it adds
may be declared beforehand in the same file under the names given below; such a declaration is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import sympy

from dspace.errors import UserError
from dspace.math.ir import SumK, SumV, Write, axes_of
from dspace.spec.expressions import nearest
from dspace.spec.model import STRUCTURES, Spec
from dspace.spec.printing import formula
from dspace.spec.syntax import Binary, Name, Node, parse

if TYPE_CHECKING:
    from dspace.spec.reader import Source


class TransformError(UserError):
    """A transform does not apply to a spec; ``cure`` says what would."""

    def __init__(self, message: str, cure: str) -> None:
        super().__init__(f"{message}\n  cure: {cure}")
        self.message = message
        self.cure = cure


GAIN, PRIOR, SUFFIX = "b", "I_p", "_importance"
"""Names that the metaplastic transform gives to the importance gain, the prior precision, the new state."""


def metaplastic(spec: Spec) -> Spec:
    """Give every entry of a linear state an importance that accumulates, decays and slows its reading.

    For ``M_t = T_t M_{t-1} + f(v) g(k)`` with a diagonal ``T_t``: adds ``Ibar_t = T_t Ibar_{t-1} + b g(k)**2``
    with ``b >= 0`` gated like the write, a prior ``I_p > 0``, and reads ``M / (Ibar + I_p)`` instead of ``M``
    (arXiv:2602.09075). At ``b = 0, I_p = 1`` it is the identity. Raises TransformError where the transition
    is not diagonal, the write does not factorise, or the precision is learned already.
    """
    gain, prior = _free_name(spec, GAIN, "inputs"), _free_name(spec, PRIOR, "parameters")
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
    from dspace.spec.reader import from_dict

    return from_dict(tables)


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
    total = set(gain_axes) | set(prior_axes) | set(spec.axes("forgetting.retain")) | set(_axes(write.key, spec))
    structure = next(name for name, axes in STRUCTURES.items() if set(axes) == total)
    tables["precision"] = {"structure": structure, "evidence": formula(sympy.Symbol(gain) * write.key**2)}


def _importance_of_recurrence(spec: Spec, tables: dict[str, Any], gain: str, prior: str, gain_axes: str) -> Write:
    matrices = [name for name, state in spec.state.items() if state.axes == "kv"]
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
    total = set(gain_axes) | set(_axes(transition, spec)) | set(_axes(write.key, spec))
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
        query = _query(spec.expr("readout.output"), state)
        if query is not None:
            coefficient, inner = query
            readout["variance"] = formula(coefficient**2 * SumK(inner**2 / (new + sympy.Symbol(prior))))
    tables["readout"] = readout
    return write


def _query(output: sympy.Expr, state: sympy.Symbol) -> tuple[sympy.Expr, sympy.Expr] | None:
    """``(c, q)`` of an output ``c * sum_k(q * state)`` exactly of that shape, else None."""
    sums = [n for n in output.atoms(SumK) if state in n.free_symbols]
    if len(sums) != 1:
        return None
    coefficient = sympy.diff(output.subs(sums[0], _HOLE), _HOLE)
    inner = sums[0].args[0]
    query = sympy.diff(inner, state)
    if coefficient.has(state, _HOLE) or query.has(state) or sympy.expand(inner - query * state) != 0:
        return None
    return coefficient, query


_HOLE = sympy.Dummy("hole", real=True)


def factorise(write: sympy.Expr, spec: Spec) -> Write:
    """Write term as ``value * key``: factors that carry ``k`` make the key, all others the value."""
    factors = sympy.Mul.make_args(sympy.factor_terms(write))
    if any(_axes(f, spec) == "kv" for f in factors):
        factors = sympy.Mul.make_args(sympy.factor(write))
    key, value = sympy.Integer(1), sympy.Integer(1)
    for factor in factors:
        axes = _axes(factor, spec)
        if axes == "kv":
            raise TransformError(
                f"the write {formula(write)} does not factorise into f(v) * g(k)",
                "write one outer product per token, such as v * k",
            )
        if "k" in axes:
            key *= factor
        else:
            value *= factor
    return Write(key=key, value=value)


def _axes(expr: sympy.Expr, spec: Spec) -> str:
    table = {v.symbol: v.axes for v in spec.variables.values()}
    table |= {s: (spec.state[n].axes if n in spec.state else "kv") for n, s in spec.state_symbols.items()}
    return axes_of(expr, table)


def _free_name(spec: Spec, wanted: str, table: str) -> str:
    """``wanted``, unless the formulas already use that name for something else."""
    used = spec.meanings.used
    candidates = [wanted, f"{wanted}_meta", f"{wanted}_meta2"]
    taken = {*spec.inputs, *spec.parameters, *spec.define, *spec.state, *spec.layer}
    for name in candidates:
        if name in getattr(spec, table) and name not in used:
            return name  # declared for the transform
        if name not in taken and name not in used:
            return name
    raise TransformError(f"the names {', '.join(candidates)} are taken", "rename one of them")


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


TRANSFORMS: dict[str, Callable[[Spec], Spec]] = {"metaplastic": metaplastic}
"""Transforms by the name that a spec file gives them."""


def apply_transforms(tables: dict[str, Any], names: Any, sources: list[Source]) -> dict[str, Any]:
    """Tables after the named transforms. Raises SpecError with the place of ``transform``."""
    from dspace.errors import Problem, SpecError
    from dspace.spec.check import Report, check
    from dspace.spec.reader import locator, validate

    def fail(message: str, cure: str, suggestion: str = "") -> NoReturn:
        at = locator(sources)("transform", 1)
        raise SpecError([Problem(message, where="transform", cure=cure, suggestion=suggestion, **at)])

    names = [names] if isinstance(names, str) else names
    known = ", ".join(TRANSFORMS)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        fail("the name of a transform, or a list of names, is expected here", f"choose from {known}")
    for name in names:
        if name not in TRANSFORMS:
            fail(f"unknown transform {name[:40]!r}", f"choose from {known}", nearest(name, TRANSFORMS))
        report = Report(locator(sources))
        spec = validate(tables, report)
        spec.__dict__["meanings"] = check(spec, report, unused=False)
        try:
            tables = TRANSFORMS[name](spec).to_dict()
        except TransformError as error:
            fail(f"{name}: {error.message}", error.cure)
    return tables

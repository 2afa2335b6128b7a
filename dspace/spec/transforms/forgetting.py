"""What is forgotten towards what, and how finely: per_channel, forget_to_zero, forget_to_prior."""

from __future__ import annotations

from typing import Any

import sympy

from dspace.math.ir import join_axes
from dspace.spec.model import STRUCTURES, Spec
from dspace.spec.printing import formula
from dspace.spec.syntax import Binary, Call, Name, Node, Unary, unparse, walk
from dspace.spec.transforms.base import TransformError, rebuild, retention, towards
from dspace.spec.transforms.metaplasticity import find_importance


def per_channel(spec: Spec) -> Spec:
    """One retention for each key channel instead of one per head; likewise the prior precision where there is one.

    Every input and parameter without axes that the retention is made of gets the axis ``k``; recipes of the layer
    project to it through a low rank. With all channels equal it is the spec that it came from. Raises TransformError
    where nothing is forgotten or every key channel has its own retention already.
    """
    gates = _retention_variables(spec)
    scalars = [name for name in gates if "k" not in spec.variables[name].axes]
    if not gates:
        raise TransformError(
            "nothing is forgotten: the retention is a constant", "multiply the state by exp(g) with an input g"
        )
    if not scalars:
        raise TransformError("the retention is per key channel already", "remove the transform")
    tables = spec.to_dict()
    prior = _prior_parameter(spec)
    for name in [*scalars, *([prior] if prior else [])]:
        table = tables["inputs"] if name in spec.inputs else tables["parameters"]
        entry: dict[str, Any] = {**table[name], "axes": join_axes(table[name]["axes"], "k")}
        if entry.get("doc"):
            entry["doc"] += ", per key channel"
        table[name] = entry
    if spec.is_posterior and spec.structure in ("scalar", "value"):
        axes = join_axes(STRUCTURES[spec.structure], "k")
        wider = next(name for name, a in STRUCTURES.items() if a == axes)
        tables["precision"] = {**tables["precision"], "structure": wider}
    symbols = {spec.variables[name].symbol for name in scalars}
    for name, state in spec.state.items():
        if "k" not in state.axes and symbols & spec.expr(f"state.{name}.update").free_symbols:
            tables["state"][name] = {**tables["state"][name], "axes": join_axes(state.axes, "k")}
    for name in scalars:
        if name in spec.layer:
            tables["layer"][name] = unparse(_projected(_inlined(spec.meanings.layer[name], spec)))
    return rebuild(spec, tables)


def _retention_variables(spec: Spec) -> list[str]:
    if spec.is_posterior:
        kept = [spec.expr("forgetting.retain")]
    else:
        found = [retention(spec.expr(f"state.{n}.update"), s) for n, s in spec.state_symbols.items()]
        kept = [k for k, state in zip(found, spec.state.values(), strict=True) if k is not None and state.axes == "kv"]
    used = {s for k in kept for s in k.free_symbols}
    return [name for name, v in spec.variables.items() if v.symbol in used]


def _prior_parameter(spec: Spec) -> str:
    """Name of the parameter that is the prior precision and has no axis ``k`` yet, or empty."""
    symbol: Any = spec.expr("prior.precision") if spec.is_posterior else None
    if not spec.is_posterior:
        found = find_importance(spec)
        symbol = found.prior if found and spec.state[found.importance].axes.startswith("k") else None
    named = symbol is not None and symbol.is_Symbol and "k" not in spec.variables[symbol.name].axes
    return symbol.name if named else ""


def _inlined(node: Node, spec: Spec) -> Node:
    """A recipe with the shared definitions in it written out: they would keep one number per head."""
    match node:
        case Name(name) if name in spec.meanings.layer and name not in spec.inputs:
            return _inlined(spec.meanings.layer[name], spec)
        case Unary(op, operand, column):
            return Unary(op, _inlined(operand, spec), column)
        case Binary(op, left, right, column):
            return Binary(op, _inlined(left, spec), _inlined(right, spec), column)
        case Call(func, args, column):
            return Call(func, tuple(_inlined(a, spec) for a in args), column)
    return node


def _projected(node: Node) -> Node:
    """The same recipe through a low rank, unless it has one."""
    if any(isinstance(n, Name) and n.id == "low_rank" for n in walk(node)):
        return node
    match node:
        case Name("linear", column):
            return Name("low_rank", column)
        case Unary(op, operand, column):
            return Unary(op, _projected(operand), column)
        case Binary(op, left, right, column):
            return Binary(op, _projected(left), _projected(right), column)
        case Call(func, args, column):
            return Call(func, tuple(_projected(a) for a in args), column)
    return node


def forget_to_zero(spec: Spec) -> Spec:
    """The prior enters at the start only and is forgotten like everything else.

    A posterior keeps ``retain * precision`` and ``retain * precision * mean``; a recurrence whose state returns to a
    start other than zero no longer does; of one that is read as ``S / (X + p)`` the importance starts at ``p`` and
    decays to zero. Raises TransformError where nothing is forgotten, or where that is so already.
    """
    tables = spec.to_dict()
    _must_forget(spec)
    if spec.is_posterior:
        if spec.forgetting is not None and spec.forgetting.target == "zero":
            raise TransformError("the past is forgotten to zero already", "remove the transform")
        if spec.structure == "constant" and spec.expr("prior.mean") == 0:
            raise TransformError(
                "with a constant precision and a prior mean of 0, forgetting to the prior is forgetting to zero",
                "remove the transform, or apply metaplastic or prior_mean before",
            )
        tables["forgetting"] = {**tables.get("forgetting", {}), "target": "zero"}
        return rebuild(spec, tables)
    moved: dict[str, sympy.Expr] = {}
    for name in spec.state:
        start, update = spec.expr(f"state.{name}.init"), spec.expr(f"state.{name}.update")
        if start.is_Symbol and start in update.free_symbols:
            moved[name] = update.xreplace({start: sympy.S.Zero})
    _rewrite(spec, tables, moved)
    changed = bool(moved)
    found = find_importance(spec)
    if found is not None:
        x = spec.state_symbols[found.importance]
        entry = {**tables["state"][found.importance], "init": found.prior.name, "domain": "positive"}
        entry["axes"] = join_axes(entry["axes"], spec.variables[found.prior.name].axes)
        tables["state"][found.importance] = entry
        new = sympy.Symbol(found.importance, positive=True)
        for key in ("output", "variance"):
            if key in tables["readout"]:
                read = spec.expr(f"readout.{key}").xreplace({x: new - found.prior})
                tables["readout"] = {**tables["readout"], key: formula(read)}
        changed = True
    if not changed:
        _refuse_what_is_not_seen(spec)
    if not changed:
        raise TransformError(
            "no state returns to a start other than zero: what is forgotten is forgotten to zero already",
            "remove the transform, or apply prior_mean or metaplastic before",
        )
    return rebuild(spec, tables)


def _refuse_what_is_not_seen(spec: Spec) -> None:
    """Raises TransformError where a prior may well be there, but not in a form that forget_to_zero knows."""
    cure = "apply forget_to_zero before the transforms that brought the prior in (prior_mean, for one)"
    for name in spec.state:
        start, update = spec.expr(f"state.{name}.init"), spec.expr(f"state.{name}.update")
        if start.free_symbols & update.free_symbols:
            raise TransformError(
                f"state {name} starts at {formula(start)}, and what its update gives back of that is not to be told from "
                "the rest",
                cure,
            )
    output, states = spec.expr("readout.output"), set(spec.state_symbols.values())
    added = {
        p.name
        for term in output.atoms(sympy.Add)
        if term.free_symbols & states
        for p in spec.parameter_variables
        for part in term.args
        if p.symbol in part.free_symbols and not part.free_symbols & states
    }
    if added:
        raise TransformError(
            f"the readout adds {', '.join(sorted(added))} to a state in a way that is not known as a prior", cure
        )


def forget_to_prior(spec: Spec) -> Spec:
    """What is forgotten returns to the prior: the power prior of a posterior, the start of a recurrence's states.

    Raises TransformError where nothing is forgotten, or where that is so already.
    """
    tables = spec.to_dict()
    _must_forget(spec)
    if spec.is_posterior:
        if spec.forgetting is None or spec.forgetting.target == "prior":
            raise TransformError("the past is tempered towards the prior already", "remove the transform")
        tables["forgetting"] = {k: v for k, v in tables["forgetting"].items() if k != "target"}
        return rebuild(spec, tables)
    moved: dict[str, sympy.Expr] = {}
    for name, state in spec.state_symbols.items():
        start, update = spec.expr(f"state.{name}.init"), spec.expr(f"state.{name}.update")
        kept = retention(update, state)
        if start == 0 or kept is None or kept == 1 or start.free_symbols & update.free_symbols:
            continue
        moved[name] = towards(update, state, kept, start)
    _rewrite(spec, tables, moved)
    if not moved:
        raise TransformError(
            "no state has a start other than zero that it does not return to",
            "remove the transform, or give a state an init, or apply prior_mean before",
        )
    return rebuild(spec, tables)


def _rewrite(spec: Spec, tables: dict[str, Any], moved: dict[str, sympy.Expr]) -> None:
    """Give states new updates, also where another state's update has theirs in it (a mean divided by its precision).

    Raises TransformError where the start that they are forgotten to enters another state in some other way.
    """
    swap = {spec.expr(f"state.{name}.update"): update for name, update in moved.items()}
    for name in spec.state:
        old = spec.expr(f"state.{name}.update")
        new = moved[name] if name in moved else old.xreplace(swap)
        if name not in moved:
            for other in moved:
                state, start = spec.state_symbols[other], spec.expr(f"state.{other}.init")
                shared = start.free_symbols & old.free_symbols
                if state in old.free_symbols and shared and new == old:
                    raise TransformError(
                        f"the update of {name} has the start of {other} in it beside {other} itself",
                        f"write the new value of {other} as a definition, and name it in the update of {name}",
                    )
        if new != old:
            tables["state"][name] = {**tables["state"][name], "update": formula(new)}


def _must_forget(spec: Spec) -> None:
    if not _retention_variables(spec):
        raise TransformError("nothing is forgotten: the retention is a constant", "add a retention such as exp(g)")

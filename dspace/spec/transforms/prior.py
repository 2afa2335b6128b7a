"""A learned prior mean: where the map from keys to values starts, and what it is forgotten to."""

from __future__ import annotations

import sympy

from dspace.spec.model import Spec
from dspace.spec.printing import formula
from dspace.spec.transforms.base import TransformError, free_name, rebuild, retention, towards
from dspace.spec.transforms.metaplasticity import find_importance

MEAN = "mu_p"


def prior_mean(spec: Spec) -> Spec:
    """A learned prior mean ``mu_p`` on ``kv`` instead of 0; at ``mu_p = 0`` it is the identity.

    A posterior takes it as its prior. The state of a recurrence starts there and returns there as it forgets; one that
    is read as ``S / (X + p)`` is read as ``(S + p * mu_p) / (X + p)``. Raises TransformError where there is a prior
    mean already, or no single state on ``kv`` that is kept linearly.
    """
    name = free_name(spec, MEAN, "parameters")
    tables = spec.to_dict()
    declared = tables.setdefault("parameters", {})
    declared.setdefault(name, {"axes": "kv", "init": 0.0, "doc": "prior mean of the map from key to value"})
    mean = sympy.Symbol(name, real=True)
    if spec.is_posterior:
        if spec.expr("prior.mean") != 0:
            raise TransformError("the posterior has a prior mean already", "remove the transform")
        tables["prior"] = {**tables.get("prior", {}), "mean": name}
        return rebuild(spec, tables)
    found = find_importance(spec)
    matrices = [n for n, s in spec.state.items() if s.axes == "kv"]
    if found is None and (len(spec.state) != 1 or not matrices):
        raise TransformError(
            f"a prior mean needs one state on 'kv', or two that are read as S / (X + p); this spec has the states"
            f" {', '.join(spec.state)}",
            "state the prior mean by hand, as init and in the update",
        )
    state_name = found.state if found else matrices[0]
    state = spec.state_symbols[state_name]
    if spec.expr(f"state.{state_name}.init") != 0:
        raise TransformError(f"the state {state_name} has a start of its own already", "remove its init")
    if found is not None:
        shifted = formula(spec.expr("readout.output").xreplace({state: state + found.prior * mean}))
        tables["readout"] = {**tables["readout"], "output": shifted}
        return rebuild(spec, tables)
    update = spec.expr(f"state.{state_name}.update")
    kept = retention(update, state)
    if kept is None:
        raise TransformError(f"the update of {state_name} is not linear in it", "state the prior mean by hand")
    entry = {**tables["state"][state_name], "init": name}
    if kept != 1:
        entry["update"] = formula(towards(update, state, kept, mean))
    tables["state"] = {**tables["state"], state_name: entry}
    return rebuild(spec, tables)

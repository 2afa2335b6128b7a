"""The posterior variance used in the readout: what is uncertain is read softly."""

from __future__ import annotations

import sympy

from dspace.math.ir import SCALE, SumK
from dspace.spec.model import Spec
from dspace.spec.printing import formula
from dspace.spec.transforms.base import TransformError, free_name, query_of, rebuild

TAU = "tau"


def variance_readout(spec: Spec) -> Spec:
    """Scale the output by ``tau / (tau + s)``, ``s`` the posterior variance of the read, ``tau > 0`` a parameter.

    ``s`` is the spec's variance without ``scale**2``; where a posterior states none it is derived from its output
    ``sum_k(mean * q)`` as ``sum_k(q**2 / precision)``. As ``tau`` grows it becomes the identity. Raises TransformError
    where there is no variance.
    """
    name = free_name(spec, TAU, "parameters")
    if name in spec.meanings.used:
        raise TransformError("the output is scaled by the variance already", "remove the transform")
    output = spec.expr("readout.output")
    tables = spec.to_dict()
    if spec.readout.variance is not None:
        spread = sympy.simplify(spec.expr("readout.variance") / SCALE.symbol**2)
        if SCALE.symbol in spread.free_symbols:
            spread = spec.expr("readout.variance")
    elif spec.is_posterior and spec.structure != "constant":
        query = query_of(output, spec.state_symbols["mean"])
        if query is None:
            raise TransformError(
                "the variance of this output is not known: it is not c * sum_k(mean * q)",
                "state [readout] variance",
            )
        spread = SumK(query[1] ** 2 / spec.state_symbols["precision"])
    else:
        raise TransformError(
            "this variant has no posterior variance", "apply metaplastic before, or state [readout] variance"
        )
    states = set(spec.state_symbols.values())
    if not spread.free_symbols & states:
        raise TransformError("the variance does not depend on what was seen", "apply metaplastic before")
    declared = tables.setdefault("parameters", {})
    declared.setdefault(
        name, {"axes": "", "domain": "positive", "init": 1.0, "doc": "variance at which the output is halved"}
    )
    tau = sympy.Symbol(name, positive=True)
    tables["readout"] = {**tables["readout"], "output": formula(output * tau / (tau + spread))}
    return rebuild(spec, tables)

"""A point -> the spec that it names."""

from __future__ import annotations

from typing import Any

from dspace.errors import UserError
from dspace.space.points import FORGETTING_AXES, PRIOR_AXES, Point, why_not
from dspace.spec import Spec, from_dict

_EVIDENCE = {
    ("constant", "none"): "0",
    ("scalar", "gain"): "b",
    ("scalar", "energy"): "b * sum_k(k**2)",
    ("key", "gain"): "b_k",
    ("key", "energy"): "b * k**2",
    ("value", "gain"): "b_v",
    ("value", "energy"): "b_v * sum_k(k**2)",
    ("key_value", "gain"): "b_v * b_k",
    ("key_value", "energy"): "b_v * k**2",
}
_RETAIN = {"none": "1", "head": "exp(-rate)", "token": "exp(g)", "token_key": "exp(g)"}


def compose(point: Point) -> Spec:
    """The spec of ``point``, complete with the recipes of a layer. Raises UserError where it is no variant."""
    reason = why_not(point)
    if reason:
        raise UserError(f"{point} is not a variant: {reason}\n  cure: another choice on one of these axes")
    tables = _declarations(point)
    tables.update(_corrected(point) if point.correction == "delta" else _posterior(point))
    return from_dict(tables, name="_".join(["point", *_letters(point)]), prune=True)


def _letters(point: Point) -> list[str]:
    return [
        {"key_value": "kv"}.get(point.structure, point.structure),
        point.evidence,
        {"token_key": "tk"}.get(point.forgetting, point.forgetting),
        f"to_{point.target}",
        {"head": "ph", "key": "pk", "value": "pv"}[point.prior_precision],
        {"zero": "m0", "learned": "m"}[point.prior_mean],
        {"none": "write", "delta": "delta"}[point.correction],
        {"mean": "o", "uncertain": "u"}[point.readout],
    ]


def _declarations(point: Point) -> dict[str, Any]:
    """All that a point may use, with its recipes: what is unused is pruned."""
    gate_axes = FORGETTING_AXES[point.forgetting]
    projection = "low_rank" if gate_axes else "linear"
    gain = "write_gate * sigmoid({}) * softplus(head_scale)"
    return {
        "title": f"A point of the space: {point}",
        "inputs": {
            "q": "k",
            "k": "k",
            "v": "v",
            "b": {"axes": "", "domain": "nonnegative", "doc": "importance gain of this write"},
            "b_v": {"axes": "v", "domain": "nonnegative", "doc": "importance gain of this write"},
            "b_k": {"axes": "k", "domain": "nonnegative", "doc": "importance gain of each key channel"},
            "beta": {"axes": "", "domain": "unit", "doc": "step size of the correction"},
            "g": {"axes": gate_axes, "domain": "nonpositive", "doc": "log retention"},
        },
        "parameters": {
            "rate": {"axes": "", "domain": "nonnegative", "init": 0.05, "doc": "rate of forgetting per token"},
            "I_p": {
                "axes": PRIOR_AXES[point.prior_precision],
                "domain": "positive",
                "init": 1.0,
                "doc": "prior precision",
            },
            "mu_p": {"axes": "kv", "init": 0.0, "doc": "prior mean of the map from key to value"},
            "tau": {"axes": "", "domain": "positive", "init": 1.0, "doc": "variance at which the output is halved"},
        },
        "layer": {
            "q": "l2norm(silu(conv(linear)))",
            "k": "l2norm(silu(conv(linear)))",
            "v": "write_gate * silu(conv(linear))",
            "b": gain.format("linear"),
            "b_v": gain.format("low_rank"),
            "b_k": gain.format("low_rank"),
            "beta": "sigmoid(linear)",
            "g": f"-softplus({projection} + dt_bias) * exp(A_log)",
        },
    }


def _readout(point: Point, mean: str, precision: str) -> dict[str, str]:
    output = f"scale * sum_k({mean} * q)"
    if point.structure == "constant":
        return {"output": output}
    if point.readout == "uncertain":
        output += f" * tau / (tau + sum_k(q**2 / {precision}))"
    return {"output": output, "variance": f"scale**2 * sum_k(q**2 / {precision})"}


def _posterior(point: Point) -> dict[str, Any]:
    learned = point.structure != "constant"
    return {
        "prior": {
            "mean": "mu_p" if point.prior_mean == "learned" else "0",
            "precision": "I_p" if learned else "1",
        },
        "forgetting": {"retain": _RETAIN[point.forgetting], "target": point.target},
        "precision": {"structure": point.structure, "evidence": _EVIDENCE[point.structure, point.evidence]},
        "mean": {"evidence": "v * k"},
        "readout": _readout(point, "mean", "precision"),
    }


def _corrected(point: Point) -> dict[str, Any]:
    """An error-correcting write, preconditioned by the precision: ``S + beta (v - S k) k / P`` on the decayed state."""
    learned = point.structure != "constant"
    retain = _RETAIN[point.forgetting]
    mean = "mu_p" if point.prior_mean == "learned" else "0"
    returns = point.target == "prior" and retain != "1"
    define = {"decayed": f"{retain} * S" + (f" + (1 - {retain}) * {mean}" if returns and mean != "0" else "")}
    state: dict[str, Any] = {}
    key = "k"
    if learned:
        evidence = _EVIDENCE[point.structure, point.evidence].replace("b * ", "beta * ")
        evidence = "beta" if evidence == "b" else evidence
        forgotten = f" + (1 - {retain}) * I_p" if returns else ""
        define["informed"] = f"{retain} * P{forgotten} + {evidence}"
        axes = "k" if point.structure == "key" else ""
        state["P"] = {"axes": axes, "init": "I_p", "update": "informed", "domain": "positive", "doc": "precision"}
        key = "k / informed"
    state["S"] = {
        "axes": "kv",
        "init": mean,
        "update": f"decayed + beta * (v - sum_k(decayed * k)) * {key}",
        "doc": "mean of the map from key to value",
    }
    return {"define": define, "state": state, "readout": _readout(point, "S", "P")}

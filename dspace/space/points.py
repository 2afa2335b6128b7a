"""The structural axes of the space, its points, and which of them are not variants or not new ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace

from dspace.errors import UserError

AXES: dict[str, dict[str, str]] = {
    "structure": {
        "constant": "the precision is not learned",
        "scalar": "one precision per head",
        "key": "one per key channel",
        "value": "one per value channel",
        "key_value": "one per entry of the state",
    },
    "evidence": {
        "none": "a token adds nothing to the precision",
        "gain": "it adds a learned gain",
        "energy": "it adds a learned gain times the squared key",
    },
    "forgetting": {
        "none": "nothing is forgotten",
        "head": "a constant rate per head",
        "token": "a rate per token and head",
        "token_key": "a rate per token and key channel",
    },
    "target": {
        "prior": "the past is tempered towards the prior",
        "zero": "the prior is forgotten with the past",
    },
    "prior_precision": {
        "head": "one learned number per head",
        "key": "one per key channel",
        "value": "one per value channel",
    },
    "prior_mean": {"zero": "0", "learned": "a learned map from key to value"},
    "correction": {
        "none": "a token writes its value",
        "delta": "a token writes its value less what its key recalls",
    },
    "readout": {
        "mean": "the mean at the query",
        "uncertain": "the mean scaled down where the posterior is uncertain",
    },
}
"""Axis -> choice -> what it means."""

PRECISION_AXES = {"constant": "kv", "scalar": "", "key": "k", "value": "v", "key_value": "kv"}
FORGETTING_AXES = {"none": "", "head": "", "token": "", "token_key": "k"}
PRIOR_AXES = {"head": "", "key": "k", "value": "v"}


@dataclass(frozen=True)
class Point:
    """One choice on every axis of :data:`AXES`."""

    structure: str
    evidence: str
    forgetting: str
    target: str
    prior_precision: str
    prior_mean: str
    correction: str
    readout: str

    def __post_init__(self) -> None:
        for axis, choices in AXES.items():
            if getattr(self, axis) not in choices:
                raise UserError(
                    f"{axis} = {getattr(self, axis)!r} is not a choice of the space\n  cure: one of {', '.join(choices)}"
                )

    def __str__(self) -> str:
        return "/".join(astuple(self))


def parse_point(text: str) -> Point:
    """The point that ``str`` writes. Raises UserError for any other text."""
    parts = text.split("/")
    if len(parts) != len(AXES):
        raise UserError(f"{text[:80]!r} is not a point\n  cure: one choice for each of {'/'.join(AXES)}")
    return Point(*parts)


def all_points() -> Iterator[Point]:
    """Every combination of choices, valid or not, in a fixed order."""
    for chosen in itertools.product(*AXES.values()):
        yield Point(*chosen)


def why_not(point: Point) -> str:
    """Why ``point`` is not a variant; empty where it is one."""
    learned = point.structure != "constant"
    axes = PRECISION_AXES[point.structure]
    if learned and point.evidence == "none":
        return f"a precision of structure {point.structure!r} needs evidence"
    if not learned and point.evidence != "none":
        return "a constant precision takes no evidence"
    if not set(FORGETTING_AXES[point.forgetting]) <= set(axes):
        return f"a precision on {axes!r} cannot be forgotten on {FORGETTING_AXES[point.forgetting]!r}"
    if not set(PRIOR_AXES[point.prior_precision]) <= set(axes):
        return f"a precision on {axes!r} cannot have a prior on {PRIOR_AXES[point.prior_precision]!r}"
    if not learned and point.readout == "uncertain":
        return "with a constant precision the variance does not depend on what was seen"
    if point.correction == "delta":
        if point.structure in ("value", "key_value"):
            return "an error correction erases along the key: its precision must not depend on the value channel"
        if learned and point.target == "zero":
            return "the gain k / precision of an error correction is unbounded once the prior is forgotten"
    return ""


def coincides(point: Point) -> Point | None:
    """The point with the same mathematics that stands for this valid one, or None where it stands for itself.

    Each rule is proven by equal canonical hashes or by an exact substitution:

    * with nothing forgotten there is no target of forgetting;
    * with a constant precision and a prior mean of 0 both targets are 0;
    * with a constant precision a prior precision ``I_p`` only rescales what is written (``v / I_p`` or ``k / I_p``).
    """
    simpler = point
    if point.target == "zero" and (
        point.forgetting == "none" or (point.structure == "constant" and point.prior_mean == "zero")
    ):
        simpler = replace(simpler, target="prior")
    if point.structure == "constant" and point.prior_precision != "head":
        simpler = replace(simpler, prior_precision="head")
    return None if simpler == point else simpler


assert [f.name for f in fields(Point)] == [*AXES]

"""Named transforms: pure functions from one spec to another.

A transform takes a spec of valid shape and returns a complete one, in the same form as it came. What it adds
may be declared beforehand in the same file under the names given below; such a declaration is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from dspace.spec.expressions import nearest
from dspace.spec.model import Spec
from dspace.spec.transforms.base import TransformError, factorise
from dspace.spec.transforms.forgetting import forget_to_prior, forget_to_zero, per_channel
from dspace.spec.transforms.metaplasticity import metaplastic, non_metaplastic
from dspace.spec.transforms.prior import prior_mean
from dspace.spec.transforms.variance import variance_readout

if TYPE_CHECKING:
    from dspace.spec.reader import Source

__all__ = [
    "TRANSFORMS",
    "TransformError",
    "apply_transforms",
    "factorise",
    "forget_to_prior",
    "forget_to_zero",
    "metaplastic",
    "non_metaplastic",
    "per_channel",
    "prior_mean",
    "variance_readout",
]

TRANSFORMS: dict[str, Callable[[Spec], Spec]] = {
    "metaplastic": metaplastic,
    "non_metaplastic": non_metaplastic,
    "per_channel": per_channel,
    "forget_to_zero": forget_to_zero,
    "forget_to_prior": forget_to_prior,
    "prior_mean": prior_mean,
    "variance_readout": variance_readout,
}
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

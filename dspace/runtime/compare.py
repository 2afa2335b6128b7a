"""Comparison of a kernel's result with the oracle's, by the rule of the field (CONVENTIONS.md 4.2)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from dspace.runtime.budgets import ABSOLUTE

if TYPE_CHECKING:
    from torch import Tensor

Status = Literal["ok", "failed", "undefined"]
"""``undefined``: the recurrence itself is not finite here, so that there is nothing to compare with."""


@dataclass(frozen=True)
class Check:
    """One comparison: ``quantity`` (o, variance, a state, ``d NAME``) of ``form`` in one case and dtype.

    ``error`` is the relative RMS error, ``budget`` what is accepted, ``note`` why a budget was widened or what broke.
    """

    form: str
    case: str
    dtype: str
    quantity: str
    error: float
    budget: float
    status: Status
    note: str = ""

    def describe(self) -> str:
        """One line: what, where, how far off."""
        what = f"{self.form} {self.dtype}, {self.case}: {self.quantity}"
        if math.isfinite(self.error):
            what += f" has relative error {self.error:.2e}, budget {self.budget:.0e}"
        return what + (f" ({self.note})" if self.note else "")

    def as_dict(self) -> dict[str, Any]:
        """The check as JSON sees it; an error that is no number is None."""
        record = asdict(self)
        if not math.isfinite(self.error):
            record["error"] = None
        return record


def relative_error(reference: Tensor, found: Tensor) -> float:
    """``RMS(reference - found) / RMS(reference)`` in float64."""
    reference, found = reference.detach().double(), found.detach().double()
    if reference.numel() == 0:
        return 0.0
    difference = (reference - found).square().mean().sqrt()
    return float(difference / (reference.square().mean().sqrt() + 1e-8))


def compare(reference: Tensor, found: Tensor | None, budget: float, dtype: str) -> tuple[float, Status, str]:
    """Error, status and note of ``found`` against ``reference``; a missing or misshapen tensor fails."""
    if found is None:
        return math.nan, "failed", "is missing"
    if found.shape != reference.shape:
        return math.nan, "failed", f"has shape {tuple(found.shape)}, not {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0, "ok", ""
    if not bool(reference.isfinite().all()):
        return math.nan, "undefined", "the recurrence itself is not finite here"
    if not bool(found.isfinite().all()):
        return math.nan, "failed", "is not finite"
    error = relative_error(reference, found)
    absolute = float((reference.double() - found.double()).abs().max())
    within = error <= budget or absolute <= (ABSOLUTE if dtype != "float64" else ABSOLUTE * 1e-6)
    return error, "ok" if within else "failed", ""

"""The digits that a case leaves to a kernel: the standard for one that misses its budget."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dspace.runtime.budgets import FEW, ROUNDING, SAMPLES, excused
from dspace.runtime.compare import relative_error

if TYPE_CHECKING:
    from torch import Tensor

    from dspace.runtime.cases import Arguments, Case
    from dspace.runtime.expected import Expected, Results

CHUNK = 16
"""Tokens over which every chunkwise form sums log decays, at least."""

LEAST = 40.0
"""Kernels take no log decay to be below minus this: nothing is left of a state then."""


class Narrow:
    """What float32 makes of the recurrence itself in one case.

    Kernels accumulate in float32 whatever the dtype of their inputs, so it is the standard for 16-bit inputs too.
    """

    def __init__(self, expected: Expected, case: Case, arguments: Arguments, seed: int) -> None:
        self.expected, self.case, self.arguments, self.seed = expected, case, arguments, seed
        self.kind = next(iter(arguments.inputs.values())).dtype

    @functools.cached_property
    def evaluated(self) -> Results:
        """Token by token in float32."""
        return self.expected.results(self.case, self.arguments, self.seed, torch.float32)[0]

    @functools.cached_property
    def samples(self) -> list[Results]:
        """The same from arguments that differ in their last float32 digit, so that every rounding falls otherwise."""
        return [self.evaluated, *(self.evaluated_near(n) for n in range(SAMPLES))]

    @functools.cached_property
    def summed(self) -> list[Results]:
        """From gates that have the digits which are left of them once the log gates of a chunk are summed."""
        return [self.evaluated_near(n, summed=True) for n in range(SAMPLES)]

    @functools.cached_property
    def rounded(self) -> list[Results]:
        """From inputs, states and cotangents that are rounded once more, as operands of a matrix unit are.

        Where few terms nearly cancel (one token's products, two heads' gradients) that is not small beside their sum.
        """
        if self.kind not in (torch.bfloat16, torch.float16):
            return []
        return [self.evaluated_near(n, digit=torch.finfo(self.kind).eps) for n in range(SAMPLES + 1)]

    def evaluated_near(self, number: int, summed: bool = False, digit: float = 0.0) -> Results:
        generator = torch.Generator().manual_seed(self.seed + 15485863 * (number + 1))

        def moved(x: Tensor, size: Tensor | None = None, operand: bool = False) -> Tensor:
            step = torch.randn(x.shape, generator=generator, dtype=torch.float64) * 2.0**-24
            if digit and operand:
                step = (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5) * digit
            step, exact = step.to(x.device), x.detach().double()
            return (exact + step * (exact if size is None else size)).requires_grad_()

        given = self.arguments
        sizes = _summed_sizes(self.expected, given.inputs) if summed else {}
        near = replace(
            given,
            inputs={
                n: moved(x, sizes.get(n), n not in self.expected.gates and x.dtype == self.kind)
                for n, x in given.inputs.items()
            },
            parameters={n: moved(x) for n, x in given.parameters.items()},
            states=None if given.states is None else tuple(moved(x, operand=True) for x in given.states),
        )
        # The cotangents are those of the kernel: drawn by the seed, in the dtype of the original inputs.
        jitter = (lambda x: moved(x, operand=True).detach().to(x.dtype)) if digit else None
        return self.expected.results(self.case, near, self.seed, torch.float32, self.arguments, jitter)[0]

    def allowed(self, quantity: str, reference: Tensor, form: str, budget: float) -> tuple[float, float]:
        """Relative error of ``quantity`` that no kernel of ``form`` can be blamed for, and what the recurrence errs.

        A chunkwise form takes a decay between two tokens as a difference of sums of log gates; where gates are shut
        these sums are large, and the difference has the digits of the sums. It also rounds operands of products to the
        type of the inputs, and every form rounds gradients of grouped heads to it before they are added; ``budget`` has
        room for that, save where terms nearly cancel or are too few to average.
        """
        errs = _largest([*self.samples, *(self.summed if form == "chunk" else [])], quantity, reference)
        allowed = ROUNDING * errs
        if self.rounded:
            rounded = _largest(self.rounded, quantity, reference)
            few = reference.numel() <= FEW * reference.shape[-1]
            room = excused(rounded, budget, few, torch.finfo(self.kind).eps)
            allowed, errs = max(allowed, room), max(errs, rounded)
        return allowed, errs

    def overflows(self, quantity: str, dtype: torch.dtype) -> bool:
        """Whether ``quantity``, evaluated in float32 and returned in ``dtype``, is not finite."""
        return not bool(self.evaluated[quantity].to(dtype).isfinite().all())


def _largest(samples: list[Results], quantity: str, reference: Tensor) -> float:
    """The largest error of a few samples: rounding errors may happen to cancel in one of them."""
    return max((e for r in samples if (e := relative_error(reference, r[quantity])) == e), default=0.0)


def _summed_sizes(expected: Expected, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By gate: how much a step of one in the last digit of a chunk's sum of log gates changes its value."""
    found = {}
    for variable in expected.recurrence.inputs:
        if variable.name not in expected.gates or variable.domain not in ("nonpositive", "negative", "unit"):
            continue
        value = inputs[variable.name].detach().double()
        logarithm = value.log() if variable.domain == "unit" else value
        total = logarithm.clamp(-LEAST, 0.0).abs().cumsum(1)
        window = total - torch.nn.functional.pad(total, (*(0, 0) * (total.dim() - 2), CHUNK, 0))[:, : total.shape[1]]
        found[variable.name] = window * value if variable.domain == "unit" else window
    return found

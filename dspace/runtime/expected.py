"""What a case asks of a variant, and what the oracle answers: arguments, every quantity, cotangents of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dspace.runtime.analysis import analysis_of
from dspace.runtime.budgets import gates
from dspace.runtime.cases import Arguments, Case, draw_arguments
from dspace.runtime.oracle import Coordinates, evaluate

if TYPE_CHECKING:
    from torch import Tensor

Results = dict[str, "Tensor"]
"""Tensors of one run by name: ``o``, ``variance``, ``state NAME``, ``d NAME``."""


class Expected:
    """The recurrence of one variant, called with arguments on one device; no module of the variant is needed."""

    def __init__(self, spec: Any, device: str) -> None:
        self.device = device
        self.coordinates = Coordinates.of(analysis_of(spec))
        self.recurrence = self.coordinates.source
        self.state_names = [s.name for s in self.coordinates.normal.states]
        self.gates = gates(self.coordinates.normal)
        self.gates_and_parameters = gates(self.coordinates.normal, parameters=True)

    def arguments(self, case: Case, dtype: torch.dtype, seed: int) -> Arguments:
        """Fresh arguments, with initial states if the case wants any."""
        arguments = draw_arguments(self.recurrence, self.gates, case, dtype, self.device, seed)
        if not case.initial:
            return arguments
        # A state that the variant really reaches: the one after a few other tokens.
        count = len(case.lengths) if case.lengths is not None else case.shape.B
        before = Case("before", replace(case.shape, B=count, T=5))
        past = draw_arguments(self.recurrence, self.gates, before, dtype, self.device, seed + 7919)
        with torch.no_grad():
            states = evaluate(
                self.recurrence, {**past.inputs, **arguments.parameters}, coordinates=self.coordinates, variance=False
            ).states
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(arguments, states=tuple(s.to(wide).contiguous().requires_grad_() for s in states))

    def blank_arguments(self, case: Case, dtype: torch.dtype) -> Arguments:
        """Arguments of the right shapes without meaning: initial states are zeros."""
        arguments = draw_arguments(self.recurrence, self.gates, case, dtype, self.device, 0)
        if not case.initial:
            return arguments
        count = len(case.lengths) if case.lengths is not None else case.shape.B
        sizes = {"k": case.shape.K, "v": case.shape.V}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        states = tuple(
            torch.zeros(count, case.shape.HV, *(sizes[a] for a in s.axes), dtype=wide, device=self.device)
            for s in self.coordinates.normal.states
        )
        return replace(arguments, states=tuple(s.requires_grad_() for s in states))

    def results(
        self,
        case: Case,
        arguments: Arguments,
        seed: int,
        dtype: torch.dtype = torch.float64,
        given: Arguments | None = None,
        jitter: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Results, Results]:
        """What the oracle says of every quantity, and the cotangents that its gradients are for.

        The cotangents are rounded as those of a kernel that is called with ``given`` (default: ``arguments``), and then
        changed by ``jitter``.
        """
        found = evaluate(
            self.recurrence,
            {**arguments.inputs, **arguments.parameters},
            initial_states=arguments.states,
            cu_seqlens=arguments.cu_seqlens,
            variance=case.variance,
            coordinates=self.coordinates,
            dtype=dtype,
        )
        results: Results = {"o": found.output}
        if found.variance is not None:
            results["variance"] = found.variance
        if case.final:
            results |= {f"state {n}": s for n, s in zip(self.state_names, found.states, strict=True)}
        generator = torch.Generator().manual_seed(seed + 104729)
        seen = next(iter((given or arguments).inputs.values())).dtype
        cotangents = {}
        for name, value in results.items():
            # Rounded as the kernel will see it.
            kind = seen if name in ("o", "variance") else torch.promote_types(seen, torch.float32)
            draw = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            cotangents[name] = draw.to(device=value.device, dtype=kind)
        if jitter is not None:
            cotangents = {n: jitter(c.float()) for n, c in cotangents.items()}
        return with_gradients(results, cotangents, arguments), cotangents


def with_gradients(results: Results, cotangents: Results, arguments: Arguments) -> Results:
    """``results`` and the gradients ``d NAME`` of every leaf, for the given cotangents of the results."""
    leaves = arguments.leaves()
    pairs = [(results[n], cotangents[n].to(results[n].dtype)) for n in results if results[n].requires_grad]
    found = {f"d {n}": torch.zeros_like(x) for n, x in leaves.items()}
    if pairs:
        outputs, given = [r for r, _ in pairs], [c for _, c in pairs if c is not None]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
        found |= {f"d {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {n: r.detach() for n, r in results.items()} | found

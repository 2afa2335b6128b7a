"""Random arguments in the domains of a recurrence."""

from __future__ import annotations

import torch

from dspace.math.ir import Recurrence


def shape(axes: str, keys: int, values: int) -> tuple[int, ...]:
    return tuple({"k": keys, "v": values}[a] for a in axes)


def arguments(r: Recurrence, batch=2, steps=7, heads=2, keys=3, values=4, dtype=torch.float64, seed=0, sequences=None):
    """``(inputs, parameters, initial states)``, leaves that require gradients."""
    draw = torch.Generator().manual_seed(seed)

    def made(lead: tuple[int, ...], axes: str, domain: str) -> torch.Tensor:
        x = 0.4 * torch.randn(*lead, *shape(axes, keys, values), generator=draw, dtype=torch.float64)
        if domain != "real":
            x = x.abs() + (0.5 if domain == "positive" else 0.0)
            x = -x if domain in ("nonpositive", "negative") else x
        return x.to(dtype).requires_grad_()

    inputs = [made((batch, steps, heads), v.axes, v.domain) for v in r.inputs]
    parameters = [made((heads,), p.axes, p.domain) for p in r.parameters]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    states = [made((sequences or batch, heads), s.axes, "nonnegative").to(state).detach() for s in r.states]
    return inputs, parameters, [s.requires_grad_() for s in states]


def gradients(outputs: list[torch.Tensor], leaves: list[torch.Tensor], seed: int = 1) -> list[torch.Tensor]:
    """Gradients of a random linear function of all outputs; zero where a leaf has no influence."""
    draw = torch.Generator().manual_seed(seed)
    loss = sum((x.double() * torch.randn(x.shape, generator=draw, dtype=torch.float64)).sum() for x in outputs)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error; absolute where the expected values vanish."""
    assert result.shape == expected.shape
    if result.numel() == 0:
        return 0.0
    result, expected = result.detach(), expected.detach()
    difference = (result.double() - expected.double()).square().mean().sqrt()
    return float(difference / (expected.double().square().mean().sqrt() + 1e-6))

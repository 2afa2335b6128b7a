"""What a kernel is tried on: shapes, packings, splits, and inputs drawn from the declared domains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from dspace.math.ir import Recurrence, Variable

if TYPE_CHECKING:
    from torch import Tensor

Draw = Literal["random", "gates open", "gates shut", "gates mixed", "no gain", "one-hot", "constant"]
"""How inputs are drawn: at random in their domains; gates at the end that keeps everything (0 for a log gate), at
the one that keeps nothing (-60), or each token at random among both and ordinary ones; importance gains at 0; keys
one-hot; one token repeated."""

CORNERS: tuple[Draw, ...] = ("gates open", "gates shut", "gates mixed", "no gain", "one-hot", "constant")

SHUT = 60.0
"""A log gate of -60 leaves 1e-26 of a state: nothing in float32, and finite in every dtype."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; inputs on the key axis alone have ``H`` heads, all others ``HV``."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.HV else f"H{self.H}/{self.HV}"
        return f"B{self.B}-T{self.T}-{heads}-K{self.K}-V{self.V}"


@dataclass(frozen=True)
class Case:
    """One setting in which every form is run.

    ``lengths`` packs sequences (their sum is T, B is 1), ``splits`` cuts the tokens there and carries the state,
    ``initial``/``final``/``variance`` say whether an initial state is given and which results are asked for.
    """

    name: str
    shape: Shape
    draw: Draw = "random"
    lengths: tuple[int, ...] | None = None
    splits: tuple[int, ...] = ()
    initial: bool = True
    final: bool = True
    variance: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({self.shape})"


def quick_cases(device: str) -> tuple[Case, ...]:
    """A handful of cases for the first use of a module: seconds."""
    K, V = (8, 7) if device == "cpu" else (20, 37)
    base = Shape(2, 65, 1, 2, K, V)
    packed = replace(base, B=1, T=48)
    corner = replace(base, T=17)
    return (
        Case("carried", base),
        Case("one token", replace(base, T=1), initial=False, final=False, variance=False),
        Case("packed", packed, lengths=(17, 0, 1, 30)),
        Case("split", base, splits=(1, 18)),
        Case("gates mixed", corner, draw="gates mixed"),
        Case("no gain", corner, draw="no gain"),
    )


def full_cases(device: str) -> tuple[Case, ...]:
    """The whole matrix: lengths around a chunk, sizes that are no power of two, packings, splits, corner values."""
    shapes = [Shape(2, T, 2, 2, 48, 40) for T in (1, 63, 64, 65)] + [Shape(1, 200, 1, 2, 20, 33)]
    if device == "cuda":
        shapes += [Shape(1, 1000, 2, 2, 64, 64), Shape(2, 65, 1, 2, 96, 192), Shape(1, 130, 1, 1, 100, 100)]
        shapes += [Shape(1, 65, 1, 1, 16, 16), Shape(1, 65, 1, 1, 40, 48), Shape(1, 65, 1, 1, 128, 128)]
        # the last with programs that hand on what is wide to others beside them
        shapes += [Shape(1, 65, 1, 1, 256, 256), Shape(1, 600, 2, 2, 256, 64)]
    flags = itertools.cycle([(True, True), (False, True), (True, False), (False, False)])
    cases = [Case("plain", s, initial=i, final=f, variance=i) for s, (i, f) in zip(shapes, flags, strict=False)]
    odd = Shape(2, 70, 1, 2, 20, 9)
    cases += [
        Case("packed", replace(odd, B=1, T=140), lengths=(0, 64, 1, 70, 5, 0)),
        Case("packed, no initial state", replace(odd, B=1, T=66), lengths=(1, 65), initial=False),
        Case("split", odd, splits=(1, 2, 66)),
        Case("split at the chunk", replace(odd, T=128), splits=(64,), initial=False),
        Case("empty", replace(odd, T=0)),
    ]
    cases += [Case(corner, odd, draw=corner, initial=n % 2 == 0) for n, corner in enumerate(CORNERS)]
    return (*cases, Case("long constant", replace(odd, B=1, T=200), draw="constant"))


@dataclass(frozen=True)
class Arguments:
    """What a kernel is called with: tensors by name (leaves that want gradients), states, packing bounds."""

    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    states: tuple[Tensor, ...] | None
    cu_seqlens: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that has a gradient, by the name of its gradient in a certificate."""
        named = {**self.inputs, **self.parameters}
        return named | {f"initial state {i}": s for i, s in enumerate(self.states or ())}


def draw_arguments(
    recurrence: Recurrence, gates: Iterable[str], case: Case, dtype: torch.dtype, device: str, seed: int
) -> Arguments:
    """Fresh inputs and parameters (not the initial states), in ``dtype``; parameters are float32 at least."""
    generator = torch.Generator().manual_seed(seed)
    shape, gates = case.shape, frozenset(gates)
    sizes = {"k": shape.K, "v": shape.V}
    used = {s for state in recurrence.states for s in state.update.free_symbols}
    inputs = {}
    for variable in recurrence.inputs:
        heads = shape.H if variable.axes == "k" else shape.HV
        size = (shape.B, shape.T, heads, *(sizes[a] for a in variable.axes))
        draw = case.draw if variable.symbol in used else "random"
        value = _draw(variable, size, generator, draw, variable.name in gates)
        inputs[variable.name] = value.to(device=device, dtype=dtype).requires_grad_()
    wide = dtype if dtype == torch.float64 else torch.float32
    parameters = {}
    for variable in recurrence.parameters:
        size = (shape.HV, *(sizes[a] for a in variable.axes))
        value = _in_domain(variable, size, generator)
        parameters[variable.name] = value.to(device=device, dtype=wide).requires_grad_()
    bounds = None
    if case.lengths is not None:
        bounds = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int64, device=device)
    return Arguments(inputs, parameters, None, bounds)


def _draw(variable: Variable, size: tuple[int, ...], generator: torch.Generator, draw: Draw, gate: bool) -> Tensor:
    value = _in_domain(variable, size, generator)
    if gate and draw == "gates open":
        return torch.full(size, _OPEN[variable.domain])
    if gate and draw == "gates shut":
        return torch.full(size, _SHUT[variable.domain])
    if gate and draw == "gates mixed":
        pick = torch.randint(0, 4, size, generator=generator)
        value = torch.where(pick == 0, torch.full(size, _OPEN[variable.domain]), value)
        return torch.where(pick == 1, torch.full(size, _SHUT[variable.domain]), value)
    if not gate and draw == "no gain" and variable.domain in ("nonnegative", "unit", "nonpositive"):
        return torch.zeros(size)
    if draw == "one-hot" and variable.axes == "k" and variable.domain in ("real", "nonnegative"):
        hot = torch.randint(0, size[-1], size[:-1], generator=generator)
        return torch.nn.functional.one_hot(hot, size[-1]).double()
    if draw == "constant" and size[1] > 0:
        return value[:, :1].expand(size)
    return value


_OPEN = {"nonpositive": 0.0, "negative": -1e-3, "unit": 1.0, "nonnegative": 0.0, "positive": 1e-3}
_SHUT = {"nonpositive": -SHUT, "negative": -SHUT, "unit": 0.0, "nonnegative": SHUT, "positive": SHUT}


def _in_domain(variable: Variable, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ordinary values: unit-length keys and queries, log gates with horizons from 1 to 1000 tokens, gains around 1."""
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    match variable.domain:
        case "nonnegative":
            return normal.abs()
        case "positive":
            return torch.exp(normal / 2)
        case "nonpositive" | "negative":
            return -torch.exp(uniform * -6.9)
        case "unit":
            return uniform
    if variable.axes == "k":
        return torch.nn.functional.normalize(normal, dim=-1)
    return normal

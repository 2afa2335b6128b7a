"""Names in generated source: those of the spec wherever Python and the surrounding code allow it."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

from dspace.math.ir import Recurrence, State, Variable

ARGUMENTS = frozenset({"scale", "initial_state", "output_final_state", "output_variance", "cu_seqlens"})
"""Keyword arguments of every public function."""

INTERNAL = frozenset(
    """torch math numba numpy triton tl np F real zero one first last heads steps offsets want_variance want_final sequence head token
    begin end task i j segment segments slot time count outputs variances output variance dtype device size_k size_v
    bounds parts rows self ctx contextlib SPEC save checkpoint""".split()
)
"""Names that generated function bodies use for themselves."""


class Namer:
    """Hands out identifiers that are valid, free and as close to what was asked as possible."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken) | set(keyword.kwlist) | set(keyword.softkwlist)

    def __call__(self, wish: str) -> str:
        name = wish if wish.isidentifier() else "x_" + "".join(c if c.isalnum() else "_" for c in wish)
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


_MADE = re.compile(
    r"^(?:all|at|back|beside|between|c|d|decay|direct|first|full|grad|handed|held|i|inverse|key|lead|m|made|new|next|o|of|p|part|"
    r"raw|rows|seen|since|slabs|start|step|sum|sums|total|until|value|weighted|whole|within|wrote|y)(?:_.*|\d+)$"
    r"|_(?:\d+|t|n|c|after|ahead|all|back|before|border|carry|cotangent|decay|final|gap|in|initial|kept|kernel|key|local|next|now|out|part|past|"
    r"row|saved|since|start|starts|end|sum|sums|through|token|total|until|value|whole)$"
)


class KernelNamer(Namer):
    """Keeps names, too, apart from those that the emitted kernels make of others."""

    def __call__(self, wish: str) -> str:
        return super().__call__(f"{wish}_x" if _MADE.search(wish) else wish)


def public_names(recurrence: Recurrence) -> dict[str, str]:
    """Argument name of each input and parameter: its own, with ``_`` appended where Python reserves it."""
    namer = Namer(ARGUMENTS)
    return {v.name: namer(v.name) for v in (*recurrence.inputs, *recurrence.parameters)}


def internal_names(recurrence: Recurrence, namer: Namer | None = None) -> dict[str, str]:
    """Local name of each input, parameter and state inside core functions; ``scale`` keeps its own."""
    namer = namer or Namer(INTERNAL | set(dir(builtins)) | {"scale"})
    named: tuple[Variable | State, ...] = (*recurrence.inputs, *recurrence.parameters, *recurrence.states)
    return {v.name: namer(v.name) for v in named} | {"scale": "scale"}

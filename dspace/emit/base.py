"""What a target hands to the module assembler: one section of source text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dspace.math.ir import Analysis

EMITTER_VERSION = "4"
"""Part of every module's identity: raise it when emitted code changes meaning, so that caches and certificates expire."""

LEAN = """


{core}.lean = True  # initial states may be None: zero; final states are left out unless ``want_final``
"""
"""Source that follows a core which has one more argument, ``want_final=True``, and needs no zeros in memory."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Section:
    """The code of one target inside a generated module.

    ``code`` defines the functions named by ``chunk`` and ``recurrent`` (None where the target has no such
    form); ``imports`` are complete import statements, hoisted to the top of the module and deduplicated.

    Both functions have the signature, all arguments positional and in the order of the spec::

        core(*inputs, *parameters, *initial_states, scale, offsets, want_variance)
            -> (o, variance | None, *final_states)

    Shapes: inputs ``[B, T, HV, *axes]``; parameters ``[HV, *axes]``; states float32 (float64 when the inputs
    are float64) ``[N, HV, *axes]``; ``offsets`` int64 ``[N + 1]`` for packed sequences (then ``B == 1``) or None
    (then ``N == B``); ``scale`` a Python float. ``o`` and ``variance`` are ``[B, T, HV, V]`` in the dtype of the
    first input. The front door has already checked, expanded and cast everything; inputs may still be
    non-contiguous. A core marked as :data:`LEAN` says may get less and give less. Cores are differentiable in inputs, parameters and initial states, from every output.
    """

    device: Device
    imports: tuple[str, ...]
    code: str
    chunk: str | None
    recurrent: str | None


Target = Callable[[Analysis], "Section | None"]
"""A target: reads an analysis, returns its section, or None where it does not serve the variant's class."""

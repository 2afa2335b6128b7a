"""The oracle: float64 evaluation of a variant straight from its recurrence, token by token.

It reads the recurrence that the spec states (``dspace.math.lower``, in source coordinates such as mean and
precision), never the normal form, a plan or a printer, so that agreement with it means something. Gradients come
from torch autograd through the evaluation. States enter and leave in source coordinates, or, through
:class:`Coordinates`, in those of the generated modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dspace.errors import UserError
from dspace.math.ir import SCALE, Recurrence, Variable
from dspace.runtime.tape import Tape, place, unplace

if TYPE_CHECKING:
    import sympy
    from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """What the oracle returns: ``output`` and ``variance`` ``[B, T, HV, V]``, final ``states`` ``[N, HV, *axes]``."""

    output: Tensor
    variance: Tensor | None
    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Coordinates:
    """The map between the states of a spec and those of its generated module, evaluated by the interpreter.

    ``to_source`` gives each source state as an expression of normal states and parameters, ``to_normal`` the
    reverse; both are keyed by state name.
    """

    source: Recurrence
    normal: Recurrence
    to_source: Mapping[str, sympy.Expr]
    to_normal: Mapping[str, sympy.Expr]

    @classmethod
    def of(cls, analysis: Any) -> Coordinates:
        """The map that :mod:`dspace.math.coordinates` found for ``analysis``."""
        from dspace.math import coordinates

        return cls(
            analysis.source,
            analysis.recurrence,
            coordinates.to_source(analysis),
            coordinates.to_normal(analysis),
        )

    def states_to_source(self, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """States of a generated module ``[N, HV, *axes]`` in the coordinates of the spec."""
        return _translate(self.normal, self.source, self.to_source, states, parameters)

    def states_to_normal(self, states: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """States in the coordinates of the spec as a generated module states them."""
        return _translate(self.source, self.normal, self.to_normal, states, parameters)


def recurrence_of(source: Any) -> Recurrence:
    """The recurrence of a spec (path, built-in name, Spec) in source coordinates, or ``source`` itself if it is one."""
    if isinstance(source, Recurrence):
        return source
    from dspace.math import lower
    from dspace.runtime.sources import as_spec

    return lower(as_spec(source))


def axis_sizes(recurrence: Recurrence, arguments: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes ``{"k": K, "v": V}`` as the inputs and parameters state them (1 for an axis that none carries)."""
    sizes: dict[str, int] = {}
    for variable in (*recurrence.inputs, *recurrence.parameters):
        tensor = arguments[variable.name]
        for axis, size in zip(reversed(variable.axes), reversed(tensor.shape), strict=False):
            if sizes.setdefault(axis, size) != size:
                raise UserError(f"{variable.name} has {size} channels on axis {axis}, others have {sizes[axis]}")
    return {"k": sizes.get("k", 1), "v": sizes.get("v", 1)}


def evaluate(
    source: Any,
    arguments: Mapping[str, Tensor],
    *,
    scale: float | Tensor | None = None,
    initial_states: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    variance: bool = True,
    coordinates: Coordinates | None = None,
    dtype: torch.dtype = torch.float64,
) -> Evaluation:
    """Run the recurrence of ``source`` token by token.

    Args:
        source: a :class:`~dspace.math.ir.Recurrence` in source coordinates, or whatever ``dspace.spec.load`` takes.
        arguments: every input ``[B, T, heads, *axes]`` (heads divide the largest head count HV) and parameter
            ``[HV, *axes]`` by name; any floating dtype.
        scale: readout scale, ``K**-0.5`` by default.
        initial_states: ``[N, HV, *axes]`` each; the ``init`` expressions of the recurrence by default.
        cu_seqlens: bounds ``[N + 1]`` of packed sequences; then ``B`` is 1.
        variance: whether to evaluate the variance where the spec has one.
        coordinates: if given, initial and final states are those of the generated module.
        dtype: float64, except to learn what rounding alone does to the recurrence.

    Returns:
        An :class:`Evaluation`, differentiable in arguments and initial states.
    """
    recurrence = recurrence_of(source)
    sizes = axis_sizes(recurrence, arguments)
    heads = max([arguments[v.name].shape[2] for v in recurrence.inputs] + [1])
    if recurrence.parameters:
        heads = max(heads, *(arguments[p.name].shape[0] for p in recurrence.parameters))
    inputs = {v.name: place(_expand_heads(arguments[v.name].to(dtype), v, heads, 2), v.axes) for v in recurrence.inputs}
    raw = [_expand_heads(arguments[p.name].to(dtype), p, heads, 0) for p in recurrence.parameters]
    parameters = {p.name: place(t, p.axes) for p, t in zip(recurrence.parameters, raw, strict=True)}
    like = next(iter(inputs.values()))
    batch, length = like.shape[:2]
    scale = sizes["k"] ** -0.5 if scale is None else scale
    constants = {**parameters, SCALE.name: torch.as_tensor(scale, dtype=dtype, device=like.device).reshape(1, 1)}

    bounds = None if cu_seqlens is None else [int(b) for b in cu_seqlens]
    sequences = batch if bounds is None else len(bounds) - 1
    if initial_states is None:
        states = initial_states_of(recurrence, constants, sizes, (sequences, heads), like)
    else:
        given = [s.to(dtype) for s in initial_states]
        if coordinates is not None:
            given = list(coordinates.states_to_source(given, raw))
        states = [place(s, d.axes) for s, d in zip(given, recurrence.states, strict=True)]

    step = _Step(recurrence, sizes, constants, variance)
    if bounds is None:
        outputs, variances, finals = step.sequence(inputs, states, 0, length)
    else:
        outputs, variances, parts = [], [], []
        for n, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            o, s2, final = step.sequence(inputs, [s[n : n + 1] for s in states], start, stop)
            outputs += o
            variances += s2
            parts.append(final)
        finals = [torch.cat(each, 0) for each in zip(*parts, strict=True)] if parts else states

    def stack(tokens: list[Tensor]) -> Tensor:
        if not tokens:
            return like.new_zeros((batch, 0, heads, sizes["v"]))
        return torch.stack([unplace(t, "v", sizes).expand(batch, heads, -1) for t in tokens], 1)

    final_states = tuple(unplace(f, s.axes, sizes) for f, s in zip(finals, recurrence.states, strict=True))
    if coordinates is not None:
        final_states = coordinates.states_to_normal(final_states, raw)
    has_variance = variance and recurrence.variance is not None
    return Evaluation(stack(outputs), stack(variances) if has_variance else None, final_states)


class _Step:
    """One token of a recurrence, ready to run."""

    def __init__(
        self, recurrence: Recurrence, sizes: Mapping[str, int], constants: dict[str, Tensor], variance: bool
    ) -> None:
        self.recurrence, self.sizes, self.constants = recurrence, sizes, constants
        reads = [recurrence.output]
        if variance and recurrence.variance is not None:
            reads.append(recurrence.variance)
        self.update = Tape([s.update for s in recurrence.states], sizes)
        self.read = Tape(reads, sizes)
        self.names = [s.name for s in recurrence.states]

    def sequence(
        self, inputs: Mapping[str, Tensor], states: list[Tensor], start: int, stop: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Tokens ``start`` to ``stop``: their outputs and variances, and the states after the last."""
        outputs: list[Tensor] = []
        variances: list[Tensor] = []
        for t in range(start, stop):
            token = {n: x[:, t] for n, x in inputs.items()} | self.constants
            like = next(iter(token.values()))
            before = dict(zip(self.names, states, strict=True))
            updated = self.update.run(token | before, like)
            shapes = [torch.broadcast_shapes(n.shape, o.shape) for n, o in zip(updated, states, strict=True)]
            states = [n.expand(shape) for n, shape in zip(updated, shapes, strict=True)]
            seen = before if self.recurrence.read == "before" else dict(zip(self.names, states, strict=True))
            read = self.read.run(token | seen, like)
            outputs.append(read[0])
            variances += read[1:]
        return outputs, variances, states


def initial_states_of(
    recurrence: Recurrence,
    constants: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    lead: tuple[int, int],
    like: Tensor,
) -> list[Tensor]:
    """The ``init`` of every state as placed tensors ``[N, HV, K or 1, V or 1]``."""
    values = Tape([s.init for s in recurrence.states], sizes).run(constants, like)
    full = []
    for value, state in zip(values, recurrence.states, strict=True):
        shape = (*lead, *(sizes[a] if a in state.axes else 1 for a in "kv"))
        full.append(value.expand(shape))
    return full


def _expand_heads(tensor: Tensor, variable: Variable, heads: int, dim: int) -> Tensor:
    own = tensor.shape[dim]
    if own == heads:
        return tensor
    if own == 0 or heads % own:
        raise UserError(f"{variable.name} has {own} heads, which does not divide {heads}")
    return tensor.repeat_interleave(heads // own, dim=dim)


def _translate(
    have: Recurrence,
    want: Recurrence,
    expressions: Mapping[str, sympy.Expr],
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    values = {s.name: place(t, s.axes) for s, t in zip(have.states, states, strict=True)}
    values |= {p.name: place(t.to(states[0].dtype), p.axes) for p, t in zip(have.parameters, parameters, strict=True)}
    sizes: dict[str, int] = {}
    named = [(s.axes, t) for s, t in zip(have.states, states, strict=True)]
    named += [(p.axes, t) for p, t in zip(have.parameters, parameters, strict=True)]
    for axes, tensor in named:
        sizes.update(zip(reversed(axes), reversed(tensor.shape), strict=False))
    sizes.setdefault("k", 1)
    sizes.setdefault("v", 1)
    results = Tape([expressions[s.name] for s in want.states], sizes).run(values, states[0])
    lead = states[0].shape[:2]
    full = [r.expand(*lead, *r.shape[-2:]) for r in results]
    return tuple(unplace(r, s.axes, sizes) for r, s in zip(full, want.states, strict=True))

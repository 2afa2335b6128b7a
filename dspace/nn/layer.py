"""``Mixer``: the sequence-mixing layer of a variant, built from the ``[layer]`` table of its spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.nn.functions import FUNCTIONS, HeadNorm, conv_of_some, packed_conv, per_row, spread
from dspace.nn.operator import as_operator
from dspace.nn.parameters import Constrained, Decay, never_negative, per_head_start
from dspace.nn.recipe import Apply, Const, Convolve, PerHead, Plan, Ref, Slot, Take, Tree, make_plan


@dataclass
class MixerState:
    """What a layer carries from token to token: the inputs still seen by the convolutions, and the op's state."""

    conv: tuple[Tensor, ...]
    op: Any


class Mixer(nn.Module):
    """Hidden states ``[B, T, hidden_size]`` to hidden states, through the variant ``source``.

    ``source``: name or path of a spec, a Spec, a compiled module, or an Operator. ``num_heads`` heads of
    ``head_dim`` key channels (default ``hidden_size // num_heads``) and ``head_dim * expand_v`` value channels;
    ``num_v_heads``, a multiple of ``num_heads``, lets several value heads share queries and keys.

    ``init`` sets parameters of the spec and per-head atoms by name at the start, for example
    ``{"I_p": 2.0, "head_scale": 0.5}``; names in ``frozen`` are not learned. ``decay`` chooses the start of
    ``A_log``, see :class:`~dspace.nn.parameters.Decay`. ``layer`` overrides entries of ``[layer]``.
    ``skip`` adds ``D_h * v`` per head, ``output_norm`` normalises each head (RMS), ``output_gate`` multiplies by
    ``silu`` of a projection. Raises UserError for sizes and names that do not fit.
    """

    def __init__(
        self,
        source: Any,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        *,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        low_rank: int | None = None,
        scale: float | None = None,
        layer: Mapping[str, str] | None = None,
        init: Mapping[str, float] | None = None,
        frozen: tuple[str, ...] = (),
        decay: Decay = "uniform",
        skip: bool = False,
        output_norm: bool = True,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.trials = 1
        """Trials stacked in one batch, see :mod:`dspace.nn.stacked`."""
        self.operator = as_operator(source)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.head_dim = _head_dim(hidden_size, num_heads, head_dim)
        self.head_v_dim = int(self.head_dim * expand_v)
        if self.num_v_heads % num_heads or self.head_v_dim < 1 or conv_size < 1:
            raise UserError(
                f"Mixer: num_v_heads = {self.num_v_heads}, num_heads = {num_heads}, expand_v = {expand_v}, "
                f"conv_size = {conv_size} do not fit\n  cure: num_v_heads a multiple of num_heads, the others >= 1"
            )
        self.conv_size, self.scale = conv_size, scale
        declared = self.operator.inputs
        table = {**self.operator.layer, **(layer or {})}
        parameter_axes = {p.name: p.axes for p in self.operator.parameters}
        self.plan: Plan = make_plan(declared, parameter_axes, table)
        self._check_names({**(init or {}), **dict.fromkeys(frozen)}, parameter_axes)
        self._lay_out(low_rank or self.head_dim, output_gate)
        self.options: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "head_dim": self.head_dim,
            "expand_v": expand_v,
            "num_v_heads": self.num_v_heads,
            "conv_size": conv_size,
            "low_rank": self.rank,
            "scale": scale,
            "layer": dict(layer or {}),
            "frozen": frozen,
            "skip": skip,
            "output_norm": output_norm,
            "output_gate": output_gate,
            "norm_eps": norm_eps,
        }

        starts = dict(init or {})
        self.constants = nn.ModuleDict(
            {
                p.name: Constrained(p, self.num_v_heads, self._sizes(p.axes), starts.get(p.name), p.name not in frozen)
                for p in self.operator.parameters
            }
        )
        self.atoms = nn.ParameterDict()
        for name, value in per_head_start(self.plan.per_head, self.num_v_heads, decay, starts).items():
            self.atoms[name] = nn.Parameter(value, requires_grad=name not in frozen)
            self.atoms[name].no_weight_decay = True  # type: ignore[attr-defined]
        self.skip = nn.Parameter(torch.ones(self.num_v_heads)) if skip else None
        self.norm = HeadNorm(self.head_v_dim, norm_eps) if output_norm else None
        self.output = nn.Linear(self.num_v_heads * self.head_v_dim, hidden_size, bias=False)

    # ------------------------------------------------------------------ construction

    def _check_names(self, given: Mapping[str, Any], parameters: Mapping[str, str]) -> None:
        known = {*parameters, *self.plan.per_head}
        unknown = sorted(set(given) - known)
        if unknown:
            raise UserError(
                f"Mixer of {self.operator.name}: nothing is called {', '.join(map(repr, unknown))}\n"
                f"  cure: init and frozen take {', '.join(sorted(known)) or 'no name here'}"
            )

    def _sizes(self, axes: str) -> tuple[int, ...]:
        return tuple({"k": self.head_dim, "v": self.head_v_dim}[axis] for axis in axes)

    def _shape(self, slot: Slot) -> tuple[int, ...]:
        if slot.low_rank:
            return (self.rank,)
        heads = self.num_heads if slot.group == "key" else self.num_v_heads
        return (heads, *self._sizes(slot.axes))

    def _lay_out(self, rank: int, output_gate: bool) -> None:
        """One matmul makes every slot: those under ``silu(conv(.))`` first, then ``conv(.)``, then the bare ones."""
        self.rank = rank
        kinds = ("silu_conv", "conv", "plain")
        order = sorted(range(len(self.plan.slots)), key=lambda i: kinds.index(self.plan.slots[i].kind))
        slots = [self.plan.slots[i] for i in order]
        self._position = {slot: place for place, slot in enumerate(order)}
        self._shapes = [self._shape(s) for s in slots]
        self._widths = {kind: [math.prod(self._shape(s)) for s in slots if s.kind == kind] for kind in kinds}
        self._activated = sum(self._widths["silu_conv"])
        self._convolved = self._activated + sum(self._widths["conv"])
        self._gated = output_gate
        if output_gate:
            self._widths["plain"].append(self.num_v_heads * self.head_v_dim)
        self.project = nn.Linear(self.hidden_size, sum(map(sum, self._widths.values())), bias=False)
        self.expand = nn.ModuleList(
            nn.Linear(rank, math.prod(self._shape(Slot("plain", group, axes))), bias=False)
            for group, axes in self.plan.expansions
        )
        channels = [math.prod(self._shape(Slot("conv", group, axes))) for group, axes in self.plan.convolutions]
        bound = self.conv_size**-0.5
        self.taps = nn.ParameterList(
            nn.Parameter(torch.empty(self.conv_size, c).uniform_(-bound, bound))
            for c in ([self._convolved] if self._convolved else []) + channels
        )

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        output_final_state: bool = False,
        recurrent: bool = False,
    ) -> Any:
        """Mix ``x`` ``[B, T, hidden_size]``; with ``output_final_state`` return ``(y, MixerState)``.

        ``cu_seqlens`` ``[N + 1]`` packs sequences (B = 1; ``state`` then has N rows). ``recurrent`` runs token by
        token instead of in chunks; the result is the same.
        """
        run = _Run(self, x, state, cu_seqlens)
        inputs, value, gate = run.inputs()
        by_token = recurrent or (self.operator.native and x.device.type == "cpu")
        function = self.operator.recurrent if by_token else self.operator.chunk
        options = {"scale": self.scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        constants = [self.constants[p.name]() for p in self.operator.parameters]
        if self.trials > 1:
            o, final = self._stacked(function, inputs, constants, state, options), None
        else:
            o, final = function(*inputs, *constants, initial_state=None if state is None else state.op, **options)
        if self.skip is not None:
            o = o + self.of_row(self.skip, len(x))[..., None] * value
        if self.norm is not None:
            o = self.norm(o)
        o = o.flatten(2)
        if gate is not None:
            o = o * F.silu(gate)
        y = self.output(o.to(x.dtype) if not torch.is_autocast_enabled(x.device.type) else o)
        return (y, MixerState(tuple(run.tails), final)) if output_final_state else y

    def _stacked(
        self, function: Any, inputs: list[Tensor], constants: list[Tensor], state: Any, options: dict[str, Any]
    ) -> Tensor:
        """The op over all trials at once: a batch of them all, or heads of them all where heads have parameters."""
        if state is not None or options["output_final_state"] or options["cu_seqlens"] is not None:
            raise UserError("stacked trials are for training\n  cure: take the trial out first: dspace.nn.unstack")
        if not constants:
            return function(*inputs, **options)[0]
        trials = self.trials
        folded = [x.unflatten(0, (trials, -1)).movedim(0, 2).flatten(2, 3) for x in inputs]
        o, _ = function(*folded, *(c.flatten(0, 1) for c in constants), **options)
        return o.unflatten(2, (trials, -1)).movedim(2, 0).flatten(0, 1)

    def of_row(self, value: Tensor, rows: int) -> Tensor:
        """A number per head ``[heads, ...]``; of stacked trials ``[S, heads, ...]`` the one of each row of the batch."""
        return per_row(value, rows) if self.trials > 1 else value

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """Decode: ``x`` ``[B, hidden_size]`` or ``[B, T, hidden_size]`` after ``state`` (None: from the start)."""
        y, state = self(x if x.ndim == 3 else x[:, None], state, output_final_state=True, recurrent=True)
        return (y if x.ndim == 3 else y[:, 0]), state

    def state_size(self, sequence_length: int | None = None) -> int:
        """Numbers of recurrent state per sequence (float32 each), whatever the length; convolutions not counted."""
        return self.operator.state_numbers(self.num_v_heads, self.head_dim, self.head_v_dim)

    def extra_repr(self) -> str:
        return (
            f"{self.operator.name}, heads={self.num_heads}, value_heads={self.num_v_heads}, "
            f"K={self.head_dim}, V={self.head_v_dim}"
        )


class _Run:
    """One forward pass through the recipes."""

    def __init__(self, mixer: Mixer, x: Tensor, state: MixerState | None, offsets: Tensor | None) -> None:
        self.mixer, self.offsets = mixer, offsets
        self.caches = iter(state.conv) if state is not None else None
        self.tails: list[Tensor] = []
        self.taps = iter(mixer.taps)
        mixed = mixer.project(x)
        self.head_shape = mixed.shape[:2]
        parts: list[Tensor] = []
        if mixer._convolved:
            convolved, mixed = self.convolve(mixed)
            active, bare = convolved.split([mixer._activated, mixer._convolved - mixer._activated], -1)
            parts += _silu_of_each(active, mixer._widths["silu_conv"]) if mixer._activated else []
            parts += bare.split(mixer._widths["conv"], -1) if mixer._widths["conv"] else []
        parts += mixed.split(mixer._widths["plain"], -1)
        self.gate = parts.pop() if mixer._gated else None
        self.parts = [p.unflatten(-1, s) for p, s in zip(parts, mixer._shapes, strict=True)]
        self.values: dict[str, tuple[Tensor, str]] = {
            p.name: (mixer.of_row(mixer.constants[p.name](), len(x)), p.axes) for p in mixer.operator.parameters
        }

    def convolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Through the next short convolution, in the order in which the state lists their caches; and its other channels."""
        cache = next(self.caches) if self.caches is not None else None
        taps = next(self.taps)
        if self.offsets is None:
            y, tail, rest = conv_of_some(x, taps, cache)
        else:
            first, rest = x[..., : taps.shape[-1]], x[..., taps.shape[-1] :]
            y, tail = packed_conv(first, taps, self.offsets, cache)
        self.tails.append(tail)
        return y, rest

    def inputs(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The op's inputs in order, the values that a skip adds, and the output gate."""
        for name, _, axes, tree in self.mixer.plan.programs:
            value, own = self.evaluate(tree)
            if not set(own) <= set(axes):
                raise UserError(f"layer.{name}: the value lives on axes {own!r}, the input on {axes!r}")
            self.values[name] = (spread(value, own, axes), axes)
        found = [self.full(name, group, axes) for name, group, axes, _ in self._declared()]
        return found, self._skipped(), self.gate

    def _declared(self) -> list[tuple[str, str, str, Tree]]:
        programs = {program[0]: program for program in self.mixer.plan.programs}
        return [programs[d.name] for d in self.mixer.operator.inputs]

    def _skipped(self) -> Tensor:
        """The convolved value before its gates: the first projection in the recipe of the first input on ``v``."""
        for name, _, axes, tree in self._declared():
            if axes == "v":
                slot = _first_slot(tree)
                return self.values[name][0] if slot is None else self.parts[self.mixer._position[slot]]
        raise UserError("a skip needs an input on the axis v\n  cure: skip = false")

    def full(self, name: str, group: str, axes: str) -> Tensor:
        value = self.values[name][0]
        heads = self.mixer.num_heads if group == "key" else self.mixer.num_v_heads
        kind = value.device.type
        if axes and not self.gates(name) and torch.is_autocast_enabled(kind):
            # A learned number per head is float32 and would drag all operands of the matmuls with it.
            value = value.to(torch.get_autocast_dtype(kind))
        return value.expand(*self.head_shape, heads, *self.mixer._sizes(axes))

    def gates(self, name: str) -> bool:
        """Whether the input is a rate of forgetting: it adds up over the sequence, in float32."""
        return any(d.name == name and d.domain in ("nonpositive", "negative") for d in self.mixer.operator.inputs)

    def evaluate(self, tree: Tree) -> tuple[Any, str]:
        """A value ``[B, T, heads, *axes]`` or ``[heads, *axes]``, and its axes; numbers stay numbers."""
        match tree:
            case Const(value):
                return value, ""
            case Take(slot, axes, expand):
                part = self.parts[self.mixer._position[slot]]
                if expand >= 0:
                    group, _ = self.mixer.plan.expansions[expand]
                    part = self.mixer.expand[expand](part).unflatten(-1, self.mixer._shape(Slot("plain", group, axes)))
                return part, axes
            case PerHead(name):
                atom = self.mixer.of_row(self.mixer.atoms[name], self.head_shape[0])
                return (never_negative(atom) if name == "head_gain" else atom), ""
            case Ref(name, axes):
                return self.values[name][0], axes
            case Convolve(index, arg):
                value, axes = self.evaluate(arg)
                group, own = self.mixer.plan.convolutions[index]
                shape = self.mixer._shape(Slot("conv", group, own))
                whole = spread(value, axes, own).expand(*self.head_shape, *shape)
                return self.convolve(whole.flatten(2))[0].unflatten(-1, shape), own
            case Apply(func, args):
                return self.apply(func, [self.evaluate(a) for a in args])

    @staticmethod
    def apply(func: str, args: list[tuple[Any, str]]) -> tuple[Any, str]:
        onto = "".join(axis for axis in "kv" if any(axis in axes for _, axes in args))
        operands = [spread(v, axes, onto) if isinstance(v, Tensor) else v for v, axes in args]
        if func not in ("+", "-", "*", "/", "**", "neg"):
            like = next((v for v in operands if isinstance(v, Tensor)), torch.zeros(()))
            operands = [v if isinstance(v, Tensor) else torch.as_tensor(v).to(like) for v in operands]
        return FUNCTIONS[func](*operands), onto


def _silu_of_each(x: Tensor, widths: list[int]) -> list[Tensor]:
    """``silu`` of ``x``, split into channels of these ``widths``.

    Compiled, each part by itself: its derivative then goes with what else its gradient takes. That of all of them at
    once would evaluate for every channel what any of them takes.
    """
    if torch.compiler.is_compiling():
        return [F.silu(part) for part in x.split(widths, -1)]
    return list(F.silu(x).split(widths, -1))


def _first_slot(tree: Tree) -> int | None:
    match tree:
        case Take(slot, _, -1):
            return slot
        case Apply(_, args):
            return next((s for s in map(_first_slot, args) if s is not None), None)
        case Convolve(_, arg):
            return _first_slot(arg)
    return None


def _head_dim(hidden_size: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None and head_dim >= 1:
        return head_dim
    if head_dim is not None or num_heads < 1 or hidden_size % num_heads:
        raise UserError(
            f"Mixer: hidden_size = {hidden_size} does not divide into num_heads = {num_heads}\n"
            "  cure: choose num_heads that divides it, or give head_dim >= 1"
        )
    return hidden_size // num_heads

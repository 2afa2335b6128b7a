"""Surgery on trained models: another variant with all the weights, and the same output until training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.nn.layer import Mixer
from dspace.nn.operator import Operator, as_operator
from dspace.nn.parameters import copy_of, keep_marks
from dspace.nn.recipe import Apply, Convolve, Take, Tree, default_recipe

if TYPE_CHECKING:
    from dspace.spec import Spec

M = TypeVar("M", bound=nn.Module)


def convert(model: M, transform: str = "metaplastic", *, spec: Any = None) -> M:
    """A copy of ``model`` whose mixers are those of the transformed spec, with every weight kept, and every ``no_weight_decay``.

    ``model``: a :class:`~dspace.nn.model.Model`, a :class:`~dspace.nn.layer.Mixer`, or any module with mixers in it.
    ``metaplastic`` is the one transform that is the identity for some parameters: the importance gain ``b`` of every
    write starts at exactly 0 and the prior precision at 1. The output is then that of ``model`` to the last bit, and
    the gain has a gradient, so that training can wake it. The gain of a head is its atom ``head_gain`` times what the
    recipe of ``b`` says. ``spec`` names the base where the mixers were built from a module alone.

    Raises UserError for another transform, for a model without mixers, and (as TransformError) where the transform
    does not apply to the spec.
    """
    if transform != "metaplastic":
        raise UserError(
            f"convert does not know {transform!r}\n"
            "  cure: 'metaplastic'; other transforms change what a trained model computes: train a model of their spec"
        )
    made = copy_of(model)
    operators: dict[int, tuple[Operator, str]] = {}

    def converted(mixer: Mixer) -> Mixer:
        key = id(mixer.operator.chunk)
        if key not in operators:
            operators[key] = _converted_operator(mixer.operator, spec)
        return _converted_mixer(mixer, *operators[key])

    if isinstance(made, Mixer):
        return converted(made)  # type: ignore[return-value]
    found = [
        (parent, name, child)
        for parent in made.modules()
        for name, child in parent.named_children()
        if isinstance(child, Mixer)
    ]
    if not found:
        raise UserError("there is no dspace.nn.Mixer in this model\n  cure: convert a model of a recurrent variant")
    for parent, name, child in found:
        setattr(parent, name, converted(child))
    return made


def _base_spec(operator: Operator, given: Any) -> Spec:
    from dspace.spec import builtin_names, load

    if given is not None:
        spec = load(given) if not hasattr(given, "layer_ast") else given
    elif operator.spec is not None:
        return operator.spec
    elif operator.name in builtin_names():
        spec = load(operator.name)
    else:
        raise UserError(f"the spec of {operator.name!r} is not at hand\n  cure: convert(model, spec=...)")
    if operator.hash and spec.hash != operator.hash:
        raise UserError(
            f"the mixers were built from another spec than {spec.name!r} (hash {operator.hash[:16]})\n"
            "  cure: convert(model, spec=...) with the spec that the model was built from"
        )
    return spec


def _converted_operator(base: Operator, given: Any) -> tuple[Operator, str]:
    """The operator of the metaplastic spec, and the name of its gain."""
    from dspace.spec import from_dict, metaplastic

    spec = metaplastic(_base_spec(base, given))
    spec = from_dict(spec.to_dict(), name=f"{spec.name}_metaplastic"[:64])
    made = as_operator(spec)
    plan = _Names(_arguments(made), _arguments(base), "", (), len(base.state_axes))
    (gain,) = [d.name for d in made.inputs if d.name not in plan.base]
    plan = replace(plan, gain=gain, added=tuple(p.name for p in made.parameters if p.name not in plan.base))
    exact = replace(
        made, chunk=_Exact(made.chunk, base.chunk, plan), recurrent=_Exact(made.recurrent, base.recurrent, plan)
    )
    return exact, gain


def _arguments(operator: Operator) -> tuple[str, ...]:
    return (*(d.name for d in operator.inputs), *(p.name for p in operator.parameters))


@dataclass(frozen=True)
class _Names:
    """Names of the arguments of both variants, the gain, the added parameters, how many states the base has."""

    made: tuple[str, ...]
    base: tuple[str, ...]
    gain: str
    added: tuple[str, ...]
    states: int


class _Exact:
    """The converted variant; while its gain is 0 and its prior 1, with the values of the base and its own gradients.

    Both are then the same function, but their kernels round differently. From the first call on at which they are no
    longer the same, the base is not asked again; under torch.compile it is never asked.
    """

    def __init__(self, made: Callable[..., Any], base: Callable[..., Any], names: _Names) -> None:
        self.made, self.base, self.names = made, base, names
        self.asleep = True

    def __call__(self, *arguments: Tensor, initial_state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        o, final = self.made(*arguments, initial_state=initial_state, **options)
        given = dict(zip(self.names.made, arguments, strict=True))
        if self.asleep and not torch.compiler.is_compiling():
            self.asleep = not given[self.names.gain].any() and all((given[n] == 1).all() for n in self.names.added)
        if not self.asleep or torch.compiler.is_compiling():
            return o, final
        state = None if initial_state is None else _shown(tuple(initial_state)[: self.names.states])
        with torch.no_grad():
            value, end = self.base(*(given[n] for n in self.names.base), initial_state=state, **options)
        if final is not None:
            kept = end if isinstance(end, tuple) else (end,)
            final = (*map(_WithValue.apply, final[: len(kept)], kept), *final[len(kept) :])
        return _WithValue.apply(o, value), final


def _shown(states: tuple[Tensor, ...]) -> Any:
    return states[0] if len(states) == 1 else states


class _WithValue(torch.autograd.Function):
    """The second argument's value with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _converted_mixer(old: Mixer, operator: Operator, gain: str) -> Mixer:
    options = dict(old.options)
    recipe = operator.layer.get(gain)
    if recipe is None:
        recipe = default_recipe(next(d for d in operator.inputs if d.name == gain))
    from dspace.spec.syntax import unparse

    text = recipe if isinstance(recipe, str) else unparse(recipe)
    layer = {**options.pop("layer"), gain: f"head_gain * {text}"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the weights that are new
        new = Mixer(operator, **options, layer=layer)
    weight = old.project.weight
    new.to(device=weight.device, dtype=weight.dtype).train(old.training)
    with torch.no_grad():
        _copy_projections(old, new)
        kept = {n: p for n, p in old.named_parameters() if n.split(".")[0] not in ("project", "expand", "taps")}
        own = dict(new.named_parameters())
        for name, parameter in kept.items():
            own[name].copy_(parameter).requires_grad_(parameter.requires_grad)
    keep_marks(old, new)
    return new


def _copy_projections(old: Mixer, new: Mixer) -> None:
    """Rows of the fused projection, its convolution, and low ranks, recipe by recipe."""
    trees = {name: tree for name, _, _, tree in new.plan.programs}
    old_rows, new_rows = _rows(old), _rows(new)
    taps = 1 if old._convolved else 0
    new_taps = 1 if new._convolved else 0
    for name, _, _, tree in old.plan.programs:
        for a, b in zip(_leaves(tree), _leaves(trees[name]), strict=True):
            if isinstance(a, Take) and isinstance(b, Take):
                mine, other = old_rows[a.slot], new_rows[b.slot]
                new.project.weight[other] = old.project.weight[mine]
                if mine.stop <= old._convolved:
                    new.taps[0][:, other] = old.taps[0][:, mine]
                if a.expand >= 0:
                    new.expand[b.expand].weight.copy_(old.expand[a.expand].weight)  # type: ignore[operator, arg-type]
            elif isinstance(a, Convolve) and isinstance(b, Convolve):
                new.taps[new_taps + b.index].copy_(old.taps[taps + a.index])
    if old._gated:
        count = old._widths["plain"][-1]
        new.project.weight[-count:] = old.project.weight[-count:]


def _rows(mixer: Mixer) -> dict[int, slice]:
    """Rows of the fused projection of each slot of the plan."""
    found, start = {}, 0
    for slot, place in sorted(mixer._position.items(), key=lambda item: item[1]):
        stop = start + math.prod(mixer._shapes[place])
        found[slot] = slice(start, stop)
        start = stop
    return found


def _leaves(tree: Tree) -> Iterator[Take | Convolve]:
    """Slots and convolutions of a recipe, in the order of its text."""
    match tree:
        case Take():
            yield tree
        case Convolve(_, arg):
            yield tree
            yield from _leaves(arg)
        case Apply(_, args):
            for arg in args:
                yield from _leaves(arg)

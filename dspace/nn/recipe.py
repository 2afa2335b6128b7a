"""From a ``[layer]`` table to a plan of projections: which slots one fused matmul makes, and what is done to them.

A recipe is a formula over *atoms* (things that a layer learns) and *functions*. No PyTorch here: the plan is
data, :mod:`dspace.nn.layer` carries it out.

Axes: an atom makes what the entry that it stands in needs. The recipe of an input lives on the input's axes;
a shared definition (a key that is no input) lives on the axes common to all inputs that use it, so a gate
used by a scalar and by a vector input is one number per head. Values broadcast to the axes around them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dspace.errors import CompilerBug, UserError
from dspace.spec.syntax import Binary, Call, Name, Node, Number, Unary, parse, walk

PROJECTIONS: dict[str, str] = {
    "linear": "projection of the hidden state to the input's shape",
    "low_rank": "projection through two matrices of low rank",
    "write_gate": "one number in (0, 1) per head: sigmoid of a projection, shared by all that name it",
}
PER_HEAD: dict[str, str] = {
    "head_scale": "one learned number per head",
    "dt_bias": "one learned number per head; softplus of it starts log-uniform in [1e-3, 0.1]",
    "A_log": "one learned number per head, the logarithm of a rate of forgetting",
    "head_gain": "one learned number per head that is never negative and starts at exactly 0",
}
FUNCTIONS: dict[str, int] = {
    "conv": 1,
    "silu": 1,
    "relu": 1,
    "elu": 1,
    "l2norm": 1,
    "softmax": 1,
    "sigmoid": 1,
    "logsigmoid": 1,
    "softplus": 1,
    "exp": 1,
    "log": 1,
    "sqrt": 1,
    "tanh": 1,
    "abs": 1,
    "minimum": 2,
    "maximum": 2,
}
"""Functions of a recipe and how many arguments they take."""

_BY_DOMAIN = {
    "positive": "softplus(linear)",
    "nonnegative": "sigmoid(linear)",
    "unit": "sigmoid(linear)",
    "nonpositive": "-softplus(linear + dt_bias) * exp(A_log)",
    "negative": "-softplus(linear + dt_bias) * exp(A_log)",
}


@dataclass(frozen=True)
class Declared:
    """An input as a layer sees it."""

    name: str
    axes: str
    domain: str = "real"

    @property
    def group(self) -> Group:
        """Queries and keys may have fewer heads than values: real vectors over ``k`` alone."""
        return "key" if self.axes == "k" and self.domain == "real" else "value"


Group = Literal["key", "value"]
SlotKind = Literal["silu_conv", "conv", "plain"]


@dataclass(frozen=True)
class Slot:
    """A part of the fused projection: ``[B, T, heads, *axes]``, or ``[B, T, rank]`` for a low rank's first half."""

    kind: SlotKind
    group: Group
    axes: str
    low_rank: bool = False


@dataclass(frozen=True)
class Const:
    value: float


@dataclass(frozen=True)
class Take:
    """The value of slot ``slot``; ``expand`` is the second matrix of a low rank, or -1."""

    slot: int
    axes: str
    expand: int = -1


@dataclass(frozen=True)
class PerHead:
    name: str


@dataclass(frozen=True)
class Ref:
    """The value of an input or definition computed before, or a parameter of the spec."""

    name: str
    axes: str


@dataclass(frozen=True)
class Apply:
    func: str
    args: tuple[Tree, ...]


@dataclass(frozen=True)
class Convolve:
    """A short convolution of its own over a value that is not a bare projection."""

    index: int
    arg: Tree


Tree = Const | Take | PerHead | Ref | Apply | Convolve


@dataclass
class Plan:
    """What a layer builds. ``programs`` are in the order of computation, definitions before their users."""

    slots: list[Slot] = field(default_factory=list)
    expansions: list[tuple[Group, str]] = field(default_factory=list)
    convolutions: list[tuple[Group, str]] = field(default_factory=list)
    per_head: list[str] = field(default_factory=list)
    programs: list[tuple[str, Group, str, Tree]] = field(default_factory=list)


def default_recipe(declared: Declared) -> str:
    """A sensible recipe for an input that ``[layer]`` does not mention, by its axes and domain."""
    if declared.domain in _BY_DOMAIN:
        return _BY_DOMAIN[declared.domain]
    return {"k": "l2norm(silu(conv(linear)))", "v": "silu(conv(linear))"}.get(declared.axes, "linear")


def make_plan(
    inputs: Sequence[Declared], parameters: Mapping[str, str], layer: Mapping[str, Node | str] | None = None
) -> Plan:
    """Plan the layer of a variant.

    ``parameters`` maps the names of the spec's parameters to their axes, ``layer`` names to recipes (text or
    syntax trees). Raises UserError for an unknown name, a wrong number of arguments, or definitions that go
    round in a circle.
    """
    entries = {name: parse(entry) if isinstance(entry, str) else entry for name, entry in (layer or {}).items()}
    for declared in inputs:
        entries.setdefault(declared.name, parse(default_recipe(declared)))
    used = {node.id for entry in entries.values() for node in walk(entry) if isinstance(node, Name)}
    if "write_gate" in used:
        entries.setdefault("write_gate", parse("sigmoid(linear)"))
    for name, entry in entries.items():
        _check(name, entry, {*entries, *parameters})
    order = _ordered(entries)
    axes, groups = _places(inputs, entries, order)
    plan = Plan()
    planner = _Planner(plan, entries, axes, parameters)
    for name in order:
        if name in axes:  # a definition that nothing uses costs nothing
            tree = planner.tree(entries[name], axes[name], groups[name])
            plan.programs.append((name, groups[name], axes[name], tree))
    return plan


def _check(place: str, entry: Node, names: set[str]) -> None:
    known = {*names, *PROJECTIONS, *PER_HEAD}
    for node in walk(entry):
        if isinstance(node, Name) and node.id not in known:
            raise UserError(f"layer.{place}: there is no {node.id!r}{_near(node.id, known)}")
        if isinstance(node, Call):
            if node.func not in FUNCTIONS:
                raise UserError(f"layer.{place}: there is no function {node.func!r}{_near(node.func, FUNCTIONS)}")
            if len(node.args) != FUNCTIONS[node.func]:
                raise UserError(
                    f"layer.{place}: {node.func} takes {FUNCTIONS[node.func]} argument(s), not {len(node.args)}\n"
                    f"  cure: write {node.func}({', '.join('xy'[: FUNCTIONS[node.func]])})"
                )


def _near(word: str, known: Sequence[str] | set[str] | dict[str, int]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return (f"\n  did you mean {near[0]!r}?" if near else "") + f"\n  cure: use one of {', '.join(sorted(known))}"


def _uses(entry: Node, entries: Mapping[str, Node]) -> list[str]:
    return [node.id for node in walk(entry) if isinstance(node, Name) and node.id in entries]


def _ordered(entries: Mapping[str, Node]) -> list[str]:
    """Names with every definition before its users. Raises UserError for a circle."""
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == 2:
            return
        if state.get(name) == 1:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise UserError(f"layer: the recipes go round in a circle: {circle}\n  cure: break it with an atom")
        state[name] = 1
        for other in _uses(entries[name], entries):
            visit(other, (*path, name))
        state[name] = 2
        order.append(name)

    for name in entries:
        visit(name, ())
    return order


def _places(
    inputs: Sequence[Declared], entries: Mapping[str, Node], order: Sequence[str]
) -> tuple[dict[str, str], dict[str, Group]]:
    """Axes and head group of every entry that an input needs."""
    axes: dict[str, str] = {d.name: d.axes for d in inputs}
    groups: dict[str, Group] = {d.name: d.group for d in inputs}
    fixed = set(axes)
    for name in reversed(order):
        if name not in axes:
            continue
        for other in _uses(entries[name], entries):
            if other in fixed:
                continue
            known = axes.get(other, axes[name])
            axes[other] = "" if other == "write_gate" else "".join(a for a in known if a in axes[name])
            groups[other] = "value" if "value" in (groups.get(other, groups[name]), groups[name]) else "key"
    return axes, groups


class _Planner:
    """Turns syntax into trees, and collects the slots on the way."""

    def __init__(
        self, plan: Plan, entries: Mapping[str, Node], axes: Mapping[str, str], parameters: Mapping[str, str]
    ) -> None:
        self.plan, self.entries, self.axes, self.parameters = plan, entries, axes, parameters

    def slot(self, kind: SlotKind, group: Group, axes: str, low_rank: bool = False) -> int:
        self.plan.slots.append(Slot(kind, group, axes, low_rank))
        return len(self.plan.slots) - 1

    def tree(self, node: Node, axes: str, group: Group) -> Tree:
        match node:
            case Number(value):
                return Const(float(value))
            case Name(name):
                return self.name(name, axes, group)
            case Unary(_, operand):
                return Apply("neg", (self.tree(operand, axes, group),))
            case Binary(op, left, right):
                return Apply(op, (self.tree(left, axes, group), self.tree(right, axes, group)))
            case Call("silu", (Call("conv", (Name("linear"),)),)):
                return Take(self.slot("silu_conv", group, axes), axes)
            case Call("conv", (Name("linear"),)):
                return Take(self.slot("conv", group, axes), axes)
            case Call("conv", (argument,)):
                arg = self.tree(argument, axes, group)
                self.plan.convolutions.append((group, axes))
                return Convolve(len(self.plan.convolutions) - 1, arg)
            case Call(func, args):
                return Apply(func, tuple(self.tree(a, axes, group) for a in args))
        raise CompilerBug(f"the layer planner met {node!r}")

    def name(self, name: str, axes: str, group: Group) -> Tree:
        if name in self.entries:
            return Ref(name, self.axes[name])
        if name in self.parameters:
            return Ref(name, self.parameters[name])
        if name in PER_HEAD:
            if name not in self.plan.per_head:
                self.plan.per_head.append(name)
            return PerHead(name)
        if name == "low_rank":
            self.plan.expansions.append((group, axes))
            return Take(self.slot("plain", group, axes, low_rank=True), axes, len(self.plan.expansions) - 1)
        return Take(self.slot("plain", group, axes), axes)

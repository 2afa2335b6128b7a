"""Source of the native loops: plain Python over arrays and scalars, to be compiled by numba.

Every array is contiguous. Inputs are ``[tokens, heads, *axes]``, states ``[sequences, heads, *axes]``. A call does the
tasks ``first`` to ``last``, one task being one head of one sequence, so that threads can share a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dspace.emit.naming import INTERNAL, Namer, internal_names
from dspace.emit.schedule import INDENT, Arrays, LoopWriter, buffers_of
from dspace.math.gradients import new_symbol
from dspace.math.ir import Adjoint, Axes, Recurrence, SumK, SumV, Variable
from dspace.plan.sequential import SIZES, Schedule, Token, schedule

LEADING = ["first", "last", "heads", "every", "size_k", "size_v", "scale", "offsets"]


@dataclass(frozen=True)
class Loop:
    """One native loop: its source, and the shape of each scratch array that its caller must provide, zeroed, as text."""

    name: str
    code: str
    scratch: tuple[str, ...]


def without_variance(expr: sympy.Expr) -> sympy.Expr:
    """The gradient ``expr`` where nothing flows from the variance."""
    expr = expr.xreplace({sympy.Symbol("d_variance", real=True): sympy.S.Zero})
    while True:
        empty = {e: sympy.S.Zero for e in expr.atoms(SumK, SumV) if e.args[0] == 0}
        if not empty:
            return expr
        expr = expr.xreplace(empty)


def forward_token(r: Recurrence, variance: bool, *, readout: bool = True) -> Token:
    """One token forward; without ``readout`` the states alone."""
    new = {s.symbol: new_symbol(s) for s in r.states}
    seen = new if r.read == "after" else {}
    outputs: dict[str, tuple[Axes, sympy.Expr]] = {}
    if readout:
        outputs["output"] = ("v", r.output.xreplace(seen))
        if variance and r.variance is not None:
            outputs["variance"] = ("v", r.variance.xreplace(seen))
    return Token(
        leaves=r.axes_table(),
        defined={new[s.symbol]: s.update for s in r.states},
        carried={s.name: (s.axes, s.symbol, new[s.symbol]) for s in r.states},
        outputs=outputs,
    )


def backward_token(r: Recurrence, adjoint: Adjoint, variance: bool) -> Token:
    """One token backward: cotangents of the states are carried, those of the parameters add up."""
    wrt = {n: e if variance else without_variance(e) for n, e in adjoint.wrt.items()}
    leaves = dict(r.axes_table()) | {new_symbol(s): s.axes for s in r.states}
    leaves |= {c.symbol: c.axes for c in adjoint.cotangents}
    return Token(
        leaves=leaves,
        defined={},
        carried={f"d_{s.name}": (s.axes, sympy.Symbol(f"d_{s.name}", real=True), wrt[s.name]) for s in r.states},
        outputs={f"d_{v.name}": (v.axes, wrt[v.name]) for v in r.inputs},
        accumulated={f"d_{p.name}": (p.axes, wrt[p.name]) for p in r.parameters},
    )


class Body:
    """What the two loops have in common: names, views of arrays at a task or a token, a schedule's lines."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.r = recurrence
        self.namer = Namer(INTERNAL | {*LEADING, "range", "min", "max", "abs", "count_k", "count_v", "o", "variance"})
        self.names = internal_names(recurrence, self.namer)
        self.arrays: list[str] = []
        self.scratch: list[tuple[str, str]] = []
        self.loads: dict[sympy.Symbol, str] = {SIZES["k"]: "count_k", SIZES["v"]: "count_v"}
        self.loads[sympy.Symbol("scale", positive=True)] = "scale"
        self.stores: dict[str, str] = {}

    def array(self, wish: str) -> str:
        """A new array argument."""
        name = self.namer(wish)
        self.arrays.append(name)
        return name

    def known(self, name: str) -> str:
        """An array argument under a name that was reserved before."""
        self.arrays.append(name)
        return name

    def temporary(self, name: str, *shape: str) -> str:
        """A scratch array argument."""
        self.scratch.append((name, "".join(f"{size}, " for size in shape).strip()))
        return name

    def view(self, array: str, wish: str, place: str) -> tuple[str, str]:
        """A name for ``array[place]``, and the line that makes it."""
        name = self.namer(wish)
        return name, f"{name} = {array}[{place}]"

    def loops(self, made: Schedule) -> list[str]:
        for name, axes in buffers_of(made):
            self.temporary(name, f"size_{axes}")
        return LoopWriter(made, Arrays(dict(self.loads), dict(self.stores)), self.namer).lines()

    def function(self, name: str, doc: str, body: list[str]) -> Loop:
        arguments = [*LEADING, *self.arrays, *(name for name, _ in self.scratch)]
        lines = [f"def {name}("]
        lines += _wrapped(arguments)
        lines += ["):", f'    """{doc}"""']
        like = self.names[self.r.inputs[0].name]
        lines += [
            f"    real = {like}.dtype.type",
            "    zero = real(0.0)",
            "    one = real(1.0)",
            "    scale = real(scale)",
            "    count_k = real(size_k)",
            "    count_v = real(size_v)",
            "    for task in range(first, last):",
            "        sequence = task // heads",
            "        head = task - sequence * heads",
            "        begin = offsets[sequence]",
            "        end = offsets[sequence + 1]",
        ]
        return Loop(
            name,
            "\n".join([*lines, *(2 * INDENT + line for line in body)]) + "\n",
            tuple(shape for _, shape in self.scratch),
        )


def _wrapped(arguments: list[str], width: int = 110) -> list[str]:
    lines, row = [], INDENT
    for a in arguments:
        if len(row) + len(a) > width:
            lines.append(row.rstrip())
            row = INDENT
        row += f"{a}, "
    return [*lines, row.rstrip()]


def copy(axes: Axes, target: str, source: str) -> list[str]:
    """Lines that copy one state."""
    if axes == "kv":
        return [
            "for i in range(size_k):",
            "    for j in range(size_v):",
            f"        {target}[i, j] = {source}[i, j]",
        ]
    if axes:
        index, size = ("i", "size_k") if axes == "k" else ("j", "size_v")
        return [f"for {index} in range({size}):", f"    {target}[{index}] = {source}[{index}]"]
    return [f"{target} = {source}"]


def _indent(lines: list[str], depth: int = 1) -> list[str]:
    return [depth * INDENT + line for line in lines]


def forward(r: Recurrence, variance: bool) -> Loop:
    """The forward loop: states advance in place from initial to final, saved every ``every`` tokens."""
    b = Body(r)
    body: list[str] = []
    token: list[str] = []
    for v in r.inputs:
        b.loads[v.symbol], line = b.view(b.known(b.names[v.name]), f"{v.name}_t", "token, head")
        token.append(line)
    for p in r.parameters:
        b.loads[p.symbol], line = b.view(b.known(b.names[p.name]), f"{p.name}_h", "head")
        body.append(line)
    states = [_state(b, s.symbol, s.name, s.axes, b.known(b.names[s.name]), body) for s in r.states]
    token += [line for s in states for line in s.load]
    for key, name in (("output", "o"), ("variance", "variance"))[: 1 + variance]:
        b.stores[key], line = b.view(b.known(name), f"{name}_t", "token, head")
        token.append(line)
    saved: list[str] = []
    for s, local in zip(r.states, states, strict=True):
        place = f"{b.array(f'saved_{s.name}')}[segment, head]"
        saved += copy(s.axes, place, local.array)
    used = [(b.names[v.name], v.axes) for v in r.inputs]
    used += [(name, "v") for name in ("o", "variance")[: 1 + variance]]
    made = schedule(forward_token(r, variance), b.namer)
    body.append("for token in range(begin, end):")
    body += _indent(["if every and (token - begin) % every == 0:  # the backward pass restarts from here"])
    body += _indent(["segment = begin // every + sequence + (token - begin) // every", *(saved or ["pass"])], 2)
    body += _indent(_fetch(used, "+ 4") + token + b.loops(made))
    name = "_native_forward_variance_loop" if variance else "_native_forward_loop"
    return b.function(name, "Tasks ``first`` to ``last`` forward, token by token.", body)


@dataclass(frozen=True)
class _Local:
    """A state at a task: its array text, and what a token must load (scalars only)."""

    array: str
    load: list[str]


def _state(b: Body, symbol: sympy.Symbol, name: str, axes: Axes, array: str, body: list[str]) -> _Local:
    if axes:
        local, line = b.view(array, f"{name}_h", "sequence, head")
        body.append(line)
        b.loads[symbol], b.stores[name] = local, local
        return _Local(local, [])
    local = b.namer(f"{name}_h")
    b.loads[symbol], b.stores[name] = local, f"{array}[sequence, head]"
    return _Local(f"{array}[sequence, head]", [f"{local} = {array}[sequence, head]"])


def _fetch(arrays: list[tuple[str, Axes]], ahead: str) -> list[str]:
    """Lines that ask for the rows of the token ``ahead``, which need not exist; 16 floats are one line of memory."""
    lines: list[str] = []
    for axes, index in (("k", "i"), ("v", "j")):
        if names := [name for name, on in arrays if on == axes]:
            lines.append(f"for {index} in range(0, size_{axes}, 16):")
            lines += [f"{INDENT}_native_fetch({name}, token {ahead}, head, {index})" for name in names]
    return lines


def backward(r: Recurrence, adjoint: Adjoint, variance: bool) -> Loop:
    """The backward loop: segments in reverse; in each, states forward again in ``past``, then tokens in reverse."""
    b = Body(r)
    task: list[str] = []
    restart: list[str] = []
    inputs: list[str] = []
    again: list[str] = []
    reverse: list[str] = []
    for v in r.inputs:
        b.loads[v.symbol], line = b.view(b.known(b.names[v.name]), f"{v.name}_t", "token, head")
        inputs.append(line)
    for p in r.parameters:
        b.loads[p.symbol], line = b.view(b.known(b.names[p.name]), f"{p.name}_h", "head")
        task.append(line)
    past: dict[str, str] = {}
    for s in r.states:
        saved = b.array(f"saved_{s.name}")
        past[s.name] = b.temporary(b.namer(f"past_{s.name}"), "every + 1", *(f"size_{axis}" for axis in s.axes))
        restart += copy(s.axes, f"{past[s.name]}[0]", f"{saved}[segment, head]")
        b.loads[s.symbol], line = b.view(past[s.name], f"{s.name}_h", "token - start")
        again.append(line)
        b.stores[s.name] = f"{past[s.name]}[token - start + 1]"
        if s.axes:
            b.stores[s.name], line = b.view(past[s.name], f"{s.name}_next", "token - start + 1")
            again.append(line)
    used = [(b.names[v.name], v.axes) for v in r.inputs]
    again = _fetch(used, "+ 4") + again + b.loops(schedule(forward_token(r, variance, readout=False), b.namer))

    for s in r.states:
        b.loads[s.symbol], line = b.view(past[s.name], f"{s.name}_old", "token - start")
        b.loads[new_symbol(s)], other = b.view(past[s.name], f"{s.name}_now", "token - start + 1")
        reverse += [line, other]
    given = [Variable("d_output", "v", "cotangent")]
    given += [Variable("d_variance", "v", "cotangent")] if variance else []
    for c in given:
        b.loads[c.symbol], line = b.view(b.array(c.name), f"{c.name}_t", "token, head")
        reverse.append(line)
        used.append((b.arrays[-1], c.axes))
    for s in r.states:
        symbol = sympy.Symbol(f"d_{s.name}", real=True)
        reverse += _state(b, symbol, symbol.name, s.axes, b.array(symbol.name), task).load
    for v in r.inputs:
        array = b.array(f"d_{v.name}")
        used.append((array, v.axes))
        if v.axes:
            b.stores[f"d_{v.name}"], line = b.view(array, f"d_{v.name}_t", "token, head")
            reverse.append(line)
        else:
            b.stores[f"d_{v.name}"] = f"{array}[token, head]"
    for p in r.parameters:
        array = b.array(f"d_{p.name}")
        if p.axes:
            b.stores[f"d_{p.name}"], line = b.view(array, f"d_{p.name}_h", "sequence, head")
            task.append(line)
        else:
            b.stores[f"d_{p.name}"] = f"{array}[sequence, head]"
    reverse = _fetch(used, "- 4") + reverse + b.loops(schedule(backward_token(r, adjoint, variance), b.namer))

    body = [*task, "count = (end - begin + every - 1) // every", "for back in range(count):"]
    body += _indent(
        [
            "start = begin + (count - 1 - back) * every",
            "stop = min(start + every, end)",
            "segment = begin // every + sequence + (count - 1 - back)",
            *restart,
            "# The states of this segment once more.",
            "for token in range(start, stop):",
            *_indent(inputs + again),
            "# Cotangents, last token first.",
            "for token in range(stop - 1, start - 1, -1):",
            *_indent(inputs + reverse),
        ]
    )
    name = "_native_backward_variance_loop" if variance else "_native_backward_loop"
    return b.function(
        name, "Tasks ``first`` to ``last`` backward; ``d_STATE`` goes from final to initial in place.", body
    )

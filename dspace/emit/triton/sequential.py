"""Kernels of the sequential plan on a GPU: any recurrence, token by token, states in registers.

One program runs one head of one sequence, or a block of its value channels where no formula contracts over ``v``:
then the blocks are recurrences of their own, and gradients of what they share are sums over them. Every value is a
float32 tile, ``[BK, 1]`` on k, ``[1, BV]`` on v, ``[BK, BV]`` on kv, a number on neither; lanes beyond K and V hold
anything and are left out of every sum. The kernel for one token is the same: decoding.

The backward kernel takes segments in reverse from states saved at their borders: states forward once more, each
kept in a scratch tile, then tokens in reverse with the expressions of the adjoint. Nothing is added atomically.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy

from dspace.emit.base import Section
from dspace.emit.cpu.loops import backward_token, forward_token
from dspace.emit.naming import INTERNAL, Namer, internal_names
from dspace.emit.triton import launching
from dspace.emit.triton.printer import TritonPrinter
from dspace.emit.triton.sequential_host import host_source
from dspace.emit.triton.tiles import HEAD, TILES, given_end, indented, load, place_of, raw, shaped, stored
from dspace.math.gradients import new_symbol
from dspace.math.ir import Adjoint, Analysis, Axes, Recurrence, State, SumV, Variable, axes_of
from dspace.plan.sequential import SIZES, Assign, Scheduler, Store, Sum, Token, flatten

_LOCAL = frozenset(
    """T H K V BK BV NV NH EVERY TOTAL SUB CHUNKS INPUTS live i_t OUTPUT VARIANCE SAVE PACKED ONE EXACT_K EXACT_V pid i_v i_n i_h i_nh o_k o_v m_k
    m_v m_kv r_k r_v t_kv t_past at t back segment count slot place i_k NK part ahead shared begin end steps zero_ zero_k zero_v zero_kv count_k
    count_v range o variance back_t first""".split()
)


SHARED = (
    "    NH = tl.num_programs(0) // NV",
    "    shared = i_v * NH + i_nh  # row of what value blocks share",
)
BACKWARD = (
    "    segments = tl.cdiv(steps, EVERY)",
    "    for back in range(0, segments):",
    "        segment = segments - 1 - back",
    "        first = begin + segment * EVERY",
    "        count = tl.minimum(EVERY, steps - segment * EVERY)",
)
"""Head of the loop over segments of EVERY tokens, the last one first."""


def splits(r: Recurrence) -> bool:
    """Whether blocks of value channels are independent: no formula of a token contracts over them."""
    formulas = [s.update for s in r.states] + [r.output, r.variance or sympy.Integer(0)]
    return not any(e.has(SumV) for e in formulas)


def section(analysis: Analysis, common: bool = True) -> Section:
    """The sequential section of any recurrence; ``common`` brings what all Triton sections share."""
    r = analysis.recurrence
    parts = [launching.COMMON] if common else []
    parts += [TILES, *Kernels(r).all(analysis.adjoint), host_source(r, splits(r))]
    return Section(
        device="cuda",
        imports=launching.IMPORTS,
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk=None,
        recurrent="_recurrent_triton_core",
    )


class Body:
    """The flat statements of one token, printed."""

    def __init__(self, token: Token, names: Mapping[str, str], namer: Namer) -> None:
        self.flattener, self.stores, previous = flatten(token, namer)
        self.scheduler = Scheduler(self.flattener, self.stores, previous)
        self.names = {**names, SIZES["k"].name: "count_k", SIZES["v"].name: "count_v"}
        self.show = TritonPrinter(self.names)
        self.done: set[sympy.Symbol] = set()

    def uses(self) -> set[sympy.Symbol]:
        """Every symbol that the token reads."""
        statements = self.scheduler.in_order({x for s in self.stores for x in s.expr.free_symbols})
        return {x for s in (*statements, *self.stores) for x in s.expr.free_symbols}

    def until(self, stores: Iterable[Store]) -> list[str]:
        """Statements that ``stores`` need and that were not printed yet."""
        lines = []
        for s in self.scheduler.in_order({x for store in stores for x in store.expr.free_symbols}):
            if s.symbol not in self.done:
                self.done.add(s.symbol)
                lines.append(f"{self.names.get(s.symbol.name, s.symbol.name)} = {self.value(s)}")
        return lines

    def value(self, s: Assign | Sum) -> str:
        if isinstance(s, Assign):
            return self.show(s.expr)
        live = f"_live({self.show(s.expr)}, m_{s.over}, EXACT_{s.over.upper()})"
        if s.loop != "kv":
            return f"tl.sum({live})"
        return f"tl.sum({live}, axis=0)[None, :]" if s.over == "k" else f"tl.sum({live}, axis=1)[:, None]"

    def full(self, store: Store) -> str:
        """The value of ``store``, spread over all its axes."""
        text = self.show(store.expr)
        whole = store.expr.free_symbols and axes_of(store.expr, self.flattener.axes) == store.axes
        return text if whole else f"{text} + zero_{store.axes}"


@dataclass(frozen=True)
class Reverse:
    """What a backward kernel is written from: names by variable or state, and the statements of its two loops.

    ``past`` are states within a segment, ``old`` the one before a token, ``d_local`` the cotangents that are carried;
    ``again`` takes the states forward once more, ``back`` tokens in reverse; they use and ``read`` these symbols.
    """

    arrays: dict[str, str]
    saved: dict[str, str]
    past: dict[str, str]
    d_end: dict[str, str]
    d_start: dict[str, str]
    d_local: dict[str, str]
    old: dict[str, str]
    d_out: dict[str, str]
    sums: dict[str, str]
    given: list[Variable]
    d_given: dict[str, str]
    d_arrays: dict[str, str]
    again: Body
    back: Body
    used: set[sympy.Symbol]
    read: set[sympy.Symbol]


class Kernels:
    """Writes the kernels of one recurrence."""

    body: type[Body] = Body
    head = HEAD

    def __init__(self, recurrence: Recurrence) -> None:
        self.r = recurrence
        self.namer = Namer(INTERNAL | _LOCAL | set(dir(builtins)) | {"scale"})
        self.names = internal_names(recurrence, self.namer)

    def leaves(self, variables: Sequence[Variable], suffix: str = "in") -> dict[str, str]:
        return {v.name: self.namer(f"{self.names[v.name]}_{suffix}") for v in variables}

    def signature(self, name: str, doc: str, arguments: list[str], numbers: str, flags: str) -> list[str]:
        free = ", ".join(f'"{n}"' for n in ("T", "EVERY", "TOTAL", "SUB") if n == "T" or n in numbers)
        lines = [f"@_kernel(do_not_specialize=[{free}])", f"def {name}("]
        row = "   "
        for a in arguments:
            if len(row) + len(a) > 110:
                lines.append(row)
                row = "   "
            row += f" {a},"
        lines += [row, f"    offsets, scale, T, {numbers},"]
        lines += [f"    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, {flags}"]
        return [*lines, "):", f'    """{doc}"""', *self.head.splitlines()]

    def tokens(self, used: set[sympy.Symbol], arrays: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Lines before a loop over tokens, and at its start: inputs are loaded one token ahead of their use.

        Row ``at`` is this token's, ``ahead`` that of the next one, or of the last once more. A ``kv`` input is loaded
        when it is used: two tiles of it would crowd out the states.
        """
        before, inside, early = [], [], []
        for v in self.r.inputs:
            name, array = self.names[v.name], arrays[v.name]
            if v.symbol not in used:
                continue
            if v.axes == "kv":
                inside.append(f"{name} = {load(array, v.axes, 'at')}")
                continue
            following = self.namer(f"{name}_next")
            before.append(f"{following} = {raw(array, v.axes, 'at')}")
            inside.append(f"{name} = {following}{shaped(v.axes)}")
            early.append(f"{following} = {raw(array, v.axes, 'ahead')}")
        return before, [*inside, *early]

    def parameters(self, used: set[sympy.Symbol], arrays: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Lines that load the parameters, and lines that give them their shapes."""
        read = [p for p in self.r.parameters if p.symbol in used]
        names = [self.names[p.name] for p in read]
        loads = [f"{n} = {raw(arrays[p.name], p.axes, 'i_h')}" for n, p in zip(names, read, strict=True)]
        return loads, [f"{n} = {n}{shaped(p.axes)}" for n, p in zip(names, read, strict=True)]

    def advance(self, body: Body) -> list[str]:
        """Lines that give every carried value its next one, all at once."""
        carried = [s for s in body.stores if s.name in body.scheduler.previous]
        after = [self.namer(f"{self.carried[s.name]}_after") for s in carried]
        lines = [f"{name} = {body.full(s)}" for name, s in zip(after, carried, strict=True)]
        return lines + [f"{self.carried[s.name]} = {name}" for name, s in zip(after, carried, strict=True)]

    def all(self, adjoint: Adjoint) -> list[str]:
        """Forward and backward, the latter once more for cotangents of the variance."""
        return [self.forward(), *(self.backward(adjoint, variance) for variance in self.asked())]

    def asked(self) -> list[bool]:
        """What may be differentiated: without the variance, and with it if there is one."""
        return [False] if self.r.variance is None else [False, True]

    def forward(self) -> str:
        r, names = self.r, self.names
        arrays = self.leaves((*r.inputs, *r.parameters))
        initial, final, saved = (
            {s.name: self.namer(f"{names[s.name]}_{part}") for s in r.states} for part in ("initial", "final", "saved")
        )
        arguments = [*arrays.values(), *initial.values(), "o", "variance", *final.values(), *saved.values()]
        doc = "Tokens forward from the initial states; SAVE keeps the states before every EVERY-th token; ONE token."
        lines = self.signature(
            "_sequential_kernel", doc, arguments, "EVERY, H",
            "OUTPUT: tl.constexpr, VARIANCE: tl.constexpr,\n    SAVE: tl.constexpr, PACKED: tl.constexpr, ONE: tl.constexpr,",
        )  # fmt: skip
        lines += ["    if ONE:  # one token, for decoding: no loop, and nothing is loaded ahead", "        steps = 1"]
        self.carried = {s.name: names[s.name] for s in r.states}
        body = Body(forward_token(r, r.variance is not None), self.local(), self.namer)
        used = body.uses()
        loads, shapes = self.parameters(used, arrays)
        before, inside = self.tokens(used, arrays)
        starts = [f"{names[s.name]} = {raw(initial[s.name], s.axes, 'i_nh')}" for s in r.states]
        starts += [f"{names[s.name]} = {names[s.name]}{shaped(s.axes)}" for s in r.states]
        lines += self.walk([*loads, *before, *starts, *shapes], inside)
        lines += ["        if SAVE:", "            if t % EVERY == 0:"]
        lines += indented(["slot = (begin // EVERY + i_n + t // EVERY) * H + i_h"], 4)
        lines += indented(self.once({s: stored(saved[s.name], s.axes, "slot", names[s.name]) for s in r.states}), 4)
        carried = [s for s in body.stores if s.name in body.scheduler.previous]
        lines += indented(body.until(carried), 2)
        for flag, key, name in (("OUTPUT", "output", "o"), ("VARIANCE", "variance", "variance")):
            stores = [s for s in body.stores if s.name == key]
            lines += indented([f"if {flag}:"], 2) if stores else []
            for s in stores:
                lines += indented(body.until([s]), 3)
                lines += indented([stored(name, "v", "at", body.full(s))], 3)
                # What one branch computed is not known after it.
                body.done = {x for x in body.done if x in self.symbols_of(body, carried)}
        lines += indented(self.advance(body), 2)
        lines += ["    if OUTPUT:"]
        lines += indented(self.once({s: stored(final[s.name], s.axes, "i_nh", names[s.name]) for s in r.states}), 2)
        return "\n".join(lines) + "\n"

    def walk(self, before: list[str], inside: list[str]) -> list[str]:
        """Lines ``before`` a loop over the tokens of a sequence, and its beginning."""
        lines = [
            "    at = tl.minimum(begin, rows - 1) * H + i_h",
            *indented(before, 1),
            "    for t in range(0, steps):",
        ]
        lines += [
            "        at = (begin + t) * H + i_h",
            "        ahead = (begin + tl.minimum(t + 1, steps - 1)) * H + i_h",
        ]
        return [*lines, *indented(inside, 2)]

    def once(self, stores: Mapping[State, str]) -> list[str]:
        """Stores of states: those without a v axis are the same in every block of v, and one block writes them."""
        own = self.written((s.axes, line) for s, line in stores.items() if "v" in s.axes)
        same = self.written((s.axes, line) for s, line in stores.items() if "v" not in s.axes)
        return own + (["if i_v == 0:", *indented(same, 1)] if same else [])

    def written(self, stores: Iterable[tuple[Axes, str]]) -> list[str]:
        """Lines of stores, given with their axes."""
        return [line for _, line in stores]

    def symbols_of(self, body: Body, stores: Sequence[Store]) -> set[sympy.Symbol]:
        needed = body.scheduler.in_order({x for s in stores for x in s.expr.free_symbols})
        return {s.symbol for s in needed}

    def local(self) -> dict[str, str]:
        """Names of leaves as a forward token sees them."""
        return {**self.names, **{new_symbol(s).name: self.namer(f"{self.names[s.name]}_new") for s in self.r.states}}

    def reverse(self, adjoint: Adjoint, variance: bool) -> Reverse:
        """Names and statements of a backward kernel, with cotangents of the variance or without."""
        r, names = self.r, self.names
        variables = (*r.inputs, *r.parameters)
        arrays = self.leaves(variables)
        saved, past, d_end, d_start, d_local, old = (
            {s.name: self.namer(wish.format(names[s.name])) for s in r.states}
            for wish in ("{}_saved", "{}_past", "d_{}_final", "d_{}_initial", "d_{}", "{}_old")
        )
        d_out = {v.name: self.namer(f"d_{names[v.name]}_out") for v in variables}
        sums = {p.name: self.namer(f"sum_{names[p.name]}") for p in r.parameters}
        given = [Variable("d_output", "v", "cotangent")]
        given += [Variable("d_variance", "v", "cotangent")] if variance else []
        d_given = {c.name: self.namer(c.name) for c in given}
        d_arrays = {c.name: self.namer(f"{c.name}_in") for c in given}

        self.carried = {s.name: names[s.name] for s in r.states}
        again = self.body(forward_token(r, variance, readout=False), self.local(), self.namer)
        again.stores = [s for s in again.stores if s.name in again.scheduler.previous]
        reverse_names = {**names, **d_given, **{f"d_{s.name}": d_local[s.name] for s in r.states}}
        reverse_names |= {s.name: old[s.name] for s in r.states} | {new_symbol(s).name: names[s.name] for s in r.states}
        back = self.body(backward_token(r, adjoint, variance), reverse_names, self.namer)
        read = back.uses()
        given = [c for c in given if c.symbol in read]
        return Reverse(
            arrays, saved, past, d_end, d_start, d_local, old, d_out, sums, given, d_given, d_arrays, again, back,
            again.uses(), read,
        )  # fmt: skip

    def backward(self, adjoint: Adjoint, variance: bool) -> str:
        r, names, x = self.r, self.names, self.reverse(adjoint, variance)
        arguments = [*x.arrays.values(), *x.saved.values(), *x.past.values(), *x.d_arrays.values(), *x.d_end.values()]
        arguments += [*x.d_out.values(), *x.d_start.values()]
        doc = "Cotangents of inputs, parameters and initial states: segments in reverse, each from its saved states."
        name = "_sequential_backward_variance_kernel" if variance else "_sequential_backward_kernel"
        lines = self.signature(name, doc, arguments, "EVERY, TOTAL, H", "PACKED: tl.constexpr,")
        lines += ["    t_past = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]", *SHARED]
        loads, shapes = self.parameters(x.used | x.read, x.arrays)
        lines += indented([*loads, *shapes], 1)
        lines += [f"    {x.d_local[s.name]} = {given_end(s, x.d_end[s.name])}" for s in r.states]
        lines += [f"    {x.sums[p.name]} = zero_{p.axes}" for p in r.parameters]
        lines += [*BACKWARD, "        slot = (begin // EVERY + i_n + segment) * H + i_h"]
        lines += [f"        {names[s.name]} = {load(x.saved[s.name], s.axes, 'slot')}" for s in r.states]
        before, inside = self.tokens(x.used, x.arrays)
        lines += ["        # The states of this segment once more.", "        at = first * H + i_h"]
        lines += [*indented(before, 2), "        for t in range(0, count):"]
        lines += [
            "            at = (first + t) * H + i_h",
            "            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h",
        ]
        lines += ["            place = pid.to(tl.int64) * EVERY + t"]
        lines += indented((f"tl.store({self.past(x.past[s.name], s.axes)}, {names[s.name]})" for s in r.states), 3)
        lines += indented([*inside, *x.again.until(x.again.stores), *self.advance(x.again)], 3)
        lines += ["        tl.debug_barrier()  # other threads of this program read what these wrote"]
        before, inside = self.tokens(x.read, x.arrays)
        for c in x.given:
            following = self.namer(f"{x.d_given[c.name]}_next")
            before.append(f"{following} = {raw(x.d_arrays[c.name], 'v', 'at')}")
            inside.append(f"{x.d_given[c.name]} = {following}{shaped('v')}")
            inside.append(f"{following} = {raw(x.d_arrays[c.name], 'v', 'ahead')}")
        lines += ["        # Cotangents, last token first.", "        at = (first + count - 1) * H + i_h"]
        lines += [*indented(before, 2), "        for back_t in range(0, count):"]
        lines += ["            t = count - 1 - back_t", "            at = (first + t) * H + i_h"]
        lines += ["            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h"]
        lines += ["            place = pid.to(tl.int64) * EVERY + t"]
        lines += indented((f"{x.old[s.name]} = tl.load({self.past(x.past[s.name], s.axes)})" for s in r.states), 3)
        self.carried = {f"d_{s.name}": x.d_local[s.name] for s in r.states}
        lines += indented([*inside, *x.back.until(x.back.stores)], 3)
        for store in x.back.stores:
            if store.add:
                lines += indented([f"{x.sums[store.name.removeprefix('d_')]} += {x.back.full(store)}"], 3)
            elif store.name not in self.carried:
                array, row = self.result_of(store, x)
                lines += indented([stored(array, store.axes, row, x.back.full(store))], 3)
        lines += indented(self.advance(x.back), 3)
        lines += indented((f"{names[s.name]} = {x.old[s.name]}" for s in r.states if new_symbol(s) in x.read), 3)
        lines += ["        tl.debug_barrier()"]
        lines += indented(self.totals(x), 1)
        for s in r.states:
            lines += indented([stored(x.d_start[s.name], s.axes, place_of(s.axes), x.d_local[s.name])], 1)
        return "\n".join(lines) + "\n"

    def result_of(self, store: Store, x: Reverse) -> tuple[str, str]:
        """Array and row of the cotangent of an input: what has no v axis, every block of v finds a part of."""
        name = store.name.removeprefix("d_")
        axes = {v.name: v.axes for v in self.r.inputs}
        return x.d_out[name], "at" if "v" in axes[name] else "(i_v.to(tl.int64) * TOTAL + at)"

    def totals(self, x: Reverse) -> list[str]:
        """Stores of the cotangents of parameters."""
        return [stored(x.d_out[p.name], p.axes, place_of(p.axes), x.sums[p.name]) for p in self.r.parameters]

    def past(self, array: str, axes: Axes) -> str:
        """Pointers to the scratch tile of a state at ``place``: whole tiles, lanes beyond the channels included."""
        part = {"": "", "k": " + tl.arange(0, BK)[:, None]", "v": " + tl.arange(0, BV)[None, :]", "kv": " + t_past"}
        width = {"": "", "k": " * BK", "v": " * BV", "kv": " * BK * BV"}
        return f"{array} + place{width[axes]}{part[axes]}"

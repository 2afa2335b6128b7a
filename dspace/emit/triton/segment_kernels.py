"""Kernels of all chunks at once: the tokens of a chunk forward and backward, states in registers, in tiles of k.

EVERY tokens are unrolled: what they need is loaded before the first of them, and backward their states stay in registers.
Behind a chunk's last token it is run again and again, and what it does is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import sympy

from dspace.emit.cpu.loops import forward_token
from dspace.emit.triton.sequential import BACKWARD, SHARED, Kernels, Reverse
from dspace.emit.triton.tiled import HEAD, TiledBody, collected, over_tiles, tiled, written
from dspace.emit.triton.tiles import given_end, indented, load, place_of, raw, shaped, stored
from dspace.math.gradients import new_symbol
from dspace.math.ir import Adjoint, Axes, Recurrence, State, Variable
from dspace.plan.sequential import Store

_SEGMENT = """    for segment in range(0, tl.cdiv(steps, EVERY)):
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)"""
_TOKENS = "        for i_t in tl.static_range(EVERY):"
_AT = "            at = (first + tl.minimum(count - 1, i_t)) * H + i_h"
_INPUTS = "if INPUTS:"
_LIVE = "            live = count > i_t"


class Chunks(Kernels):
    """Writes the kernels of a chunk. What lives on k is a tuple of tiles, or of the tiles of one token after the other."""

    body = TiledBody
    head = HEAD

    def __init__(self, recurrence: Recurrence) -> None:
        super().__init__(recurrence)
        every: list[State | Variable] = [*recurrence.states, *recurrence.parameters]
        self.whole = {x.name: self.named(self.names[x.name], x.axes) for x in every}
        self.carry({})

    def named(self, tile: str, axes: Axes) -> str:
        """The name of all of a value of which ``tile`` is one, or of one that has no tiles."""
        return self.namer(f"{tile}_tiles") if tiled(axes) else tile

    def carry(self, names: dict[str, str]) -> None:
        """From here on these are carried from token to token: name of a store, name of all that it has."""
        self.carried = names
        self.afters: dict[str, str] = {}

    def outputs(self) -> str:
        """Tokens of a chunk from its start: results, or the states before every EVERY-th of them."""
        r, names = self.r, self.names
        arrays = self.leaves((*r.inputs, *r.parameters))
        initial = {s.name: self.namer(f"{names[s.name]}_initial") for s in r.states}
        saved = {s.name: self.namer(f"{names[s.name]}_saved") for s in r.states}
        arguments = [*arrays.values(), *initial.values(), "o", "variance", *saved.values()]
        doc = "Tokens of a chunk forward from its start; SAVE keeps the states before every EVERY-th of them."
        flags = "PACKED: tl.constexpr, EVERY: tl.constexpr,\n    OUTPUT: tl.constexpr, VARIANCE: tl.constexpr, SAVE: tl.constexpr,"
        lines = self.signature("_segment_kernel", doc, arguments, "SUB, H", flags)
        body = TiledBody(forward_token(r, r.variance is not None), self.local(), self.namer)
        starts = {s: load(initial[s.name], s.axes, "i_nh") for s in r.states}
        lines += self.start(body, arrays, starts)
        lines += ["        if SAVE:", "            slot = (i_n * SUB + segment) * H + i_h"]
        lines += indented(self.stores(lambda s, value: stored(saved[s.name], s.axes, "slot", value)), 3)
        lines += self.token(body, arrays)
        carried = [s for s in body.stores if s.name in body.scheduler.previous]
        results = [s for s in body.stores if s.name not in body.scheduler.previous]
        lines += indented(body.lines(carried, self.after, results), 3)
        known = set(body.done)
        for s in results:  # "output", "variance"

            def write(s: Store, value: str) -> tuple[None, str]:
                return None, stored("o" if s.name == "output" else s.name, s.axes, "at", value, "live")

            lines += indented([f"if {s.name.upper()}:", *indented(body.lines([s], write), 1)], 3)
            body.done = set(known)  # what one branch computed is not known after it
        return "\n".join([*lines, *indented(self.follow(carried), 3)]) + "\n"

    def ends(self, own: Collection[State]) -> str:
        """The tokens of a chunk from zeros, nothing read out: its ``own`` states, and the products of their decays."""
        r, names = self.r, self.names
        arrays = self.leaves((*r.inputs, *r.parameters))
        ends = {s.name: self.namer(f"{names[s.name]}_end") for s in r.states}
        doc = "States at the end of every chunk that starts from zeros, and the products of its decays."
        arguments = [*arrays.values(), *ends.values()]
        lines = self.signature("_ends_kernel", doc, arguments, "H", "PACKED: tl.constexpr, EVERY: tl.constexpr,")
        body = TiledBody(forward_token(r, False, readout=False), self.local(), self.namer)
        body.stores = [s for s in body.stores if s.name in body.scheduler.previous]
        lines += self.start(body, arrays, {s: f"zero_{s.axes}{'' if s in own else ' + 1.0'}" for s in r.states})
        lines += self.token(body, arrays)
        lines += indented([*body.lines(body.stores, self.after_live), *self.follow(body.stores)], 3)
        lines += indented(self.stores(lambda s, value: stored(ends[s.name], s.axes, "i_nh", value)), 1)
        return "\n".join(lines) + "\n"

    def chunk_backward(self, adjoint: Adjoint, variance: bool) -> str:
        """Tokens of a chunk in reverse, EVERY at a time: unrolled, with all their states in registers.

        States that are written and read once a token, as sequences have them, would be most of what this takes: eight
        times the bytes of everything else.
        """
        r, x = self.r, self.reverse(adjoint, variance)
        again, back = x.again, x.back
        assert isinstance(again, TiledBody) and isinstance(back, TiledBody)
        arguments = [*x.arrays.values(), *x.saved.values(), *x.d_arrays.values(), *x.d_end.values()]
        arguments += [*x.d_out.values(), *x.d_start.values()]
        doc = "Cotangents of a chunk's inputs with INPUTS, of parameters then, and of its start where that is not None."
        name = "_segment_backward_variance_kernel" if variance else "_segment_backward_kernel"
        flags = "PACKED: tl.constexpr, EVERY: tl.constexpr,\n    INPUTS: tl.constexpr,"
        lines = [*self.signature(name, doc, arguments, "TOTAL, SUB, H", flags), *SHARED]
        lines += self.given_parameters(x.used | x.read, x.arrays)
        d_states = {s.name: self.named(x.d_local[s.name], s.axes) for s in r.states}
        for s in r.states:
            end, local = x.d_end[s.name], d_states[s.name]
            lines += [f"    if {end} is None:", *indented(collected({local: (s.axes, f"zero_{s.axes}")}), 2)]
            lines += ["    else:", *indented(collected({local: (s.axes, given_end(s, end))}), 2)]
        lines += indented(collected({x.sums[p.name]: (p.axes, f"zero_{p.axes}") for p in r.parameters}), 1)
        lines += [*BACKWARD, "        slot = (i_n * SUB + segment) * H + i_h"]
        # x.past: the states before the first token, after it, after the second, ...
        before = {x.past[s.name]: (s.axes, load(x.saved[s.name], s.axes, "slot")) for s in r.states}
        lines += indented(collected({n: (a, t if tiled(a) else f"({t},)") for n, (a, t) in before.items()}), 2)
        rows = [(v.symbol, self.names[v.name], x.arrays[v.name], v.axes) for v in r.inputs]
        rows += [(c.symbol, x.d_given[c.name], x.d_arrays[c.name], c.axes) for c in x.given]
        loads, values = self.rows([row for row in rows if row[0] in x.used | x.read])
        old = {s.symbol: (s.axes, f"{x.past[s.name]}[{_nth('i_t', s.axes)}]") for s in r.states}
        new = {new_symbol(s): (s.axes, f"{x.past[s.name]}[{_nth('(i_t + 1)', s.axes)}]") for s in r.states}
        self.carry({s.name: x.past[s.name] for s in r.states})
        lines += [*loads, _TOKENS, _AT, *indented(self.leaf_lines(again, x.used, values | old), 3)]
        lines += indented(again.lines(again.stores, self.after), 3)
        after = {self.afters[s.name]: s.axes for s in again.stores}
        pasts = [x.past[s.name] for s in again.stores]
        lines += indented(
            (f"{p} = {p} + {n if tiled(a) else f'({n},)'}" for p, (n, a) in zip(pasts, after.items(), strict=True)), 3
        )
        lines += ["        for i_t in tl.static_range(EVERY - 1, -1, -1):", _AT, _LIVE]
        lines += indented(self.leaf_lines(back, x.read, values | old | new), 3)
        back.sources |= {f"d_{s.name}": f"{d_states[s.name]}[i_k]" for s in r.states if tiled(s.axes)}
        self.carry({f"d_{n}": name for n, name in (d_states | x.sums).items()})
        lines += indented(self.cotangents(x, back), 3)
        totals = [(p.axes, x.d_out[p.name], _each(x.sums[p.name], p.axes)) for p in r.parameters]
        found = self.written((a, stored(array, a, place_of(a), total)) for a, array, total in totals)
        lines += ["    if INPUTS:", *indented(found, 2)] if found else []
        for s in r.states:
            start = x.d_start[s.name]
            text = stored(start, s.axes, place_of(s.axes), _each(d_states[s.name], s.axes))
            lines += [f"    if {start} is not None:", *indented(self.written([(s.axes, text)]), 2)]
        return "\n".join(lines) + "\n"

    def cotangents(self, x: Reverse, back: TiledBody) -> list[str]:
        """One token in reverse: its cotangents, written or added up, and those of the states before it."""

        def emit(s: Store, value: str) -> tuple[str | None, str]:
            if s.name not in self.carried:
                array, row = self.result_of(s, x)
                return None, f"{_INPUTS}\n    {stored(array, s.axes, row, value, 'live')}"
            if not s.add:
                return self.after_live(s, value)
            into, _ = self.after(s, value)
            total = _each(self.carried[s.name], s.axes)
            return into, f"{total} + tl.where(live, {value}, 0.0) if INPUTS else {total}"

        kept = [s for s in back.stores if s.name in self.carried]
        return [*_joined(back.lines(back.stores, emit)), *self.follow(kept)]

    def start(self, body: TiledBody, arrays: dict[str, str], starts: dict[State, str]) -> list[str]:
        """Parameters, the states that tokens start from, and the head of the loop over EVERY tokens at a time."""
        self.carry({s.name: self.whole[s.name] for s in self.r.states})
        lines = self.given_parameters(body.uses(), arrays)
        return lines + [*indented(collected({self.whole[s.name]: (s.axes, t) for s, t in starts.items()}), 1), _SEGMENT]

    def token(self, body: TiledBody, arrays: dict[str, str]) -> list[str]:
        """Loads for EVERY tokens, and the head of the loop over them."""
        used = body.uses()
        inputs = [(v.symbol, self.names[v.name], arrays[v.name], v.axes) for v in self.r.inputs if v.symbol in used]
        loads, values = self.rows(inputs)
        states = {s.symbol: (s.axes, _each(self.whole[s.name], s.axes)) for s in self.r.states if tiled(s.axes)}
        return [*loads, _TOKENS, _AT, _LIVE, *indented(self.leaf_lines(body, used, values | states), 3)]

    def rows(
        self, wanted: Iterable[tuple[sympy.Symbol, str, str, Axes]]
    ) -> tuple[list[str], dict[sympy.Symbol, tuple[Axes, str]]]:
        """Loads for EVERY tokens, into tuples; axes and source of a token's own. Of (symbol, name, array, axes).

        A ``kv`` input is loaded where it is used: tiles of it would crowd out the states.
        """
        values: dict[sympy.Symbol, tuple[Axes, str]] = {}
        loads: list[tuple[Axes, str]] = []
        empty = []
        for symbol, name, array, axes in wanted:
            if axes == "kv":
                values[symbol] = axes, load(array, axes, "at")
                continue
            row = self.namer(f"{name}_rows")
            empty.append(f"        {row} = ()")
            loads.append((axes, f"{row} = {row} + ({raw(array, axes, 'at')},)"))
            values[symbol] = axes, f"{row}[{_nth('i_t', axes)}]{shaped(axes)}"
        head = [_TOKENS.replace(":", ":  # everything is loaded before it is used"), _AT] if loads else []
        return [*empty, *head, *indented(self.written(loads), 3)], values

    def leaf_lines(
        self, body: TiledBody, used: Collection[sympy.Symbol], values: dict[sympy.Symbol, tuple[Axes, str]]
    ) -> list[str]:
        """Lines that give names to leaves that do not live on k; ``body`` learns where tiles of the others are."""
        many = {s: text for s, (axes, text) in values.items() if tiled(axes)}
        body.sources = {s.name: text for s, text in many.items()}
        body.sources |= {p.name: f"{self.whole[p.name]}[i_k]" for p in self.r.parameters if tiled(p.axes)}
        return [f"{body.name(s)} = {text}" for s, (_, text) in values.items() if s not in many and s in used]

    def given_parameters(self, used: Collection[sympy.Symbol], arrays: dict[str, str]) -> list[str]:
        """All loads first, as a shape that a vector gets is one that loads wait for."""
        read: list[Variable] = [p for p in self.r.parameters if p.symbol in used]
        loads = collected({self.whole[p.name]: (p.axes, raw(arrays[p.name], p.axes, "i_h")) for p in read})
        given = {p: self.namer(f"{self.names[p.name]}_given") for p in read}
        shapes = [f"{given[p]}, {self.whole[p.name]} = {self.whole[p.name]}, ()" for p in read if tiled(p.axes)]
        shapes += over_tiles(
            f"{self.whole[p.name]} = {self.whole[p.name]} + ({given[p]}[i_k]{shaped(p.axes)},)"
            for p in read
            if tiled(p.axes)
        )
        shapes += [f"{self.whole[p.name]} = {self.whole[p.name]}{shaped(p.axes)}" for p in read if not tiled(p.axes)]
        return indented([*loads, *shapes], 1)

    def after(self, s: Store, value: str) -> tuple[str, str]:
        """What collects the next value of something carried, and that value."""
        if s.name not in self.afters:
            self.afters[s.name] = self.namer(f"{self.carried[s.name]}_after")
        return self.afters[s.name], value

    def after_live(self, s: Store, value: str) -> tuple[str, str]:
        """The same where behind the last token it stays as it is."""
        return self.after(s, f"tl.where(live, {value}, {_each(self.carried[s.name], s.axes)})")

    def follow(self, stores: Iterable[Store]) -> list[str]:
        """Lines that give every carried value its next one, all at once."""
        return [f"{self.carried[s.name]} = {self.afters[s.name]}" for s in stores]

    def stores(self, store: Callable[[State, str], str]) -> list[str]:
        """Lines that store every state, by ``store`` of a state and its value."""
        return self.once({s: store(s, _each(self.whole[s.name], s.axes)) for s in self.r.states})

    def written(self, stores: Iterable[tuple[Axes, str]]) -> list[str]:
        return written(stores)


def _joined(lines: Iterable[str]) -> list[str]:
    """Lines in which branches of INPUTS that follow one another are one."""
    found: list[str] = []
    for line in lines:
        head, _, rest = line.partition("\n")
        again = head.strip() == _INPUTS and found and found[-1].startswith(head + "\n")
        if again:
            found[-1] += f"\n{rest}"
        else:
            found.append(line)
    return found


def _nth(token: str, axes: Axes) -> str:
    """Index into a tuple that has the tiles of one token after the other's."""
    return f"{token} * NK + i_k" if tiled(axes) else token


def _each(name: str, axes: Axes) -> str:
    """A value, or its tile in a loop over tiles."""
    return f"{name}[i_k]" if tiled(axes) else name

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

import sympy

from dspace.emit.base import Section
from dspace.emit.cpu.loops import backward_token, forward_token
from dspace.emit.naming import INTERNAL, Namer, internal_names
from dspace.emit.triton import launching
from dspace.emit.triton.printer import TritonPrinter
from dspace.emit.triton.sequential_host import host_source
from dspace.math.gradients import new_symbol
from dspace.math.ir import Adjoint, Analysis, Axes, Recurrence, State, SumV, Variable, axes_of
from dspace.plan.sequential import SIZES, Assign, Scheduler, Store, Sum, Token, flatten

_LOCAL = frozenset(
    """T H K V BK BV NV NH EVERY TOTAL OUTPUT VARIANCE SAVE PACKED ONE EXACT_K EXACT_V pid i_v i_n i_h i_nh o_k o_v m_k
    m_v m_kv r_k r_v t_kv t_past at t back segment count slot place ahead shared begin end steps zero_ zero_k zero_v zero_kv count_k
    count_v range o variance back_t first""".split()
)
_PART: dict[Axes, str] = {"": "", "k": " + o_k", "v": " + o_v", "kv": " + t_kv"}
_WIDTH: dict[Axes, str] = {"": "", "k": " * K", "v": " * V", "kv": " * K * V"}
_VECTOR: dict[Axes, tuple[str, str, str]] = {"k": ("r_k", "K", "[:, None]"), "v": ("r_v", "V", "[None, :]")}
_MASK: dict[Axes, str] = {"": "", "k": "m_k", "v": "m_v", "kv": "m_kv"}
_TILE: dict[Axes, str] = {"": "()", "k": "[BK, 1]", "v": "[1, BV]", "kv": "[BK, BV]"}

TILES = '''
@_kernel
def _bounds(offsets, i_n, T, PACKED: tl.constexpr):
    """First token and number of tokens of sequence ``i_n``, never outside the tokens that there are; rows in all."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(offsets + i_n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(offsets + i_n + 1).to(tl.int64), begin), T)
        rows = T
    else:
        begin = i_n * T
        end = begin + T
        rows = end
    return begin, (end - begin).to(tl.int32), rows


@_kernel
def _live(x, mask, EXACT: tl.constexpr):
    """``x`` with 0 in the lanes beyond the last channel."""
    if EXACT:
        return x
    else:
        return tl.where(mask, x, 0.0)
'''

HEAD = """    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K == BK
    EXACT_V: tl.constexpr = V % BV == 0
    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    r_k = tl.arange(0, BK)
    r_v = i_v * BV + tl.arange(0, BV)
    o_k = r_k[:, None]
    o_v = r_v[None, :]
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k & m_v
    t_kv = o_k * V + o_v
    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)"""


def splits(r: Recurrence) -> bool:
    """Whether blocks of value channels are independent: no formula of a token contracts over them."""
    formulas = [s.update for s in r.states] + [r.output, r.variance or sympy.Integer(0)]
    return not any(e.has(SumV) for e in formulas)


def section(analysis: Analysis, common: bool = True) -> Section:
    """The sequential section of any recurrence; ``common`` brings what all Triton sections share."""
    r = analysis.recurrence
    writer = _Kernels(r)
    kernels = [writer.forward(), writer.backward(analysis.adjoint, False)]
    if r.variance is not None:
        kernels.append(writer.backward(analysis.adjoint, True))
    parts = [launching.COMMON] if common else []
    parts += [TILES, *kernels, host_source(r, splits(r))]
    return Section(
        device="cuda",
        imports=launching.IMPORTS,
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk=None,
        recurrent="_recurrent_triton_core",
    )


def _load(array: str, axes: Axes, place: str) -> str:
    """A tile of ``array`` at row ``place``, float32.

    For a vector see :func:`_raw`.
    """
    return _raw(array, axes, place) + _shaped(axes)


def _shaped(axes: Axes) -> str:
    """What turns a raw load into a float32 tile."""
    return ".to(tl.float32)" + (_VECTOR[axes][2] if axes in _VECTOR else "")


def _raw(array: str, axes: Axes, place: str) -> str:
    """What :func:`_load` loads, before it is given its type and shape.

    A vector is loaded as one, without the other axis: Triton would take the layout of a ``[BK, 1]`` load for the
    states too, with k across all threads, where every sum over k is a shuffle for each column. Giving it its shape
    goes through shared memory, behind a barrier, which no later load overtakes: so load everything first.
    """
    if axes in _VECTOR:
        channel, size, _ = _VECTOR[axes]
        return f"tl.load({array} + {place}{_WIDTH[axes]} + {channel}, mask={channel} < {size}, other=0.0)"
    mask = f", mask={_MASK[axes]}, other=0.0" if axes else ""
    return f"tl.load({array} + {place}{_WIDTH[axes]}{_PART[axes]}{mask})"


def _store(array: str, axes: Axes, place: str, value: str) -> str:
    mask = f", mask={_MASK[axes]}" if axes else ""
    return f"tl.store({array} + {place}{_WIDTH[axes]}{_PART[axes]}, ({value}).to({array}.dtype.element_ty){mask})"


def _indent(lines: Iterable[str], depth: int) -> list[str]:
    return [4 * depth * " " + line for line in lines]


class _Body:
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


class _Kernels:
    """Writes the kernels of one recurrence."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.r = recurrence
        self.namer = Namer(INTERNAL | _LOCAL | set(dir(builtins)) | {"scale"})
        self.names = internal_names(recurrence, self.namer)

    def leaves(self, variables: Sequence[Variable], suffix: str = "in") -> dict[str, str]:
        return {v.name: self.namer(f"{self.names[v.name]}_{suffix}") for v in variables}

    def signature(self, name: str, doc: str, arguments: list[str], numbers: str, flags: str) -> list[str]:
        lines = [
            '@_kernel(do_not_specialize=["T", "EVERY", "TOTAL"])'
            if "TOTAL" in numbers
            else '@_kernel(do_not_specialize=["T", "EVERY"])'
        ]
        lines.append(f"def {name}(")
        row = "   "
        for a in arguments:
            if len(row) + len(a) > 110:
                lines.append(row)
                row = "   "
            row += f" {a},"
        lines += [row, f"    offsets, scale, T, EVERY, {numbers},"]
        lines += [f"    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, {flags}"]
        return [*lines, "):", f'    """{doc}"""', *HEAD.splitlines()]

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
                inside.append(f"{name} = {_load(array, v.axes, 'at')}")
                continue
            following = self.namer(f"{name}_next")
            before.append(f"{following} = {_raw(array, v.axes, 'at')}")
            inside.append(f"{name} = {following}{_shaped(v.axes)}")
            early.append(f"{following} = {_raw(array, v.axes, 'ahead')}")
        return before, [*inside, *early]

    def parameters(self, used: set[sympy.Symbol], arrays: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Lines that load the parameters, and lines that give them their shapes."""
        read = [p for p in self.r.parameters if p.symbol in used]
        names = [self.names[p.name] for p in read]
        loads = [f"{n} = {_raw(arrays[p.name], p.axes, 'i_h')}" for n, p in zip(names, read, strict=True)]
        return loads, [f"{n} = {n}{_shaped(p.axes)}" for n, p in zip(names, read, strict=True)]

    def advance(self, body: _Body) -> list[str]:
        """Lines that give every carried value its next one, all at once."""
        carried = [s for s in body.stores if s.name in body.scheduler.previous]
        after = [self.namer(f"{self.carried[s.name]}_after") for s in carried]
        lines = [f"{name} = {body.full(s)}" for name, s in zip(after, carried, strict=True)]
        return lines + [f"{self.carried[s.name]} = {name}" for name, s in zip(after, carried, strict=True)]

    def forward(self) -> str:
        r, names = self.r, self.names
        arrays = self.leaves((*r.inputs, *r.parameters))
        initial, final, saved = (
            {s.name: self.namer(f"{names[s.name]}_{part}") for s in r.states} for part in ("initial", "final", "saved")
        )
        arguments = [*arrays.values(), *initial.values(), "o", "variance", *final.values(), *saved.values()]
        doc = "Tokens forward from the initial states; SAVE keeps the states before every EVERY-th token; ONE token."
        lines = self.signature(
            "_sequential_kernel", doc, arguments, "H",
            "OUTPUT: tl.constexpr, VARIANCE: tl.constexpr,\n    SAVE: tl.constexpr, PACKED: tl.constexpr, ONE: tl.constexpr,",
        )  # fmt: skip
        lines += ["    if ONE:  # one token, for decoding: no loop, and nothing is loaded ahead", "        steps = 1"]
        self.carried = {s.name: names[s.name] for s in r.states}
        body = _Body(forward_token(r, r.variance is not None), self.local(), self.namer)
        used = body.uses()
        loads, shapes = self.parameters(used, arrays)
        before, inside = self.tokens(used, arrays)
        lines += ["    at = tl.minimum(begin, rows - 1) * H + i_h", *_indent([*loads, *before], 1)]
        lines += [f"    {names[s.name]} = {_raw(initial[s.name], s.axes, 'i_nh')}" for s in r.states]
        lines += [f"    {names[s.name]} = {names[s.name]}{_shaped(s.axes)}" for s in r.states]
        lines += _indent(shapes, 1)
        lines += ["    for t in range(0, steps):"]
        lines += [
            "        at = (begin + t) * H + i_h",
            "        ahead = (begin + tl.minimum(t + 1, steps - 1)) * H + i_h",
        ]
        lines += _indent(inside, 2)
        lines += ["        if SAVE:", "            if t % EVERY == 0:"]
        lines += ["                slot = (begin // EVERY + i_n + t // EVERY) * H + i_h"]
        lines += _indent(self.once({s: _store(saved[s.name], s.axes, "slot", names[s.name]) for s in r.states}), 4)
        carried = [s for s in body.stores if s.name in body.scheduler.previous]
        lines += _indent(body.until(carried), 2)
        for flag, key, name in (("OUTPUT", "output", "o"), ("VARIANCE", "variance", "variance")):
            stores = [s for s in body.stores if s.name == key]
            lines += _indent([f"if {flag}:"], 2) if stores else []
            for s in stores:
                lines += _indent(body.until([s]), 3)
                lines += _indent([_store(name, "v", "at", body.full(s))], 3)
                # What one branch computed is not known after it.
                body.done = {x for x in body.done if x in self.symbols_of(body, carried)}
        lines += _indent(self.advance(body), 2)
        lines += ["    if OUTPUT:"]
        lines += _indent(self.once({s: _store(final[s.name], s.axes, "i_nh", names[s.name]) for s in r.states}), 2)
        return "\n".join(lines) + "\n"

    def once(self, stores: Mapping[State, str]) -> list[str]:
        """Stores of states: those without a v axis are the same in every block of v, and one block writes them."""
        own = [line for s, line in stores.items() if "v" in s.axes]
        same = [line for s, line in stores.items() if "v" not in s.axes]
        return own + (["if i_v == 0:", *_indent(same, 1)] if same else [])

    def symbols_of(self, body: _Body, stores: Sequence[Store]) -> set[sympy.Symbol]:
        needed = body.scheduler.in_order({x for s in stores for x in s.expr.free_symbols})
        return {s.symbol for s in needed}

    def local(self) -> dict[str, str]:
        """Names of leaves as a forward token sees them."""
        return {**self.names, **{new_symbol(s).name: self.namer(f"{self.names[s.name]}_new") for s in self.r.states}}

    def backward(self, adjoint: Adjoint, variance: bool) -> str:
        r, names = self.r, self.names
        variables = (*r.inputs, *r.parameters)
        arrays = self.leaves(variables)
        saved, past, d_final, d_initial, d_local, old = (
            {s.name: self.namer(wish.format(names[s.name])) for s in r.states}
            for wish in ("{}_saved", "{}_past", "d_{}_final", "d_{}_initial", "d_{}", "{}_old")
        )
        d_out = {v.name: self.namer(f"d_{names[v.name]}_out") for v in variables}
        sums = {p.name: self.namer(f"sum_{names[p.name]}") for p in r.parameters}
        given = [Variable("d_output", "v", "cotangent")]
        given += [Variable("d_variance", "v", "cotangent")] if variance else []
        d_given = {c.name: self.namer(c.name) for c in given}
        d_arrays = {c.name: self.namer(f"{c.name}_in") for c in given}
        arguments = [*arrays.values(), *saved.values(), *past.values(), *d_arrays.values(), *d_final.values()]
        arguments += [*d_out.values(), *d_initial.values()]
        doc = "Cotangents of inputs, parameters and initial states: segments in reverse, each from its saved states."
        name = "_sequential_backward_variance_kernel" if variance else "_sequential_backward_kernel"
        lines = self.signature(name, doc, arguments, "TOTAL, H", "PACKED: tl.constexpr,")

        self.carried = {s.name: names[s.name] for s in r.states}
        again = _Body(forward_token(r, variance, readout=False), self.local(), self.namer)
        again.stores = [s for s in again.stores if s.name in again.scheduler.previous]
        reverse_names = {**names, **d_given, **{f"d_{s.name}": d_local[s.name] for s in r.states}}
        reverse_names |= {s.name: old[s.name] for s in r.states} | {new_symbol(s).name: names[s.name] for s in r.states}
        reverse = _Body(backward_token(r, adjoint, variance), reverse_names, self.namer)
        used, read = again.uses(), reverse.uses()

        lines += ["    t_past = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]"]
        lines += ["    NH = tl.num_programs(0) // NV", "    shared = i_v * NH + i_nh  # row of what value blocks share"]
        loads, shapes = self.parameters(used | read, arrays)
        lines += _indent([*loads, *shapes], 1)
        for s in r.states:
            given_text = _load(d_final[s.name], s.axes, "i_nh")
            if "v" not in s.axes:  # one block alone takes it
                given_text = f"tl.where(i_v == 0, {given_text}, 0.0)"
            lines.append(f"    {d_local[s.name]} = {given_text}")
        lines += [f"    {sums[p.name]} = zero_{p.axes}" for p in r.parameters]
        lines += ["    segments = tl.cdiv(steps, EVERY)", "    for back in range(0, segments):"]
        lines += ["        segment = segments - 1 - back", "        first = begin + segment * EVERY"]
        lines += ["        count = tl.minimum(EVERY, steps - segment * EVERY)"]
        lines += ["        slot = (begin // EVERY + i_n + segment) * H + i_h"]
        lines += [f"        {names[s.name]} = {_load(saved[s.name], s.axes, 'slot')}" for s in r.states]
        before, inside = self.tokens(used, arrays)
        lines += ["        # The states of this segment once more.", "        at = first * H + i_h"]
        lines += [*_indent(before, 2), "        for t in range(0, count):"]
        lines += [
            "            at = (first + t) * H + i_h",
            "            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h",
        ]
        lines += ["            place = pid.to(tl.int64) * EVERY + t"]
        lines += _indent((f"tl.store({self.past(past[s.name], s.axes)}, {names[s.name]})" for s in r.states), 3)
        lines += _indent([*inside, *again.until(again.stores), *self.advance(again)], 3)
        lines += ["        tl.debug_barrier()  # other threads of this program read what these wrote"]
        before, inside = self.tokens(read, arrays)
        for c in given:
            if c.symbol in read:
                following = self.namer(f"{d_given[c.name]}_next")
                before.append(f"{following} = {_raw(d_arrays[c.name], 'v', 'at')}")
                inside.append(f"{d_given[c.name]} = {following}{_shaped('v')}")
                inside.append(f"{following} = {_raw(d_arrays[c.name], 'v', 'ahead')}")
        lines += ["        # Cotangents, last token first.", "        at = (first + count - 1) * H + i_h"]
        lines += [*_indent(before, 2), "        for back_t in range(0, count):"]
        lines += ["            t = count - 1 - back_t", "            at = (first + t) * H + i_h"]
        lines += ["            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h"]
        lines += ["            place = pid.to(tl.int64) * EVERY + t"]
        lines += _indent((f"{old[s.name]} = tl.load({self.past(past[s.name], s.axes)})" for s in r.states), 3)
        self.carried = {f"d_{s.name}": d_local[s.name] for s in r.states}
        axes = {v.name: v.axes for v in variables}
        body = [*inside, *reverse.until(reverse.stores)]
        for store in reverse.stores:
            variable = store.name.removeprefix("d_")
            if store.add:
                body.append(f"{sums[variable]} += {reverse.full(store)}")
            elif store.name not in self.carried:
                row = "at" if "v" in axes[variable] else "(i_v.to(tl.int64) * TOTAL + at)"
                body.append(_store(d_out[variable], store.axes, row, reverse.full(store)))
        body += self.advance(reverse)
        body += [f"{names[s.name]} = {old[s.name]}" for s in r.states if new_symbol(s) in read]
        lines += _indent(body, 3)
        lines += ["        tl.debug_barrier()"]
        for p in r.parameters:
            row = "i_nh" if "v" in p.axes else "shared"
            lines.append(f"    {_store(d_out[p.name], p.axes, row, sums[p.name])}")
        for s in r.states:
            row = "i_nh" if "v" in s.axes else "shared"
            lines.append(f"    {_store(d_initial[s.name], s.axes, row, d_local[s.name])}")
        return "\n".join(lines) + "\n"

    def past(self, array: str, axes: Axes) -> str:
        """Pointers to the scratch tile of a state at ``place``: whole tiles, lanes beyond the channels included."""
        part = {"": "", "k": " + tl.arange(0, BK)[:, None]", "v": " + tl.arange(0, BV)[None, :]", "kv": " + t_past"}
        width = {"": "", "k": " * BK", "v": " * BV", "kv": " * BK * BV"}
        return f"{array} + place{width[axes]}{part[axes]}"

"""Gradients of the fold: what the gradient of the divided query means for the query itself and for the vector states.

One kernel with a chunk of a head a program, the last chunks first. First it makes the gradients of the chunk as if
queries were given (those of key and divided query go through the cache); then it evaluates the vector states of the
chunk again, and adds what they say. What later chunks say about a state reaches a chunk as one vector, the cotangent
at the chunk's end, which the program of the next chunk leaves as soon as it knows it: chunks wait for each other in
turn (Merrill and Garland, 2016, NVR-2016-002, section 3), but most have long work before that, and only for programs
with smaller numbers, which a GPU starts before them. Sums of a call are always the same.

The vector itself is the message: each number of it is one word that is written once, and says by its value that it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import sympy

from dspace.emit.triton.chunk_kernels import LOOP, PAD, PLACE, FoldKernels
from dspace.emit.triton.printer import inverses_of
from dspace.emit.triton.vector_group import Fold
from dspace.math.ir import AffineState, Variable

_QUERY, _DIVIDED = (sympy.Symbol(name, real=True) for name in ("gradient of the query", "query as divided"))
"""By names that no spec can have. Factors come in the order of names: the query after what all products have."""

UNSAID = -21555
"""A word that no sum gives: as float32 it is not a number, and another one than computations give."""

_HEAD = """
@_kernel
def _look(message, mask, FAST: tl.constexpr):
    if FAST:
        words = tl.load(message, mask=mask, other=0, volatile=True)
    else:  # an AMD GPU has caches that do not see what each other's programs write, but by atomic operations
        words = tl.where(mask, tl.atomic_or(message, 0, mask=mask), 0)
    return words


@_kernel
def _heard(message, mask, FAST: tl.constexpr):
    \"\"\"Words that another program writes there, once each.\"\"\"
    words = _look(message, mask, FAST)
    while tl.max((words == {unsaid}).to(tl.int32), axis=0) == 1:
        words = _look(message, mask, FAST)
    # Of fewer words than threads some hold copies, loaded by themselves, which the loop does not ask whether they came
    # before the words were written. Now all words are.
    tl.debug_barrier()
    return _look(message, mask, FAST)


@_kernel(do_not_specialize=["T", "NT", "H"])
def _fold_gradients_kernel(
    {matrix},
    {pointers},
    sequences, offsets, bases, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, PACKED: tl.constexpr,
):
    \"\"\"Gradients of one chunk of a head, through the divided query and the vector states of all that they are made from.\"\"\"
    NK: tl.constexpr = (K + BK - 1) // BK
    i_h = tl.program_id(0) % H
    i_c = (tl.num_programs(0) - 1 - tl.program_id(0)) // H  # the last first
    if PACKED:
        i_n = tl.load(sequences + i_c)
    else:  # the same chunk of all sequences
        many = tl.num_programs(0) // (H * NT)
        i_n = i_c % many
        i_c = i_n * NT + i_c // many
    _chunk_gradients_{decay}(
        {matrix}, spans, i_c, i_h, scale, T, NT, H, K, V, C, BK, BV, OT, PRECISION, PACKED
    )
    tl.debug_barrier()  # what other threads stored is loaded below
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        if PACKED:
            first, last, base = _sequence(offsets, bases, i_n, T, NT, PACKED)
            is_first, is_last = begin == first, end == last
        else:
            is_first, is_last = i_c % NT == 0, i_c % NT == NT - 1
        user = (i_n * H + i_h) * K  # of what the caller gave or gets
"""


def gradients(fold: Fold, names: Mapping[str, str]) -> str:
    """The kernel."""
    writer = _Gradients(fold, names)
    leaves, states = writer.leaves, writer.states
    matrix = "query_in, of_key, of_value, d_out, {}of_states, d_states, d_query_out, d_key, d_value".format(
        "of_sums, d_retention, " if fold.decay == "scalar" else ""
    )
    pointers = [f"{writer.names[v.name]}_in" for v in leaves]
    parts = ("border", "cotangent", "after", "end", "starts")
    pointers += [f"{s}_{part}" for part in parts for s in states]
    pointers += [f"d_{writer.names[v.name]}_out" for v in leaves]
    lines = (
        _HEAD.format(unsaid=UNSAID, matrix=matrix, pointers=", ".join(pointers), decay=fold.decay)
        .strip("\n")
        .splitlines()
    )
    tokens, found = writer.from_query()
    lines += [*PLACE, *writer.rows(leaves)]
    for state, s in zip(writer.group.states, states, strict=True):
        lines += writer.between_tokens(state, s)
    lines += [*writer.zeros(leaves), *LOOP, *writer.wide(v for v in leaves if v not in writer.divided)]
    if writer.divided:
        lines.append(f"{PAD}query = tl.load(query_in + corner * K + tile, mask=m_ck, other=0.0).to(tl.float32)")
    lines.append(f"{PAD}d_query = tl.load(d_query_out + corner * K + tile, mask=m_ck, other=0.0).to(tl.float32)")
    lines += writer.states_of_tokens()
    together, inverse = inverses_of({**tokens, **found})
    lines += [" " * 4 + line for line in writer.inverses(inverse, writer.local)]
    cotangents = {sympy.Symbol(f"d_{s}", real=True) for s in states}
    at_once = [v for v in leaves if not found[f"grad_{writer.names[v.name]}"].free_symbols & cotangents]
    lines += writer.statements({n: together[n] for n in tokens}, writer.local, 12)
    said = {together[n]: sympy.Symbol(n, real=True) for n in tokens}
    shown = {n: said.get(e, e) for n, e in together.items()}
    lines += writer.evaluated(at_once, found, shown)  # so that the query need not be kept in registers
    for s in states:
        lines += [
            f"{PAD}if {s}_cotangent is not None:",
            f"{PAD}    token_{s} += tl.load({s}_cotangent + corner * K + tile, mask=m_ck, other=0.0)",
            *writer.masked(f"token_{s}", tokens[f"token_{s}"]),
            f"{PAD}d_{s} = tl.dot({s}_back, token_{s}.to(OT), input_precision=PRECISION)",
        ]
    if fold.key is not None:  # while others are waited for
        there = f"d_{writer.names[fold.key.name]}_out + corner * K + tile"
        lines.append(f"{PAD}before = tl.load({there}, mask=m_ck, other=0.0)")
    for s in states:
        lines += [PAD + line for line in _from_later_chunks(s)]
    lines += writer.evaluated([v for v in leaves if v not in at_once], found, together)
    for v in leaves:
        lines += writer.store(v, adds=v == fold.retention)
    return "\n".join(lines) + "\n"


def _from_later_chunks(s: str) -> list[str]:
    """Adds the cotangent of state ``s`` at the chunk's end to ``d_s``, and leaves that at its start for the chunk before."""
    return f"""
after = tl.zeros([BK], dtype=tl.float32)
if is_last:
    if {s}_end is not None:
        after += tl.load({s}_end + user + o_k, mask=m_k, other=0.0).to(tl.float32)
else:
    after += _heard({s}_after + (at_chunk + H) * K + o_k, m_k, FAST).to(tl.float32, bitcast=True)
# at the start: the row of the first token says it, with its decay
start = {s}_since * d_{s} + {s}_whole * after[None, :]
row = (o_c == 0)[:, None] & m_k[None, :]
if is_first:
    if {s}_starts is not None:
        tl.store({s}_starts + user + o_k[None, :] + o_c[:, None] * 0, start, mask=row)
else:
    there = {s}_after + at_chunk * K + o_k[None, :] + o_c[:, None] * 0
    if FAST:  # of NVIDIA's instructions every result that is not a number has the same bits, not those of UNSAID
        tl.store(there, start.to(tl.int32, bitcast=True), mask=row)
    else:
        start = tl.where(start == start, start, float("nan"))
        tl.atomic_xchg(there, start.to(tl.int32, bitcast=True), mask=row)
d_{s} += {s}_until[:, None] * after[None, :]
""".strip("\n").splitlines()


@functools.cache
def _by_query(slope: sympy.Expr, query: sympy.Expr, v: Variable) -> sympy.Expr:
    """A derivative of the query that has ``v`` as a multiple of the query, if nothing else is divided by for that."""
    if not slope.has(v.symbol):
        return slope
    ratio = sympy.cancel(slope / query)
    return _DIVIDED * ratio if _divisors(ratio) <= _divisors(query) else slope


def _divisors(e: sympy.Expr) -> set[sympy.Expr]:
    divisor = sympy.denom(sympy.together(e))
    try:
        return {factor for factor, _ in sympy.factor_list(divisor)[1]}
    except sympy.PolynomialError:
        return {divisor}


class _Gradients(FoldKernels):
    """Writes what follows the gradients of the divided query."""

    def __init__(self, fold: Fold, names: Mapping[str, str]) -> None:
        super().__init__(fold, names)
        self.local = {**self.names, _QUERY.name: "d_query", _DIVIDED.name: "query"}
        written = set().union(*(self.group.write(s).free_symbols for s in self.group.states))
        slopes = [sympy.diff(fold.query, x) for x in fold.query.free_symbols]
        self.divided = [
            v
            for v in self.group.inputs
            if self.group.wide(v) and v.symbol not in written
            if not any(_by_query(slope, fold.query, v).has(v.symbol) for slope in slopes)
        ]
        """Inputs that are needed through the divided query only, which is at hand."""

    def slope(self, of: sympy.Symbol) -> sympy.Expr:
        """The derivative of the divided query, without the inputs that it was made from and are not loaded."""
        found = sympy.diff(self.fold.query, of)
        for v in self.divided:
            found = _by_query(found, self.fold.query, v)
        return found

    def between_tokens(self, state: AffineState, s: str) -> list[str]:
        """What is left of a state between two tokens of the chunk, its start and its end."""
        later, earlier = "o_c[:, None] > o_c[None, :]", "o_c[None, :] >= o_c[:, None]"
        here, there = f"{s}_sums[:, None]", f"{s}_sums[None, :]"
        return [
            *self.decays(state),
            f"        {s}_whole = tl.exp2({s}_past)",
            f"        {s}_since = tl.exp2({s}_sums)[:, None]",
            f"        {s}_gap = tl.exp2(tl.where({later}, tl.minimum({here} - {there}, 0.0), -float('inf'))).to(OT)",
            f"        {s}_back = tl.exp2(tl.where({earlier}, tl.minimum({there} - {here}, 0.0), -float('inf'))).to(OT)",
        ]

    def zeros(self, variables: Iterable[Variable]) -> list[str]:
        """Gradients of inputs and parameters without channels, token by token, to be summed over channels."""
        return [
            f"        sum_{self.names[v.name]} = tl.zeros([C], dtype=tl.float32)"
            for v in variables
            if not self.group.wide(v)
        ]

    def masked(self, name: str, expr: sympy.Expr) -> list[str]:
        """``name`` with 0 outside the tile, where it is not 0 anyway because what was loaded there is."""
        zero = {v.symbol: 0 for v in self.leaves if v in self.group.inputs and self.group.wide(v)}
        zero |= {_QUERY: 0, _DIVIDED: 0}
        return [] if expr.subs(zero) == 0 else [f"{PAD}{name} = tl.where(m_ck, {name}, 0.0)"]

    def states_of_tokens(self) -> list[str]:
        """Every state after each token, and without its own write (``kept``)."""
        lines = []
        for state, s in zip(self.group.states, self.states, strict=True):
            lines += self.statements({"write": self.group.write(state)}, self.names, 12)
            lines += [
                *self.masked("write", self.group.write(state)),
                f"{PAD}{s}_start = tl.load({s}_border + at_chunk * K + o_k, mask=m_k, other=0.0)",
                f"{PAD}{s}_kept = tl.dot({s}_gap, write.to(OT), {s}_since * {s}_start[None, :], input_precision=PRECISION)",
                f"{PAD}{s} = {s}_kept + write",
            ]
        return lines

    def from_query(self) -> tuple[dict[str, sympy.Expr], dict[str, sympy.Expr]]:
        """Cotangent of each state from its own token, and gradient of each leaf from the query and the states (``d_STATE``)."""
        states = self.group.states
        tokens = {
            f"token_{s}": _QUERY * self.slope(self.group.symbols[a.name])
            for a, s in zip(states, self.states, strict=True)
        }
        found = {}
        for v in self.leaves:
            terms = [_QUERY * self.slope(v.symbol)]
            for state, s in zip(states, self.states, strict=True):
                incoming, kept = sympy.Symbol(f"d_{s}", real=True), sympy.Symbol(f"{s}_kept", real=True)
                through = kept * sympy.diff(state.log_decay, v.symbol)
                terms.append(incoming * (sympy.diff(self.group.write(state), v.symbol) + through))
            found[f"grad_{self.names[v.name]}"] = sympy.Add(*terms)
        return tokens, found

    def evaluated(
        self, variables: Iterable[Variable], found: Mapping[str, sympy.Expr], shown: Mapping[str, sympy.Expr]
    ) -> list[str]:
        """Lines that evaluate the gradients of ``variables`` as ``shown``, and keep them (the key's beside another)."""
        names = {f"grad_{self.names[v.name]}": v for v in variables}
        lines = self.statements({n: shown[n] for n in names}, self.local, 12)
        for n, v in names.items():
            lines += self.keep(v, found[n], adds=v == self.fold.key)
        return lines

    def keep(self, v: Variable, grad: sympy.Expr, adds: bool) -> list[str]:
        """Lines that store the gradient of an input or parameter (with what was there ``before``), or sum it over channels."""
        name = self.names[v.name]
        if not self.group.wide(v):
            return [*self.masked(f"grad_{name}", grad), f"{PAD}sum_{name} += tl.sum(grad_{name}, axis=1)"]
        if v in self.group.parameters:
            there, mask = f"d_{name}_out + at_chunk * K + o_k", "m_k"
            lines = [*self.masked(f"grad_{name}", grad), f"{PAD}grad_{name} = tl.sum(grad_{name}, axis=0)"]
        else:
            there, mask = f"d_{name}_out + corner * K + tile", "m_ck"
            lines = [f"{PAD}grad_{name} = grad_{name} + tl.zeros([C, BK], dtype=tl.float32)"]
        if adds:
            lines.append(f"{PAD}grad_{name} += before.to(tl.float32)")
        return [*lines, f"{PAD}tl.store({there}, grad_{name}.to(d_{name}_out.dtype.element_ty), mask={mask})"]

    def store(self, v: Variable, adds: bool) -> list[str]:
        """Lines that store (or add to what is there) a gradient that was summed over channels."""
        name = self.names[v.name]
        if self.group.wide(v):
            return []
        there, mask, lines = f"d_{name}_out + corner + at", ", mask=live", []
        if v in self.group.parameters:
            there, mask = f"d_{name}_out + at_chunk", ""
            lines.append(f"        sum_{name} = tl.sum(sum_{name}, axis=0)")
        if adds:
            lines.append(f"        sum_{name} += tl.load({there}{mask})")
        return [*lines, f"        tl.store({there}, sum_{name}{mask})"]

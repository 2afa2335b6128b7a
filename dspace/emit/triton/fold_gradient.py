"""Gradients of the fold: what the gradient of the divided query means for the query itself and for the vector states.

Two kernels with a chunk of a head a program. The first evaluates the states of the chunk again and adds what its own
tokens say. What later chunks say about a state reaches a chunk as one vector, its cotangent at the chunk's end: a scan
over chunks makes these from what each chunk leaves, and the second kernel adds their part, from the keys alone. There

    sum_k kept_t exp(G_C - G_t) after = exp(G_C) (start . after) + sum_(s < t) exp(G_C - G_s) (write_s . after),

so that the gradients of decays need no state of any token, and nothing large is subtracted. Both move little more than
the tensors that they read and write, where a walk over all chunks in turn waits for each of its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from dspace.emit.triton.chunk_kernels import LOOP, PAD, PLACE, ChunkKernels
from dspace.emit.triton.printer import inverses_of
from dspace.emit.triton.vector_group import Fold
from dspace.math.ir import Variable

_QUERY = sympy.Symbol("d_query", real=True)

_LOOP = ["        for i_k in tl.range(0, NK, num_stages=STAGES):", *LOOP[1:]]
"""Every load ahead of its turn, also what is added to, which no product needs: of plain ranges Triton does not."""

_HEAD = """
@_kernel(do_not_specialize=["T", "NT", "H"])
def _fold_{name}_kernel(
    {pointers},
    spans, scale, T, NT, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, PACKED: tl.constexpr,
):
    \"\"\"{about}\"\"\"
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_h = pid % H
    i_c = pid // H
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
"""


def own(fold: Fold, names: Mapping[str, str]) -> str:
    """The kernel of what the tokens of a chunk say about their states, and of the query's own gradient."""
    writer = _Gradients(fold, names)
    leaves, states = writer.leaves, writer.states
    pointers = ["d_query_in", *(f"{writer.names[v.name]}_in" for v in leaves)]
    pointers += [f"{s}_{part}" for part in ("border", "total", "local", "cotangent") for s in states]
    pointers += [f"d_{writer.names[v.name]}_out" for v in leaves]
    about = "Gradients of the query and, through the states of this chunk, of all that they are made from."
    lines = writer.head("own", pointers, about) + writer.rows(leaves)
    for state, s in zip(writer.group.states, states, strict=True):
        later, earlier = "o_c[:, None] > o_c[None, :]", "o_c[None, :] >= o_c[:, None]"
        here, there = f"{s}_sums[:, None]", f"{s}_sums[None, :]"
        lines += [
            *writer.decay_sums(state),
            f"        {s}_whole = tl.exp2(tl.sum(step, axis=0))",
            f"        {s}_since = tl.exp2({s}_sums)[:, None]",
            f"        {s}_gap = tl.exp2(tl.where({later}, tl.minimum({here} - {there}, 0.0), -float('inf'))).to(OT)",
            f"        {s}_back = tl.exp2(tl.where({earlier}, tl.minimum({there} - {here}, 0.0), -float('inf'))).to(OT)",
        ]
    lines += [*writer.zeros(leaves), *_LOOP, *writer.wide(leaves)]
    lines.append(f"{PAD}d_query = tl.load(d_query_in + corner * K + tile, mask=m_ck, other=0.0).to(tl.float32)")
    lines += writer.states_of_tokens()
    tokens, found = writer.from_query()
    together, inverse = inverses_of({**tokens, **found})
    lines += [" " * 4 + line for line in writer.inverses(inverse, writer.local)]
    lines += writer.statements({n: together[n] for n in tokens}, writer.local, 12)
    cotangents = {sympy.Symbol(f"d_{s}", real=True) for s in states}
    at_once = [v for v in leaves if not found[f"grad_{writer.names[v.name]}"].free_symbols & cotangents]
    lines += writer.evaluated(at_once, found, together)  # so that the query need not be kept in registers
    for s in states:
        lines += [
            f"{PAD}if {s}_cotangent is not None:",
            f"{PAD}    token_{s} += tl.load({s}_cotangent + corner * K + tile, mask=m_ck, other=0.0)",
            *writer.masked(f"token_{s}", tokens[f"token_{s}"]),
            f"{PAD}d_{s} = tl.dot({s}_back, token_{s}.to(OT), input_precision=PRECISION)",
            f"{PAD}# before the first token: its row says it, with its decay",
            f"{PAD}row = (o_c == 0)[:, None] & m_k[None, :]",
            f"{PAD}tl.store({s}_local + at_chunk * K + o_k[None, :] + o_c[:, None] * 0, {s}_since * d_{s}, mask=row)",
            f"{PAD}tl.store({s}_total + at_chunk * K + o_k, tl.zeros([BK], dtype=tl.float32) + {s}_whole, mask=m_k)",
        ]
    lines += writer.evaluated([v for v in leaves if v not in at_once], found, together)
    for v in leaves:
        lines += writer.store(v, adds=v == fold.retention)
    return "\n".join(lines) + "\n"


def behind(fold: Fold, names: Mapping[str, str]) -> str:
    """The kernel that adds what later chunks say, from the cotangents of the states at the end of a chunk."""
    writer = _Gradients(fold, names)
    group, states = writer.group, writer.states
    touched = [v for v in writer.leaves if v in fold.touched]
    pointers = [f"{writer.names[v.name]}_in" for v in touched]
    pointers += [f"{s}_{part}" for part in ("border", "after") for s in states]
    pointers += [f"d_{writer.names[v.name]}_out" for v in touched]
    about = "Adds to the gradients what follows from the cotangents of the vector states at the end of the chunk."
    lines = writer.head("behind", pointers, about) + writer.rows(touched)
    for state, s in zip(group.states, states, strict=True):
        lines += [
            *writer.decays(state),
            f"        along_{s} = tl.zeros([C], dtype=tl.float32)",
            f"        started_{s} = 0.0",
        ]
    written = set().union(*(group.write(s).free_symbols for s in group.states))
    lines += [*writer.zeros(touched), *_LOOP]
    lines += writer.wide(v for v in touched if v.symbol in written)
    for state, s in zip(group.states, states, strict=True):
        lines += writer.statements({"write": group.write(state)}, writer.names, 12)
        lines += [
            *writer.masked("write", group.write(state)),
            f"{PAD}after = tl.load({s}_after + at_chunk * K + o_k, mask=m_k, other=0.0)",
            f"{PAD}start = tl.load({s}_border + at_chunk * K + o_k, mask=m_k, other=0.0)",
            f"{PAD}d_{s} = {s}_until[:, None] * after[None, :]",
            f"{PAD}along_{s} += tl.sum(write * d_{s}, axis=1)",
            f"{PAD}started_{s} += tl.sum(start * after, axis=0)",
        ]
    gradients = writer.from_states(touched)
    changed, inverse = inverses_of(gradients)
    lines += [" " * 4 + line for line in writer.inverses(inverse, writer.names)]
    lines += writer.statements(changed, writer.names, 12)
    for v in touched:
        if f"grad_{writer.names[v.name]}" in gradients:
            lines += writer.keep(v, gradients[f"grad_{writer.names[v.name]}"], adds=True)
    lines += writer.of_decays(touched)
    for v in touched:
        lines += writer.store(v, adds=True)
    return "\n".join(lines) + "\n"


class _Gradients(ChunkKernels):
    """Writes the two kernels."""

    def __init__(self, fold: Fold, names: Mapping[str, str]) -> None:
        super().__init__(fold.group, names)
        self.fold, self.query = fold, fold.query
        self.local = {**self.names, "d_query": "d_query"}

    def head(self, name: str, pointers: list[str], about: str) -> list[str]:
        made = _HEAD.format(name=name, pointers=", ".join(pointers), about=about)
        return [*made.strip("\n").splitlines(), *PLACE]

    def zeros(self, variables: Iterable[Variable]) -> list[str]:
        """Gradients of inputs and parameters without channels, token by token, to be summed over channels."""
        return [
            f"        sum_{self.names[v.name]} = tl.zeros([C], dtype=tl.float32)"
            for v in variables
            if not self.group.wide(v)
        ]

    def masked(self, name: str, expr: sympy.Expr) -> list[str]:
        """``name`` with 0 outside the tile, where it is not 0 anyway because what was loaded there is."""
        loaded = {v.symbol: 0 for v in self.leaves if v in self.group.inputs and self.group.wide(v)}
        return [] if expr.subs({**loaded, _QUERY: 0}) == 0 else [f"{PAD}{name} = tl.where(m_ck, {name}, 0.0)"]

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
        """Cotangent of each state from its own token, and gradient of each leaf from the query and the states."""
        states = self.group.states
        tokens = {
            f"token_{s}": _QUERY * sympy.diff(self.query, self.group.symbols[a.name])
            for a, s in zip(states, self.states, strict=True)
        }
        found = self.from_states(self.leaves, decays=True)
        for v in self.leaves:
            name = f"grad_{self.names[v.name]}"
            found[name] = found.get(name, sympy.S.Zero) + _QUERY * sympy.diff(self.query, v.symbol)
        return tokens, found

    def from_states(self, variables: Iterable[Variable], decays: bool = False) -> dict[str, sympy.Expr]:
        """What is not zero of the gradients from cotangents of states ``d_STATE``, through writes and, if asked, decays."""
        found = {}
        for v in variables:
            terms = []
            for state, s in zip(self.group.states, self.states, strict=True):
                incoming, kept = sympy.Symbol(f"d_{s}", real=True), sympy.Symbol(f"{s}_kept", real=True)
                through = kept * sympy.diff(state.log_decay, v.symbol) if decays else sympy.S.Zero
                terms.append(incoming * (sympy.diff(self.group.write(state), v.symbol) + through))
            if sympy.Add(*terms) != 0:
                found[f"grad_{self.names[v.name]}"] = sympy.Add(*terms)
        return found

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
        """Lines that store the gradient of an input or parameter (or add it to what is there), or sum it over channels."""
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
            lines.append(f"{PAD}grad_{name} += tl.load({there}, mask={mask}, other=0.0).to(tl.float32)")
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

    def of_decays(self, variables: Iterable[Variable]) -> list[str]:
        """What the cotangents at the end of the chunk say about decays."""
        lines = []
        kept = {s: sympy.Symbol(f"kept_{s}", real=True) for s in self.states}
        for s in self.states:
            lines.append(
                f"        kept_{s} = tl.exp2({s}_past) * started_{s} + (tl.cumsum(along_{s}, axis=0) - along_{s})"
            )
        rows = {**self.names, **{v.name: f"{self.names[v.name]}_row" for v in self.narrow}}
        for v in variables:
            steps = (
                kept[s] * sympy.diff(a.log_decay, v.symbol) for a, s in zip(self.group.states, self.states, strict=True)
            )
            own = sympy.Add(*steps)
            if own != 0:
                lines += self.statements({"grad": own}, rows, 8)
                lines.append(f"        sum_{self.names[v.name]} += tl.where(live, grad, 0.0)")
        return lines

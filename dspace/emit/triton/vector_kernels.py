"""Source of the kernels of vector states: a walk over the chunks of a segment, forward or backward."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from dspace.emit.triton.printer import TritonPrinter, inverses_of
from dspace.emit.triton.vector_group import VectorGroup
from dspace.math.ir import AffineState, Variable

LOG2E = "1.4426950408889634"
"""Kernels sum decays to the base 2, of which GPUs take powers."""

_HEAD = """    NW: tl.constexpr = (W + BW - 1) // BW
    pid = tl.program_id(0)
    i_w = pid % NW
    i_h = (pid // NW) % H
    i_c = pid // (NW * H)
    begin, end = _segment(spans, i_c, T, NT, LENGTH, PACKED)
    chunks = ((end - begin + C - 1) // C).to(tl.int32)
    o_w = i_w * BW + tl.arange(0, BW)
    if W % BW == 0:
        m_w = o_w == o_w
    else:
        m_w = o_w < W
    o_c = tl.arange(0, C)
    tile = (o_c * (H * W))[:, None] + o_w[None, :]
    at_border = (i_c.to(tl.int64) * H + i_h) * W + o_w"""

# ``i`` is the chunk of the segment, ``slot`` where its border states are: chunk starts are C tokens or more apart
# within a segment, hence no two have the same.
_CHUNK = """        first = begin + i * C
        corner = first * H + i_h
        left = (end - first).to(tl.int32)
        live = o_c < left
        m_cw = live[:, None] & m_w[None, :]"""

_SLOT = "(({first}) // C + i_c) * H + i_h) * W"


class Kernels:
    """Writes the kernels of one group."""

    def __init__(self, group: VectorGroup, names: Mapping[str, str]) -> None:
        self.group, self.names = group, names
        self.states = [names[s.name] for s in group.states]
        self.leaves = (*group.inputs, *group.parameters)
        self.narrow = [v for v in group.inputs if not group.wide(v)]

    def signature(self, kernel: str, about: str, arguments: list[str]) -> list[str]:
        total = ["TOTAL"] if kernel == "backward_kernel" else []
        fixed = [*total, "T", "NT", "H", "LENGTH"]
        return [
            f"@_kernel(do_not_specialize={str(fixed).replace(chr(39), chr(34))})",
            f"def _vector_{self.group.tag}_{kernel}(",
            f"    {', '.join(arguments)},",
            f"    spans, {', '.join([*total, 'scale', 'T', 'NT', 'H', 'LENGTH'])},",
            "    W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, SINGLE: tl.constexpr,",
            "    PRECISION: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr, PACKED: tl.constexpr,",
            "):",
            f'    """{about}"""',
            _HEAD,
            *self.parameters(),
        ]

    def parameters(self) -> list[str]:
        lines = []
        for p in self.group.parameters:
            name = self.names[p.name]
            if self.group.wide(p):
                load = f"tl.load({name}_in + i_h * W + o_w, mask=m_w, other=1.0).to(tl.float32)[None, :]"
            else:
                load = f"tl.load({name}_in + i_h).to(tl.float32)"
            lines.append(f"    {name} = {load}")
        return lines

    def statements(self, exprs: Mapping[str, sympy.Expr], names: Mapping[str, str], indent: int = 8) -> list[str]:
        """Assignments of ``exprs``, with common subexpressions named first."""
        show, pad = TritonPrinter(names), " " * indent
        symbols = (sympy.Symbol(f"c{i}", real=True) for i in range(10**6))
        shared, results = sympy.cse(list(exprs.values()), symbols=symbols, order="none")
        lines = [f"{pad}{symbol.name} = {show(value)}" for symbol, value in shared]
        return lines + [f"{pad}{name} = {show(value)}" for name, value in zip(exprs, results, strict=True)]

    def inverses(self, bases: Mapping[str, sympy.Expr], names: Mapping[str, str]) -> list[str]:
        show = TritonPrinter(names)
        return [f"        {name} = _reciprocal({show(base)}, FAST)" for name, base in bases.items()]

    def used(self, exprs: list[sympy.Expr]) -> list[Variable]:
        symbols = set().union(*(e.free_symbols for e in exprs)) if exprs else set()
        return [v for v in self.group.inputs if v.symbol in symbols]

    def fetch(self, name: str, chunk: str, indent: int) -> str:
        """The values of a narrow input in ``chunk``, one chunk ahead of their use: such loads are not pipelined."""
        first = f"(begin + {chunk} * C)"
        mask = f"o_c < tl.where({first} >= begin, end - {first}, 0)"
        return f"{' ' * indent}{name}_next = tl.load({name}_in + ({first} * H + i_h) + o_c * H, mask={mask}, other=0.0)"

    def loop(self, variables: list[Variable], reverse: bool, starts: bool | None = False) -> list[str]:
        """Head of the walk over chunks, and its loads."""
        chunk, following = ("chunks - 1", "i - 1") if reverse else ("0", "i + 1")
        narrow = [self.names[v.name] for v in variables if v in self.narrow]
        lines = [self.fetch(n, f"({chunk})", 4) for n in narrow]
        if self.group.products and starts is not None:
            compare = ">" if starts else ">="
            lines.append(f"    from_past = tl.where(o_c[:, None] {compare} o_c[None, :], 0.0, -float('inf'))")
            lines.append("    from_future = tl.where(o_c[None, :] >= o_c[:, None], 0.0, -float('inf'))")
        if starts:
            lines += [self.border(s, f"({chunk})", 4) for s in self.states]
        if reverse:
            lines += ["    for j in tl.range(0, chunks, num_stages=STAGES):", "        i = chunks - 1 - j"]
        else:
            lines.append("    for i in tl.range(0, chunks, num_stages=STAGES):")
        lines.append(_CHUNK)
        for v in variables:
            name = self.names[v.name]
            if v in self.narrow:
                lines += [f"        {name}_row = {name}_next.to(tl.float32)", self.fetch(name, f"({following})", 8)]
                lines.append(f"        {name} = {name}_row[:, None]")
            else:
                lines.append(f"        {name} = {self.load(f'{name}_in')}")
        if starts:
            for s in self.states:
                lines.append(f"        {s}_start = {s}_ahead[None, :] + tl.zeros([C, BW], dtype=tl.float32)")
                lines.append(self.border(s, f"({following})", 8))
        return lines

    def border(self, state: str, chunk: str, indent: int) -> str:
        first = f"begin + {chunk} * C"
        at, mask = _SLOT.format(first=first), f"o_w < tl.where({first} >= begin, tl.where({first} < end, W, 0), 0)"
        return f"{' ' * indent}{state}_ahead = tl.load({state}_saved + ({at} + o_w, mask={mask}, other=0.0)"

    def load(self, name: str, shift: str = "", mask: str = "m_cw") -> str:
        return f"tl.load({name} + (corner{shift}) * W + tile, mask={mask}, other=0.0).to(tl.float32)"

    def beside(self, state: AffineState, shift: str, mask: str, suffix: str, more: tuple = ()) -> list[str]:
        """Loads, under names with ``suffix``, of what the step of a neighbouring token needs."""
        lines = []
        for v in self.used([state.decay, *more]):
            name = self.names[v.name]
            if v in self.narrow:
                load = f"tl.load({name}_in + (corner{shift}) + o_c * H, mask={mask}, other=0.0).to(tl.float32)[:, None]"
            else:
                load = self.load(f"{name}_in", shift, f"({mask})[:, None] & m_w[None, :]")
            lines.append(f"        {name}{suffix} = {load}")
        return lines

    def decay_sums(self, state: AffineState) -> list[str]:
        """Of a decay per token: its sums inside the chunk."""
        rows = {**self.names, **{v.name: f"{self.names[v.name]}_row" for v in self.narrow}}
        assert state.log_decay is not None
        step, s = TritonPrinter(rows)(state.log_decay), self.names[state.name]
        if not state.log_decay.free_symbols:
            step = f"tl.full([C], {step}, tl.float32)"
        return [
            "        # exp(-40) is nothing beside 1: a longer step would only cost the sums their digits",
            f"        step = tl.where(live, {LOG2E} * tl.minimum(tl.maximum({step}, -40.0), 0.0), 0.0)"
            if state.log_decay != 0
            else "        step = tl.zeros([C], dtype=tl.float32)",
            f"        {s}_sums = tl.cumsum(step, axis=0)",
        ]

    def decays(self, state: AffineState) -> list[str]:
        """The sums of a decay, that of the whole chunk, and what is left of each write at its end."""
        s = self.names[state.name]
        return [
            *self.decay_sums(state),
            f"        {s}_past = {self.decay_of_chunk(state)}",
            f"        {s}_until = tl.exp2(tl.minimum({s}_past - {s}_sums, 0.0))",
        ]

    def decay_of_chunk(self, state: AffineState) -> str:
        """The last of the sums, after :meth:`decay_sums`."""
        return "tl.sum(step, axis=0)"

    def step(self, state: AffineState, kept: bool) -> list[str]:
        """Lines for the state after each token (and without its own write: ``kept``, or before it: ``before``)."""
        name, group = self.names[state.name], self.group
        if group.products:
            lines = [*self.decays(state), *self.statements({"write": group.write(state)}, self.names)]
            lines += [
                "        write = tl.where(m_cw, write, 0.0)",
                f"        gap = tl.minimum({name}_sums[:, None] - {name}_sums[None, :], from_past)",
                f"        {name}_kept = tl.dot(tl.exp2(gap), write, tl.exp2({name}_sums)[:, None] * {name}_start, input_precision=PRECISION)",
                f"        {name} = {name}_kept + write" if kept else f"        {name} = {name}_kept",
            ]
            return lines
        lines = ["        # the decays and writes of the token before, so that the scan ends just before each token"]
        lines.append("        inner = (o_c <= left) & (o_c > 0)")
        lines += self.beside(state, " - H", "inner", "_", (group.write(state),))
        shifted = {**self.names, **{v.name: f"{self.names[v.name]}_" for v in group.inputs}}
        lines += self.statements({"decay": state.decay, "write": group.write(state)}, shifted)
        lines += [
            "        decay = tl.where(inner[:, None] & m_w[None, :], decay, 1.0)",
            "        write = tl.where(inner[:, None] & m_w[None, :], write, 0.0)",
            "        decay, write = tl.associative_scan((decay, write), 0, _compose)",
            f"        {name}_before = decay * {name}_start + write",
            *self.statements({f"{name}_decay": state.decay, "write": group.write(state)}, self.names),
            f"        {name}_decay = tl.where(m_cw, {name}_decay, 1.0)",
            f"        {name} = {name}_decay * {name}_before + tl.where(m_cw, write, 0.0)",
        ]
        return lines

    def sums(self) -> str:
        group = self.group
        arguments = [f"{self.names[v.name]}_in" for v in self.leaves]
        arguments += [f"{s}_{part}" for part in ("total", "local") for s in self.states]
        lines = self.signature("sums_kernel", "What a segment does to each state: S' = total S + local.", arguments)
        shape = "[C, BW]" if group.products else "[1, BW]"
        for s in self.states:
            lines.append(f"    {s}_sum = tl.zeros({shape}, dtype=tl.float32)")
            lines.append(f"    {s}_whole = tl.full([1, BW], {0.0 if group.products else 1.0}, tl.float32)")
        lines += self.loop(self.used([e for s in group.states for e in (s.decay, group.write(s))]), False, None)
        for state in group.states:
            s = self.names[state.name]
            if group.products:
                lines += [*self.decays(state), *self.statements({"write": group.write(state)}, self.names)]
                lines.append(
                    f"        {s}_sum = tl.exp2({s}_past) * {s}_sum + {s}_until[:, None] * tl.where(m_cw, write, 0.0)"
                )
                lines.append(f"        {s}_whole += {s}_past")
                continue
            lines += self.statements({"decay": state.decay, "write": group.write(state)}, self.names)
            lines += [
                "        decay = tl.where(m_cw, decay, 1.0)",
                "        write = tl.where(m_cw, write, 0.0)",
                "        decay, write = tl.associative_scan((decay, write), 0, _compose)",
                "        decay = tl.sum(tl.where(o_c[:, None] == C - 1, decay, 0.0), axis=0)[None, :]",
                "        write = tl.sum(tl.where(o_c[:, None] == C - 1, write, 0.0), axis=0)[None, :]",
                f"        {s}_sum = decay * {s}_sum + write",
                f"        {s}_whole *= decay",
            ]
        for s in self.states:
            whole = f"tl.exp2({s}_whole)" if group.products else f"{s}_whole"
            lines.append(f"    tl.store({s}_total + at_border, tl.sum({whole}, axis=0), mask=m_w)")
            lines.append(f"    tl.store({s}_local + at_border, tl.sum({s}_sum, axis=0), mask=m_w)")
        return "\n".join(lines) + "\n"

    def forward(self) -> str:
        group = self.group
        arguments = [f"{self.names[v.name]}_in" for v in self.leaves] + [f"{f}_out" for f in group.features]
        arguments += [f"{s}_{part}" for part in ("out", "border", "saved", "final") for s in self.states]
        about = "; ".join(f"{s.name} = {s.decay} {s.name} + {group.write(s)}" for s in group.states)
        lines = self.signature("kernel", f"{about}; features of every token.", arguments)
        for s in self.states:
            lines.append(f"    {s}_start = tl.load({s}_border + at_border, mask=m_w, other=0.0)[None, :]")
            lines.append(f"    {s}_start += tl.zeros([C, BW], dtype=tl.float32)")
        lines += self.loop(list(group.inputs), False)
        row = "(o_c == 0)[:, None] & m_w[None, :]"
        at = _SLOT.format(first="first")
        for state in group.states:
            s = self.names[state.name]
            lines.append(f"        if {s}_saved is not None:")
            lines.append(
                f"            tl.store({s}_saved + ({at} + o_w[None, :] + o_c[:, None] * 0, {s}_start, mask={row})"
            )
            lines += self.step(state, False)
            if group.products:
                lines += [
                    f"        ending = tl.zeros([C, C], dtype=tl.float32) + {s}_until[None, :]  # the same for every row",
                    f"        {s}_start = tl.dot(ending, write, tl.exp2({s}_past) * {s}_start, input_precision=PRECISION)",
                ]
            else:
                lines.append(f"        {s}_start = tl.sum(tl.where(o_c[:, None] == C - 1, {s}, 0.0), axis=0)[None, :]")
                lines.append(f"        {s}_start += tl.zeros([C, BW], dtype=tl.float32)")
        features, inverse = inverses_of({f"{f}_now": e for f, e in group.features.items()})
        lines += [*self.inverses(inverse, self.names), *self.statements(features, self.names)]
        for f in group.features:
            lines.append(
                f"        tl.store({f}_out + corner * W + tile, ({f}_now).to({f}_out.dtype.element_ty), mask=m_cw)"
            )
        for s in self.states:
            lines.append(f"        if {s}_out is not None:")
            lines.append(f"            tl.store({s}_out + corner * W + tile, {s}, mask=m_cw)")
        lines.append("    if SINGLE:")
        lines += [
            f"        tl.store({s}_final + at_border, tl.sum(tl.where(o_c[:, None] == 0, {s}_start, 0.0), axis=0), mask=m_w)"
            for s in self.states
        ]
        return "\n".join(lines) + "\n"

    def backward(self, whole: bool) -> str:
        """The kernel of all cotangents (``whole``), or of what a segment does to those of the states."""
        group, names, states = self.group, self.names, self.states
        arguments = [f"{names[v.name]}_in" for v in self.leaves] + [f"{s}_saved" for s in states]
        arguments += [f"d_{f}_in" for f in group.features] + [f"d_{s}_in" for s in states]
        if whole:
            arguments += [f"d_{names[v.name]}_through" for v in group.through]
            arguments += [f"d_{s}_border" for s in states] + [f"d_{names[v.name]}_out" for v in self.leaves]
            arguments += [f"d_{s}_initial" for s in states]
            kernel, about = "backward_kernel", "Cotangents of the inputs, and of the parameters from each segment."
        else:
            arguments += [f"{s}_{part}" for part in ("total", "local") for s in states]
            kernel = "back_sums_kernel"
            about = "What a segment does to the cotangent of each state, last token first: dS' = total dS + local."
        lines = self.signature(kernel, about, arguments)
        for s in states:
            start = f"tl.load(d_{s}_border + at_border, mask=m_w, other=0.0)[None, :]" if whole else "0.0"
            lines.append(f"    {s}_carry = {start} + tl.zeros([C, BW], dtype=tl.float32)")
            if not whole:
                lines.append(f"    {s}_whole = tl.full([1, BW], {0.0 if group.products else 1.0}, tl.float32)")
        if whole:
            lines += [f"    sum_{names[p.name]} = tl.zeros([C, BW], dtype=tl.float32)" for p in group.parameters]
        cotangent = {f: sympy.Symbol(f"d_{f}", real=True) for f in group.features}
        local = {**names, **{c.name: c.name for c in cotangent.values()}}
        inside = {
            f"{names[s.name]}_in_token": sympy.Add(
                *(cotangent[f] * sympy.diff(e, group.symbols[s.name]) for f, e in group.features.items())
            )
            for s in group.states
        }
        gradients = self.gradients(cotangent) if whole else {}
        together, inverse = inverses_of({**inside, **gradients})
        needed = [*inside.values(), *gradients.values(), *(e for s in group.states for e in (s.decay, group.write(s)))]
        lines += self.loop(self.used(needed), True, starts=True)
        for state in group.states:
            lines += self.step(state, True)
        for f in group.features:
            lines.append(f"        d_{f} = {self.load(f'd_{f}_in')}")
        lines += self.inverses(inverse, local)
        lines += self.statements({n: together[n] for n in inside}, local)
        for s in states:
            lines.append(f"        if d_{s}_in is not None:")
            lines.append(f"            {s}_in_token += {self.load(f'd_{s}_in')}")
        lines.append(
            "        # cotangent of a state = its own part of this token + next token's decay times next cotangent"
        )
        for state in group.states:
            lines += self.back_step(state, whole)
        if not whole:
            for s in states:
                total = f"tl.exp2({s}_whole)" if group.products else f"{s}_whole"
                lines.append(f"    tl.store({s}_total + at_border, tl.sum({total}, axis=0), mask=m_w)")
                row = f"tl.sum(tl.where(o_c[:, None] == 0, {s}_carry, 0.0), axis=0)"
                lines.append(f"    tl.store({s}_local + at_border, {row}, mask=m_w)")
            return "\n".join(lines) + "\n"
        lines += self.statements({n: together[n] for n in gradients}, local)
        lines += self.stores()
        return "\n".join(lines) + "\n"

    def gradients(self, cotangent: Mapping[str, sympy.Symbol]) -> dict[str, sympy.Expr]:
        """Gradient of each input and parameter, from the cotangents of the features and of the states."""
        group, found = self.group, {}
        for v in self.leaves:
            terms = [cotangent[f] * sympy.diff(e, v.symbol) for f, e in group.features.items()]
            for s in group.states:
                name = self.names[s.name]
                incoming = sympy.Symbol(f"d_{name}", real=True)
                if group.products:  # decay = exp(log decay), and kept = decay times the state before
                    through = sympy.Symbol(f"{name}_kept", real=True) * sympy.diff(s.log_decay, v.symbol)
                else:
                    through = sympy.Symbol(f"{name}_before", real=True) * sympy.diff(s.decay, v.symbol)
                terms.append(incoming * (sympy.diff(group.write(s), v.symbol) + through))
            found[f"grad_{self.names[v.name]}"] = sympy.Add(*terms)
        return found

    def back_step(self, state: AffineState, whole: bool) -> list[str]:
        """Lines for the cotangent of the state after each token, and before the first (``carry``)."""
        s = self.names[state.name]
        lines = [f"        token = tl.where(m_cw, {s}_in_token, 0.0)"]
        if self.group.products:
            if whole:
                lines += [
                    f"        gap = tl.minimum({s}_sums[None, :] - {s}_sums[:, None], from_future)",
                    f"        d_{s} = tl.dot(tl.exp2(gap), token, {s}_until[:, None] * {s}_carry, input_precision=PRECISION)",
                ]
            else:
                lines.append(f"        {s}_whole += {s}_past")
            return lines + [
                f"        since = tl.zeros([C, C], dtype=tl.float32) + tl.exp2({s}_sums)[None, :]  # the same for every row",
                f"        {s}_carry = tl.dot(since, token, tl.exp2({s}_past) * {s}_carry, input_precision=PRECISION)",
            ]
        lines.append("        follows = live & (o_c < C - 1) & (o_c + 1 < left)")
        lines += self.beside(state, " + H", "follows", "_")
        later = {**self.names, **{v.name: f"{self.names[v.name]}_" for v in self.group.inputs}}
        lines += self.statements({"decay": state.decay}, later)
        lines += [
            "        decay = tl.where(follows[:, None] & m_w[None, :], decay, 1.0)",
            "        decay, token = tl.associative_scan((decay, token), 0, _compose, reverse=True)",
            f"        d_{s} = decay * {s}_carry + token",
            f"        {s}_carry = tl.sum(tl.where(o_c[:, None] == 0, {s}_decay * d_{s}, 0.0), axis=0)[None, :]",
            f"        {s}_carry += tl.zeros([C, BW], dtype=tl.float32)",
        ]
        if not whole:
            lines.append(
                f"        {s}_whole *= tl.sum(tl.where(o_c[:, None] == 0, {s}_decay * decay, 0.0), axis=0)[None, :]"
            )
        return lines

    def stores(self) -> list[str]:
        """Gradients of inputs in the loop; of parameters and initial states after it."""
        group, names, lines = self.group, self.names, []
        for v in group.inputs:
            name = names[v.name]
            if v in self.narrow:
                row = f"tl.sum(tl.where(m_cw, grad_{name}, 0.0), axis=1)"
                lines.append(f"        tl.store(d_{name}_out + i_w * TOTAL + corner + o_c * H, {row}, mask=live)")
                continue
            if v in group.through:
                lines.append(f"        if d_{name}_through is not None:")
                lines.append(f"            grad_{name} += {self.load(f'd_{name}_through')}")
            value = f"(grad_{name} + tl.zeros([C, BW], dtype=tl.float32)).to(d_{name}_out.dtype.element_ty)"
            lines.append(f"        tl.store(d_{name}_out + corner * W + tile, {value}, mask=m_cw)")
        for p in group.parameters:
            lines.append(f"        sum_{names[p.name]} += tl.where(m_cw, grad_{names[p.name]}, 0.0)")
        for p in group.parameters:
            name = names[p.name]
            lines.append(f"    tl.store(d_{name}_out + at_border, tl.sum(sum_{name}, axis=0), mask=m_w)")
        lines.append("    if SINGLE:")
        for s in self.states:
            row = f"tl.sum(tl.where(o_c[:, None] == 0, {s}_carry, 0.0), axis=0)"
            lines.append(f"        tl.store(d_{s}_initial + at_border, {row}, mask=m_w)")
        return lines

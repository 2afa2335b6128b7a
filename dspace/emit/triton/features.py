"""The core function of classes a, b and fold: features of tokens in PyTorch, matmuls in the chunkwise kernels.

A feature that is an input is that tensor; one that needs vector states comes out of their kernel
(:mod:`dspace.emit.triton.vector`); any other is a few elementwise PyTorch operations, differentiated by autograd.
"""

from __future__ import annotations

import builtins

import sympy

from dspace.emit.base import LEAN, Section
from dspace.emit.naming import INTERNAL, KernelNamer, internal_names
from dspace.emit.printers import TorchPrinter
from dspace.emit.triton import boundary, channel, chunkwise, fold, host, launching, vector, vector_host
from dspace.emit.triton.delta import source as delta_source
from dspace.emit.triton.printer import specialise
from dspace.emit.triton.vector_group import Fold, VectorGroup
from dspace.math.functions import Softplus
from dspace.math.ir import SCALE, AffineState, Analysis, Axes, Recurrence, SumK, SumV, Write, axes_of, divisor_symbols
from dspace.plan.affine import AffinePlan, affine_plan, kind
from dspace.plan.delta import delta_plan

_ALIGN: dict[Axes, str] = {"": "[..., None, None]", "k": "[..., :, None]", "v": "[..., None, :]", "kv": ""}
_STRIP: dict[Axes, str] = {"": "[..., 0, 0]", "k": "[..., 0]", "v": "[..., 0, :]"}
_SHAPE: dict[Axes, str] = {"": "", "k": ", size_k", "v": ", size_v"}
_LOCAL = frozenset(
    """after at backward base bases begin border borders carry channels chunks corner cotangents dtype end ending exclusive
    fast features final fixed found from_future gap given grads grid initial inputs inside left length like live local mask most options own
    parameters pid pointers precision raw reads run saved scale segment segments sequence shape since single sizes spans stages
    starts states step tensors there through tile tiles token total triton tl until values warps wide within write zeros
    batch B BN BW C FAST H LENGTH N NT NW PACKED PRECISION REVERSE SINGLE STAGES T TOTAL W""".split()
)

_WANTED = "    if want_variance:"


class _Printer(TorchPrinter):
    functions = {**TorchPrinter.functions, Softplus: "-torch.nn.functional.logsigmoid(-({}))"}

    def ordered(self, product: sympy.Expr) -> list[sympy.Expr]:
        """What has fewer channels first, so that few operations are on all of them."""
        return sorted(super().ordered(product), key=lambda factor: len(axes_of(factor, self.axes)))


def section(analysis: Analysis, delta: bool = False) -> Section | None:
    """The chunkwise Triton section, or None where the recurrence has no such form.

    That of class d is made only if ``delta`` asks for it: its certificate fails in bfloat16 (docs/limits.md).
    """
    plan = delta_plan(analysis) if delta else affine_plan(analysis)
    if plan is None or not plan.matrix_states or any(s.decay_axes == "v" for s in plan.matrix_states):
        return None
    if any(e.atoms(SumK, SumV) for s in plan.vector_states for w in s.writes for e in (s.decay, w.key, w.value)):
        return None  # the scan of vector states is elementwise
    writer = _Core(analysis.recurrence, plan)
    core = writer.lines()
    return Section(
        device="cuda",
        imports=launching.IMPORTS,
        code="\n\n".join([*writer.parts(), "\n".join(core) + LEAN.format(core="_chunk_triton_core")]),
        chunk="_chunk_triton_core",
        recurrent=None,
    )


def core_source(decay: str, exclusive: bool, part: str = "all", tag: str = "") -> str:
    """Kernels, launches and operators of one matmul core; ``decay`` is "none", "scalar" or "key".

    ``part``: "all"; "backward" pass, of a core whose names end in a ``tag`` of its own; "states" and the gradients of a
    chunk only, as the fold has the others itself.
    """
    flags = {"decay": decay != "none", "key": decay == "key", "before": exclusive}
    texts = [boundary.DECAY_SUMS] if flags["decay"] else []
    texts += [boundary.STATES, boundary.COTANGENTS]
    texts += [channel.SCORES] if flags["key"] else []
    texts += [chunkwise.OUTPUTS] if part == "all" else []
    texts += [channel.VALUES, channel.KEYS] if flags["key"] else [chunkwise.CHUNK_GRADIENTS]
    texts += [chunkwise.GRADIENTS] if part != "states" and not flags["key"] else []
    passes = {"all": [host.FORWARD, host.BACKWARD, host.OPERATORS], "backward": [host.BACKWARD], "states": []}
    texts += [host.CORE, *passes[part]]
    tag = tag or decay
    return host.renamed("\n".join(specialise(t, flags) for t in texts), tag).replace("_TAG", f"_{tag}")


class _Core:
    """Writes ``_chunk_triton_core`` and collects what it calls."""

    def __init__(self, recurrence: Recurrence, plan: AffinePlan) -> None:
        self.recurrence = recurrence
        self.plan = plan
        reserved = INTERNAL | _LOCAL | set(dir(builtins)) | {"scale"}
        self.names = internal_names(recurrence, KernelNamer(reserved))
        self.table = recurrence.axes_table() | {r.symbol: "v" for r in plan.readout.reads}
        aligned = {v.name: f"{self.names[v.name]}_" for v in (*recurrence.inputs, *recurrence.parameters)}
        # Aligned to [B, T, H, K, V] under a name with "_" behind; vector states and reads have such names only.
        self.show = _Printer(
            {**{s.name: f"{self.names[s.name]}_all" for s in recurrence.states}, **aligned}, self.table
        )
        self.symbols = {s.name: s.symbol for s in recurrence.states}
        self.vector_symbols = {self.symbols[s.name] for s in plan.vector_states}
        self.groups: list[VectorGroup] = []
        self.features: dict[sympy.Expr, str] = {}
        self.out: list[str] = []
        self.folded: Fold | None = None
        """Where the only query divides by the vector states: both are computed in the kernels of the matrix state."""

    def parts(self) -> list[str]:
        """Everything but the core function, in order."""
        kinds = sorted({kind(s) for s in self.plan.matrix_states})
        parts = [launching.COMMON, launching.TABLES, boundary.SPAN]
        kernel_names = dict(self.names)
        if self.folded is not None:
            parts += [launching.FAST, vector.COMPOSE, vector.CARRY, core_source(kinds[0], False, "states")]
            parts.append(fold.source(self.folded, kernel_names))
            return [p.strip("\n") + "\n" for p in parts]
        if self.groups:
            parts += [launching.FAST, vector.COMPOSE, vector.SEGMENT, vector_host.PLAN, vector.CARRY]
            if self.plan.exclusive:
                parts.append(vector.BEFORE)
        parts += [vector.source(group, kernel_names) for group in self.groups]
        parts += [core_source(k, self.plan.exclusive) for k in kinds]
        for k in sorted({kind(s) for s in self.plan.matrix_states if s.name in self.plan.probes}):
            before = k if self.plan.exclusive else f"{k}_before"
            parts += [] if self.plan.exclusive else [core_source(k, True, "backward", before)]
            parts.append(delta_source(k, before))
        return [p.strip("\n") + "\n" for p in parts]

    def lines(self) -> list[str]:
        write = self.out.append
        r, names, plan = self.recurrence, self.names, self.plan
        every = [names[v.name] for v in (*r.inputs, *r.parameters)] + [names[s.name] for s in r.states]
        like = names[r.inputs[0].name]
        write(f"def _chunk_triton_core({', '.join(every)}, scale, offsets, want_variance, want_final=True):")
        write('    """Features of every token, then matmuls over chunks with the states at their borders."""')
        write(f"    if {like}.dtype == torch.float64:  # no tensor cores for it")
        write(f"        return _reference_core({', '.join(every)}, scale, offsets, want_variance)")
        if self._divides():
            own = [names[v.name] for v in r.inputs]
            rest = ["scale", "offsets", "want_variance", "want_final"]
            write(f"    if {{{', '.join(f'{n}.dtype' for n in own)}}} != {{torch.float32}}:")
            write(
                "        # One tensor for all that an input is used for: its gradient is a difference of nearly equal parts."
            )
            arguments = [*(f"{n}.float()" for n in own), *every[len(own) :], *rest]
            write(f"        return _chunk_triton_core({', '.join(arguments)})")
        sizes = len(self.out)
        write(f"    dtype = {self._common_type()}  # operands of the matmuls")
        body = len(self.out)
        calls = self._vector_states()
        self.folded = fold.folding(plan, self.groups)
        for s in plan.vector_states if self.folded is None else ():
            shape = f"batch if offsets is None else offsets.shape[0] - 1, heads{_SHAPE[s.axes]}"
            write(f"    if {names[s.name]} is None:")
            write(f"        {names[s.name]} = torch.zeros({shape}, device={like}.device)")
        if self.folded is not None:
            self._fold(self.folded, calls[0][2])
        else:
            for call in calls:
                self._call_group(*call)
            for state in plan.matrix_states:
                self._matrix_state(state)
        self._results(like)
        # Aligned float32 copies, only of what expressions mention, and where only the variance does, with it.
        asked = next((i for i, line in enumerate(self.out) if line == _WANTED), len(self.out))
        always = launching.words([*self.out[body:asked], *self.out[asked + 2 :]])
        sometimes = launching.words(self.out[asked : asked + 2]) - always
        self.out[asked + 1 : asked + 1] = [f"    {line}" for line in self._views(sometimes)]
        self.out[body:body] = self._views(always)
        self.out[sizes:sizes] = launching.sizes(every, like, self.out[sizes:])
        return self.out

    def _views(self, words: set[str]) -> list[str]:
        r, names = self.recurrence, self.names
        views = [
            f"    {names[v.name]}_ = {names[v.name]}.float(){_ALIGN[v.axes]}"
            for v in (*r.inputs, *r.parameters)
            if f"{names[v.name]}_" in words
        ]
        return ["    # aligned to [B, T, H, K, V], with size 1 where there is no such axis", *views] if views else []

    def _divides(self) -> bool:
        """Whether the output is divided by something that is made of states.

        An average over values, as normalised attention is, changes with its query by the difference of two sums that
        are nearly the same where tokens are alike: no digit of 16-bit products is left of it.
        """
        states = {*self.vector_symbols, *(r.symbol for r in self.plan.readout.reads)}
        return bool(divisor_symbols(self.plan.readout.output) & states)

    def _common_type(self) -> str:
        """Type of what is multiplied: of the inputs, in which products are fastest."""
        plain = []
        for state in self.plan.matrix_states:
            for w in state.writes:
                plain += [w.key, w.value]
        for read in self.plan.readout.reads:
            plain += list((read.queries or {}).values())
        used = [self.names[v.name] for v in self.recurrence.inputs if v.symbol in plain]
        if not used:
            return f"{self.names[self.recurrence.inputs[0].name]}.dtype"
        return launching.common_type(used)

    def _feature(self, expr: sympy.Expr, axes: Axes, cast: str) -> str:
        """``expr`` as a tensor ``[B, T, H, *axes]`` of type ``cast``."""
        if expr in self.features and axes:
            return self.features[expr]
        for v in self.recurrence.inputs:
            if v.symbol == expr and v.axes == axes:
                return f"_typed({self.names[v.name]}, {cast})"
        own = axes_of(expr, self.table)
        text = self.show(expr)
        if not expr.free_symbols:
            return f"torch.full((batch, steps, heads{_SHAPE[axes]}), {float(expr)!r}, dtype={cast}, device={self.names[self.recurrence.inputs[0].name]}.device)"
        if own != axes or not any(self.table.get(s) is not None and self._per_token(s) for s in expr.free_symbols):
            text = f"({text}).expand(batch, steps, heads, {'size_k' if axes == 'k' else 1}, {'size_v' if axes == 'v' else 1})"
        else:
            text = f"({text})"
        return f"_typed({text}{_STRIP[axes]}, {cast})"

    def _per_token(self, symbol: sympy.Symbol) -> bool:
        return any(symbol == v.symbol for v in self.recurrence.inputs) or symbol in self.vector_symbols

    def _vector_states(self) -> list[tuple[VectorGroup, set, list[sympy.Expr]]]:
        """One group for each axis; queries on that axis that need its states only are computed with them.

        Beside each group the symbols of its states, and the expressions elsewhere that may need them.
        """
        calls = []
        plan, r = self.plan, self.recurrence
        queries = [q for read in plan.readout.reads for q in (read.queries or {}).values()]
        outside = [plan.readout.output, plan.readout.variance or sympy.S.Zero]
        for axes in ("", "v", "k"):
            states = tuple(s for s in plan.vector_states if s.axes == axes)
            if not states:
                continue
            own = {self.symbols[s.name] for s in states}
            features: dict[str, sympy.Expr] = {}
            for query in queries:
                uses = query.free_symbols & self.vector_symbols
                local = not query.atoms(SumK, SumV) and axes_of(query, self.table) == axes
                if not uses & own:
                    continue
                if local and uses <= own and not plan.exclusive:
                    features.setdefault(f"feature_{len(features)}", query)
                else:
                    outside.append(query)
            exprs = [
                *features.values(),
                *(s.decay for s in states),
                *(w.key * w.value for s in states for w in s.writes),
            ]
            used = set().union(*(e.free_symbols for e in exprs))
            # as they are, the features aside: their two gradients would be added in a pass of its own
            elsewhere = {e for s in plan.matrix_states for w in s.writes for e in (w.key, w.value)}
            elsewhere |= {q for q in queries if q not in features.values()}
            group = VectorGroup(
                axes=axes,
                states=states,
                symbols=self.symbols,
                inputs=tuple(v for v in r.inputs if v.symbol in used),
                parameters=tuple(p for p in r.parameters if p.symbol in used),
                features=features,
                through=tuple(v for v in r.inputs if v.symbol in used & elsewhere and v.axes and v.axes == axes),
            )
            self.groups.append(group)
            calls.append((group, own, outside))
        return calls

    @staticmethod
    def _raw(own: set, outside: list[sympy.Expr]) -> str:
        """When the states themselves are needed at every token: "True", "want_variance", "False"."""
        always = any(e.free_symbols & own for e in (*outside[:1], *outside[2:]))
        sometimes = bool(outside[1].free_symbols & own)
        return "True" if always else "want_variance" if sometimes else "False"

    def _call_group(self, group: VectorGroup, own: set, outside: list[sympy.Expr]) -> None:
        names, write = self.names, self.out.append
        raw = self._raw(own, outside)
        states = [names[s.name] for s in group.states]
        arguments = [names[v.name] for v in (*group.inputs, *group.parameters)] + states
        write("")
        for s in group.states:
            write(f"    # {s.name}_t = {s.decay} * {s.name}_(t-1) + {group.write(s)}, at every token")
        for f, e in group.features.items():
            write(f"    # {group.tag}_{f} = {e}")
        write(f"    features, values, final, through = _vector_{group.tag}(")
        write(
            f"        {', '.join(arguments)}, scale, {raw}, offsets, {names[self.recurrence.inputs[0].name]}.new_empty(0, dtype=dtype).expand(batch, steps, heads, 0)"
        )
        write("    )")
        for i, (f, e) in enumerate(group.features.items()):
            write(f"    {group.tag}_{f} = features[{i}]")
            self.features[e] = f"{group.tag}_{f}"
        for i, v in enumerate(group.through):
            write(f"    {names[v.name]} = through[{i}]")
        align = _ALIGN[group.axes]
        for i, state in enumerate(states):
            write(f"    {state}_final = final[{i}]")
            self._every_token(state, f"values[{i}]", raw, align)

    def _every_token(self, state: str, value: str, raw: str, align: str) -> None:
        """A vector state of every token under the name that expressions have for it."""
        if raw == "False":
            return
        guard = "" if raw == "True" else f"if {raw}:\n        "
        if self.plan.exclusive:
            value = f"_before({value}, {state}, offsets)"
        self.out.append(f"    {guard}{state}_all = {value}{align}")

    def _fold(self, made: Fold, outside: list[sympy.Expr]) -> None:
        """The one call of a fold."""
        names, group, state, write = self.names, made.group, self.plan.matrix_states[0], self.out.append
        self.scaled = self._scale_of_reads()
        (w,) = state.writes
        states = [names[s.name] for s in group.states]
        arguments = [names[v.name] for v in (*group.inputs, *group.parameters)] + states
        arguments += [self._feature(w.key, "k", "dtype"), self._feature(w.value, "v", "dtype")]
        arguments += [] if made.decay == "none" else [self._decay(state, 1)]
        raw = self._raw({self.symbols[s.name] for s in group.states}, outside)
        write("")
        for s in group.states:
            write(f"    # {s.name}_t = {s.decay} * {s.name}_(t-1) + {group.write(s)}")
        write(
            f"    # {state.name}_t = {state.decay} * {state.name}_(t-1) + ({w.key}) ({w.value}), read with {made.query}"
        )
        read = f"{self.plan.readout.reads[0].symbol}_{names[state.name]}"
        write(f"    {read}, {names[state.name]}_final, final, values = _fold(")
        write(f"        {', '.join(arguments)}, {names[state.name]}, {self.scaled}, {raw}, offsets, want_final")
        write("    )")
        for i, name in enumerate(states):
            write(f"    {name}_final = final[{i}]")
            self._every_token(name, f"values[{i}]", raw, _ALIGN[group.axes])

    def _matrix_state(self, state: AffineState) -> None:
        names, write = self.names, self.out.append
        name, tag = names[state.name], kind(state)
        reads = [r for r in self.plan.readout.reads if r.queries is not None and state.name in r.queries]
        probe = self.plan.probes.get(state.name)
        uses = len(state.writes) * max(1, len(reads)) + (probe is not None)
        decay = "" if tag == "none" else f"{self._decay(state, uses)}, "
        self.scaled = self._scale_of_reads()
        writes = state.writes or (Write(sympy.S.Zero, sympy.S.Zero),)  # the kernels write something
        added = " + ".join(f"({w.key}) ({w.value})" for w in writes)
        if probe is not None:
            added = f"({writes[0].key}) ({writes[0].value} + sum_k({probe} * {state.name}_(t-1)))"
        write("")
        write(f"    # {state.name}_t = {state.decay} * {state.name}_(t-1) + {added}")
        if decay:
            write(f"    {name}_decay = {decay[:-2]}")
            decay = f"{name}_decay, "
        for i, w in enumerate(writes):
            suffix = f"_{i}" if len(writes) > 1 else ""
            key, value = f"{name}_key{suffix}", f"{name}_value{suffix}"
            write(f"    {key} = {self._feature(w.key, 'k', 'dtype')}")
            write(f"    {value} = {self._feature(w.value, 'v', 'dtype')}")
            if probe is not None:
                write(f"    {name}_probe = {self._feature(probe, 'k', 'dtype')}")
                write(f"    {value} = _erase_{tag}({name}_probe, {key}, {value}, {decay}{name}, offsets)")
            initial = name if i == 0 else f"None if {name} is None else torch.zeros_like({name})"
            ending = f"{name}_final" if i == 0 else "last"
            for j, read in enumerate(reads):
                assert read.queries is not None
                query = self._feature(read.queries[state.name], "k", "dtype")
                target = f"{read.symbol.name}_{name}"
                results = f"{target if i == 0 else 'part'}, {ending if j == 0 else '_'}"
                write(
                    f"    {results} = _linear_{tag}({query}, {key}, {value}, {decay}{initial}, {self.scaled}, offsets, want_final)"
                )
                if i:
                    write(f"    {target} = {target} + part")
            if not reads:
                write(
                    f"    _, {ending} = _linear_{tag}({key}, {key}, {value}, {decay}{initial}, 1.0, offsets, want_final)"
                )
            if i:
                write("    if want_final:")
                write(f"        {name}_final = {name}_final + last")

    def _decay(self, state: AffineState, uses: int) -> str:
        """Log decays: an input as it is, unless its gradients of several uses are to be added in float32."""
        for v in self.recurrence.inputs:
            if v.symbol == state.log_decay and v.axes == state.decay_axes and uses == 1:
                return self.names[v.name]
        return self._feature(state.log_decay, state.decay_axes, "torch.float32")

    def _scale_of_reads(self) -> str:
        """A factor that the kernel applies: when the output is a constant times the only read."""
        reads = self.plan.readout.reads
        if len(reads) == 1 and (self.plan.readout.variance is None or not self._in_variance(reads[0].symbol)):
            factor = self.plan.readout.output / reads[0].symbol
            if factor.free_symbols <= {SCALE.symbol}:
                return self.show(factor) if factor != 1 else "1.0"
        return "1.0"

    def _in_variance(self, symbol: sympy.Symbol) -> bool:
        return self.plan.readout.variance is not None and symbol in self.plan.readout.variance.free_symbols

    def _output(self, like: str) -> list[str]:
        """Lines that make the output of what was read."""
        plan, names, lines = self.plan, self.names, []
        direct = self.scaled != "1.0" or (
            len(plan.readout.reads) == 1 and plan.readout.output == plan.readout.reads[0].symbol
        )
        sums = {}
        for read in plan.readout.reads:
            sums[read.symbol.name] = " + ".join(f"{read.symbol.name}_{names[s]}" for s in read.queries or {})
        if direct:
            return [f"    output = _typed({sums[plan.readout.reads[0].symbol.name]}, {like}.dtype)"]
        for read in plan.readout.reads:
            lines.append(
                f"    {read.symbol.name} = ({sums[read.symbol.name]}).float()[..., None, :]  # sum_k {read.body}"
            )
        return [*lines, f"    output = {self._feature(plan.readout.output, 'v', f'{like}.dtype')}"]

    def _results(self, like: str) -> None:
        write, plan, names = self.out.append, self.plan, self.names
        self.out += ["", *self._output(like)]
        write("    variance = None")
        if plan.readout.variance is not None:
            write(_WANTED)
            write(f"        variance = {self._feature(plan.readout.variance, 'v', f'{like}.dtype')}")
        final = [f"{names[s.name]}_final" for s in self.recurrence.states]
        write(f"    return {', '.join(['output', 'variance', *final])}")

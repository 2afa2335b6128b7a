"""The chunkwise PyTorch section: an affine plan printed as features of tokens and calls of a few blocks."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable

import sympy

from dspace.emit.base import Section
from dspace.emit.naming import INTERNAL, Namer, internal_names
from dspace.emit.printers import TorchPrinter
from dspace.emit.torch import blocks
from dspace.math.functions import Softplus
from dspace.math.ir import AffineState, Analysis, Axes
from dspace.plan.affine import AffinePlan, affine_plan

_ALIGN: dict[Axes, str] = {"": "[..., None, None]", "k": "[..., :, None]", "v": "[..., None, :]", "kv": ""}
_STRIP: dict[Axes, str] = {"": "[..., 0, 0]", "k": "[..., 0]", "v": "[..., 0, :]", "kv": ""}
_SHAPE: dict[Axes, str] = {"": "1, 1", "k": "size_k, 1", "v": "1, size_v", "kv": "size_k, size_v"}
_LOCAL = frozenset({"rows", "places", "like", "dtype", "batch", "steps", "heads", "like_state", "reads", "feature"})


class _Printer(TorchPrinter):
    functions = {**TorchPrinter.functions, Softplus: "-torch.nn.functional.logsigmoid(-({}))"}


def section(analysis: Analysis) -> Section | None:
    """Section of the chunkwise form, or None where :func:`dspace.plan.affine.affine_plan` has none."""
    plan = affine_plan(analysis)
    if plan is None or not plan.matrix_states:
        return None
    code = "\n\n".join([_block_source(plan), _core(analysis, plan)])
    return Section(device="cpu", imports=("import torch",), code=code, chunk="_chunk_torch_core", recurrent=None)


def _block_source(plan: AffinePlan) -> str:
    """Source of the blocks that the plan calls."""
    axes = {s.decay_axes for s in (*plan.vector_states, *plan.matrix_states)}
    # A block mentions both kinds of decay, so both are emitted wherever the states could need them.
    wanted: list[Callable] = [
        blocks._spread,
        blocks._packed_rows,
        blocks._to_chunks,
        blocks._from_chunks,
        blocks._shift,
        blocks._decays,
    ]
    wanted += [blocks._channel_decays, blocks._carry]
    if plan.vector_states:
        wanted.append(blocks._vector_state)
    wanted.append(blocks._matrix_state)
    note = "one number per token" if axes <= {""} else "per channel"
    head = f"# Blocks of the chunkwise form; this variant's decay is {note}.\n_LOG_DECAY_FLOOR = {blocks._LOG_DECAY_FLOOR}\n"
    return head + "\n\n" + "\n\n".join(inspect.getsource(block) for block in wanted)


def _core(analysis: Analysis, plan: AffinePlan) -> str:
    recurrence = analysis.recurrence
    reserved = INTERNAL | _LOCAL | set(dir(builtins)) | {"scale"}
    reserved |= {read.symbol.name for read in plan.readout.reads}
    names = internal_names(recurrence, Namer(reserved))
    table = recurrence.axes_table() | {read.symbol: "v" for read in plan.readout.reads}
    show = _Printer(names, table)
    inputs = [names[v.name] for v in recurrence.inputs]
    every = [*inputs, *(names[p.name] for p in recurrence.parameters), *(names[s.name] for s in recurrence.states)]
    # The matrix states' names stand for initial states; vector states are replaced by their values at every token.
    out: list[str] = []
    write = out.append

    def feature(expr: sympy.Expr, axes: Axes) -> str:
        return f"feature({show(expr)}, ({_SHAPE[axes]},)){_STRIP[axes]}"

    def chunks(expr: sympy.Expr, axes: Axes) -> str:
        return f"_to_chunks({feature(expr, axes)}, rows, {plan.chunk})"

    write(f"def _chunk_torch_core({', '.join(every)}, scale, offsets, want_variance):")
    write(f'    """Chunks of {plan.chunk} tokens: matmuls inside a chunk, states carried from chunk to chunk."""')
    write(f"    like, like_state = {inputs[0]}, {names[plan.matrix_states[0].name]}")
    write("    dtype = like_state.dtype")
    write(f"    size_k, size_v = _sizes({', '.join(every)})")
    write("    batch, steps, heads = like.shape[:3]")
    write(f"    rows, places = (None, None) if offsets is None else _packed_rows(offsets, steps, {plan.chunk})")
    write("")
    write("    def feature(x, channels):")
    write("        return _spread(x, (batch, steps, heads, *channels), like_state)")
    write("")
    write("    # Every input is aligned to [B, T, H, K, V], with size 1 where it has no such axis.")
    for v in recurrence.inputs:
        write(f"    {names[v.name]} = {names[v.name]}.to(dtype){_ALIGN[v.axes]}")
    for p in recurrence.parameters:
        if _ALIGN[p.axes]:
            write(f"    {names[p.name]} = {names[p.name]}{_ALIGN[p.axes]}")
    for state in plan.vector_states:
        _vector(write, state, plan, names, chunks, feature)
    for state in plan.matrix_states:
        _matrix(write, state, plan, names, chunks)
    write("")
    for read in plan.readout.reads:
        assert read.queries is not None
        terms = " + ".join(f"_read_{read.symbol.name}_{names[state]}" for state in read.queries)
        write(f"    # {read.symbol.name} = sum_k {read.body}")
        write(f"    {read.symbol.name} = _from_chunks({terms}, places, steps)[..., None, :]")
    write(f"    output = feature({show(plan.readout.output)}, (1, size_v))[..., 0, :].to(like.dtype)")
    write("    variance = None")
    if plan.readout.variance is not None:
        write("    if want_variance:")
        write(f"        variance = feature({show(plan.readout.variance)}, (1, size_v))[..., 0, :].to(like.dtype)")
    final = [f"_final_{names[s.name]}" for s in recurrence.states]
    write(f"    return {', '.join(['output', 'variance', *final])}")
    return "\n".join(out) + "\n"


def _vector(write, state: AffineState, plan: AffinePlan, names, chunks, feature) -> None:
    name, axes = names[state.name], state.axes or ""
    added = sum((w.key * w.value for w in state.writes), sympy.Integer(0))
    log_decay = sympy.Integer(0) if state.log_decay is None else state.log_decay
    shape = "" if axes else "[..., None]"
    write("")
    write(f"    # {state.name}_t = {state.decay} * {state.name}_(t-1) + {added}, at every token")
    write(f"    _all, _final_{name} = _vector_state(")
    write(f"        _to_chunks({feature(added, axes)}{shape}, rows, {plan.chunk}),")
    write(f"        {chunks(log_decay, state.decay_axes)},")
    write(f"        {name}{shape},")
    write(f"        {plan.exclusive},")
    write("    )")
    if not axes:
        write(f"    _final_{name} = _final_{name}[..., 0]")
    write(f"    {name} = _from_chunks(_all, places, steps){_ALIGN[axes] if axes else '[..., None]'}")


def _matrix(write, state: AffineState, plan: AffinePlan, names, chunks) -> None:
    name = names[state.name]
    log_decay = sympy.Integer(0) if state.log_decay is None else state.log_decay
    reads = [r for r in plan.readout.reads if r.queries is not None and state.name in r.queries]
    added = " + ".join(f"({w.key}) * ({w.value})" for w in state.writes)
    write("")
    write(f"    # {state.name}_t = {state.decay} * {state.name}_(t-1) + {added}")
    write(f"    reads, _final_{name} = _matrix_state(")
    write(f"        [{', '.join(chunks(w.key, 'k') for w in state.writes)}],")
    write(f"        [{', '.join(chunks(w.value, 'v') for w in state.writes)}],")
    write(f"        [{', '.join(chunks(r.queries[state.name], 'k') for r in reads if r.queries is not None)}],")
    write(f"        {chunks(log_decay, state.decay_axes)},")
    write(f"        {name},")
    write(f'        "{state.decay_axes}",')
    write(f"        {plan.exclusive},")
    write("    )")
    if reads:
        write(f"    ({', '.join(f'_read_{r.symbol.name}_{name}' for r in reads)},) = reads")

"""The Triton section of class c: ratios (any elementwise read) of affine states with one decay per token.

A generated section has six kernels (:mod:`.ratio_text`, :mod:`.ratio_forward`, :mod:`.ratio_backward`, :mod:`.ratio_settle`) and their
launches. Time is taken in windows, each a call of all kernels with the state (or adjoint) of its border carried in
float32, so that the states at chunk starts and their adjoints (2 bytes an element every 16 tokens in bfloat16) need
not exist for all tokens at once.
"""

from __future__ import annotations

import builtins

import sympy

from dspace.emit.base import Section
from dspace.emit.naming import INTERNAL, Namer, internal_names
from dspace.emit.printers import TorchPrinter
from dspace.emit.triton import host
from dspace.emit.triton.ratio_backward import along, local_kernel
from dspace.emit.triton.ratio_forward import SLABS, reads_kernel, states_kernel
from dspace.emit.triton.ratio_settle import carry_kernel, settle_kernel
from dspace.emit.triton.ratio_text import HELPERS, Words
from dspace.math.functions import Softplus
from dspace.math.ir import Analysis, Axes, Recurrence, axes_of
from dspace.plan.ratio import RatioPlan, Tensor, ratio_plan

BUDGET = 96 * 2**20
"""Bytes that states and adjoints at chunk starts may take: sets the tokens of a window, never fewer than 256."""

_ALIGN: dict[Axes, str] = {"": "[..., None, None]", "k": "[..., :, None]", "v": "[..., None, :]", "kv": ""}
_STRIP: dict[Axes, str] = {"": "[..., 0, 0]", "k": "[..., 0]", "v": "[..., 0, :]"}
_RESERVED = frozenset(
    """raw i_c i_l i_h i_n i_v i_k i_e i_r o_c o_k o_v o_e o_p m_v m_k m_ck m_cv m_e m_out m_tile row live at at_l at_k
    at_v at_part causal whole part seen begin end base first block tile slab slot own pick product products chunks
    adjoints handed heads user last total until spans offsets bases parts total shift T NT H LOW HIGH STORE K V BK BV BE
    BP NK NV OT PRECISION PACKED FAST VARIANCE PARTS dtype batch like zeros triton tl final reads results values
    features triton tl""".split()
) | {f"{x}{i}" for x in "cp" for i in range(100)}


class _Printer(TorchPrinter):
    functions = {**TorchPrinter.functions, Softplus: "-torch.nn.functional.logsigmoid(-({}))"}


def section(analysis: Analysis) -> Section | None:
    """The section, or None where :func:`dspace.plan.ratio.ratio_plan` has no plan."""
    plan = ratio_plan(analysis)
    if plan is None:
        return None
    recurrence = analysis.recurrence
    names = internal_names(recurrence, Namer(INTERNAL | _RESERVED | set(dir(builtins)) | {"scale"}))
    names |= {t.name: t.name for t in (*plan.tensors, *plan.decays) if t.name not in names}
    words = Words(plan, names)
    kernels = [states_kernel, reads_kernel, local_kernel, carry_kernel, settle_kernel]
    parts = [host.COMMON, host.TABLES, HELPERS]
    parts += [make(words) for make in kernels]
    parts += [_config(), _forward(words), _backward(words), _operators(words), _core(recurrence, words)]
    return Section(
        device="cuda",
        imports=("import torch",),
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk="_chunk_triton_core",
        recurrent=None,
    )


def _config() -> str:
    return f'''
def _fast(tensor):
    """Whether kernels on this device may use instructions of NVIDIA GPUs."""
    return tensor.is_cuda and torch.version.hip is None


def _registers(tensor, count):
    """Compile option: fewer registers a thread, for more blocks on a multiprocessor."""
    return {{"maxnreg": count}} if _fast(tensor) and count else {{}}


def _forward_tiles(K, V, dtype):
    """(BK, BV, warps, stages, registers) of the forward kernel; it spells out at most {SLABS} slabs of BK channels."""
    if K <= 16 or K <= 64 and K % 32:
        BK = 16
    else:
        BK = 32 if K <= 128 else 64
    if dtype != torch.bfloat16:
        return BK, 8, 4, 1, 0
    return BK, 8, 4, 2, 128 if BK <= 32 else 0


def _backward_tiles(K, V, dtype):
    """The same for the kernel of local adjoints, whose slabs are a loop unless there is only one."""
    BK = 16 if K <= 16 else 64 if 32 < K <= 64 else 32
    if dtype != torch.bfloat16:
        return min(BK, 32), 8, 4, 1, 0
    return BK, 8, 4, 2, 0


def _windows(T, bytes_a_token, share):
    """Bounds of the windows of time; forward, ``share`` is 3: gradients do not yet take memory then."""
    size = max(256, share * {BUDGET} // max(1, bytes_a_token) // 256 * 256)
    return list(range(0, T, size)) + [T]


def _window(T, low, high, offsets, N):
    """What a window has of every sequence: (T, low, high) and tables as the kernels take them, and its chunks."""
    if offsets is None:
        NT = -(-(high - low) // 16)
        return None, None, None, NT, N * NT
    offsets = offsets.clamp(low, high)
    inside = offsets - low
    spans, bases, NT, chunks = _plan(high - low, inside, N, 16)
    return offsets, spans + low * (spans[:, 1:] > spans[:, :1]), bases, NT, chunks


def _sums(decay, sums, spans, T, low, high, NT, chunks):
    """Sums of log decays inside the chunks of a window."""
    H = decay.shape[2]
    BH = _tile(H, 64)
    _sums_kernel[(chunks, triton.cdiv(H, BH))](
        decay, sums, spans, T, low, high, NT, H, BH=BH, PACKED=spans is not None
    )
'''


def _lists(words: Words) -> dict[str, list[str]]:
    plan = words.plan
    tensors = [words.of(t) for t in plan.tensors]
    decays = [f"decay_{d}" for d in range(len(plan.decays))]
    return {
        "tensors": tensors,
        "decays": decays,
        "parameters": words.parameters,
        "states": words.states,
        "all": [*tensors, *decays, *words.parameters, *words.states],
        "key_in": words.tensors("k", plan.keys),
        "value_in": words.tensors("v", plan.values),
        "k_in": words.tensors("k", [*plan.keys, *plan.bodies]),
        "v_in": words.tensors("v", [*plan.values, *plan.bodies]),
        "reads": [r.name for r in plan.reads],
    }


def _sizes_lines(words: Words, names: dict[str, list[str]], adjoints: int) -> list[str]:
    k, v, count = names["k_in"][0], names["v_in"][0], len(words.plan.states)
    groups = range(len(words.plan.decays))
    return [
        f"    B, T, H, K = {k}.shape",
        f"    V = {v}.shape[-1]",
        f"    N = {words.states[0]}.shape[0]",
        f"    dtype, device = {k}.dtype, {k}.device",
        "    OT, precision = _operands(dtype)",
        "    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32",
        "    common = {'OT': OT, 'PRECISION': precision, 'PACKED': offsets is not None}",
        *(f"    sums_{d} = torch.empty((B, T, H), dtype=torch.float32, device=device)" for d in groups),
        f"    bounds = _windows(T, {adjoints * count} * B * H * K * V * kept.itemsize // 16, {5 - 2 * adjoints})",
        "    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:]))",
        "    most = N * -(-longest // 16) if offsets is None else longest // 16 + N  # chunks of a window",
    ]


def _window_lines(words: Words, names: dict[str, list[str]], store: bool) -> list[str]:
    """Tables, decay sums and states of one window, at 8 spaces."""
    border = [*names["key_in"], *names["value_in"], *words.sums, *(f"{s}_start" for s in names["states"]), "border"]
    border += [f"{s}_end" for s in names["states"]]
    lines = [
        "inside, spans, bases, NT, chunks = _window(T, low, high, offsets, N)",
        "place = (T, low, high, NT, H)",
        *(f"_sums(decay_{d}, sums_{d}, spans, T, low, high, NT, chunks)" for d in range(len(words.plan.decays))),
        "BK, BV = _tile(K, 32), _tile(V, 64)",
        "_states_kernel[(triton.cdiv(V, BV), triton.cdiv(K, BK), N * H)](",
        f"    {', '.join(border)}, inside, bases, *place,",
        f"    K=K, V=V, BK=BK, BV=BV, STORE={store}, num_warps=4, num_stages=3, **common,",
        ")",
    ]
    return [" " * 8 + line for line in lines]


def _forward(words: Words) -> str:
    n, plan = _lists(words), words.plan
    reads, count = n["reads"], len(plan.states)
    lines = [f"def _ratio_forward({', '.join(n['all'])}, scale, offsets, variance):"]
    lines.append('    """Reads of every token and final states."""')
    lines += _sizes_lines(words, n, 1)
    for j, r in enumerate(reads):
        kind = "dtype" if _direct(plan, j) else "torch.float32"
        shape = "(B, T, H, V)" if j < plan.output_reads else "(B, T, H, V) if variance else (0,)"
        lines.append(f"    {r} = torch.empty({shape}, dtype={kind}, device=device)")
    lines += [f"    {s}_end = {s}" for s in n["states"]]
    lines += [
        f"    border = torch.empty(most * H * {count} * V * K, dtype=kept, device=device)",
        "    for low, high in zip(bounds[:-1], bounds[1:]):",
        *(f"        {s}_start, {s}_end = {s}_end, torch.empty_like({s})" for s in n["states"]),
        *_window_lines(words, n, True),
        "        BK, BV, warps, stages, registers = _forward_tiles(K, V, dtype)",
        "        _reads_kernel[(chunks, H)](",
        f"            {', '.join([*n['k_in'], *n['v_in'], *words.sums, *n['parameters'], 'border', *reads])}, spans,",
        "            scale, *place, K=K, V=V, BK=BK, BV=BV, FAST=_fast(border), VARIANCE=variance,",
        "            num_warps=warps, num_stages=stages, **_registers(border, registers), **common,",
        "        )",
        f"    return {', '.join([*reads, *(f'{s}_end' for s in n['states'])])}",
    ]
    return "\n".join(lines) + "\n"


def _direct(plan: RatioPlan, read: int) -> bool:
    return plan.output is None if read < plan.output_reads else plan.direct_variance


def _backward(words: Words) -> str:
    n, plan = _lists(words), words.plan
    reads, count, states = n["reads"], len(plan.states), n["states"]
    groups = range(len(plan.decays))
    given = [*(f"d_{r}" for r in reads), *(f"d_{s}_end" for s in states)]
    lines = [f"def _ratio_backward({', '.join([*n['all'], *given])}, scale, offsets, variance):"]
    lines.append('    """Gradients of tensors, log decays, parameters and initial states."""')
    lines += _sizes_lines(words, n, 2)
    lines += [f"    d_{x}_out = torch.empty_like({x})" for x in (*n["k_in"], *n["v_in"])]
    lines += [f"    d_decay_{d} = torch.empty((B, T, H), dtype=torch.float32, device=device)" for d in groups]
    lines += [f"    d_{p} = torch.zeros(H, dtype=torch.float32, device=device)" for p in n["parameters"]]
    fresh = "torch.empty({}, dtype=torch.float32, device=device)"
    lines += [
        f"    border = torch.empty(most * H * {count} * V * K, dtype=kept, device=device)",
        "    adjoints = torch.empty_like(border)",
        *(f"    d_{x}_part = {fresh.format('most * 16 * H * K')}" for x in n["k_in"]),
        *(f"    d_{x}_part = {fresh.format('most * 16 * H * V')}" for x in n["v_in"]),
        *(f"    {a} = {fresh.format('most * 16 * H')}" for a in along(words)),
        "    ck, cv = _tile(K, 32), _tile(V, 16)  # tiles of the scan over chunks",
        "    parts = triton.cdiv(K, ck) * triton.cdiv(V, cv)",
        f"    products = {fresh.format(f'most * H * {len(plan.decays)} * parts')}",
        "    # states at the start of every window",
        *(f"    {s}_end, {s}_starts = {s}, []" for s in states),
        "    for low, high in zip(bounds[:-1], bounds[1:]):",
        *(f"        {s}_starts.append({s}_end)" for s in states),
        "        if high == T:",
        "            break",
        *(f"        {s}_start, {s}_end = {s}_end, torch.empty_like({s})" for s in states),
        *_window_lines(words, n, False),
        "    for low, high in zip(bounds[-2::-1], bounds[:0:-1]):",
        *(f"        {s}_start, {s}_end = {s}_starts.pop(), torch.empty_like({s})" for s in states),
        *_window_lines(words, n, True),
        *(f"        d_{p}_part = {fresh.format('(H, chunks)')}" for p in n["parameters"]),
        "        BK, BV, warps, stages, registers = _backward_tiles(K, V, dtype)",
        "        _local_kernel[(chunks, H)](",
    ]
    part = [f"d_{x}_part" for x in (*n["k_in"], *n["v_in"])]
    arguments = [*n["k_in"], *n["v_in"], *words.sums, *n["parameters"], "border", *(f"d_{r}" for r in reads), *part]
    arguments += [*along(words), *(f"d_{p}_part" for p in n["parameters"]), "adjoints", "spans"]
    lines += [
        f"            {', '.join(arguments)},",
        "            scale, *place, K=K, V=V, BK=BK, BV=BV, FAST=_fast(border), VARIANCE=variance,",
        "            num_warps=warps, num_stages=stages, **_registers(border, registers), **common,",
        "        )",
        *(f"        d_{p} += d_{p}_part.sum(1)" for p in n["parameters"]),
        *(f"        d_{s}_start = torch.empty_like({s})" for s in states),
        "        _carry_kernel[(parts, N * H)](",
        f"            border, adjoints, {', '.join([*words.sums, *(f'd_{s}_end' for s in states)])},",
        f"            {', '.join(f'd_{s}_start' for s in states)}, products, inside, bases, *place,",
        "            K=K, V=V, BK=ck, BV=cv, PACKED=offsets is not None, num_warps=1,",
        "        )",
        "        BK = max(16, triton.next_power_of_2(K))  # all key channels",
        "        BV = _tile(V, 64 if BK <= 64 else 32)",
        "        _settle_kernel[(chunks, H)](",
        f"            {', '.join([*n['key_in'], *n['value_in'], *words.sums, 'adjoints', 'products', *along(words), *part])},",
        f"            {', '.join(f'd_{x}_out' for x in (*n['k_in'], *n['v_in']))}, {', '.join(f'd_decay_{d}' for d in groups)}, spans,",
        "            *place, K=K, V=V, BK=BK, BV=BV, PARTS=parts, BP=triton.next_power_of_2(parts),",
        "            num_warps=4, num_stages=2, **common,",
        "        )",
        *(f"        d_{s}_end = d_{s}_start" for s in states),
    ]
    results = [f"d_{x}_out" for x in n["tensors"]] + [f"d_decay_{d}.to(decay_{d}.dtype)" for d in groups]
    results += [f"d_{p}.to({p}.dtype)" for p in n["parameters"]] + [f"d_{s}_start" for s in states]
    lines.append(f"    return {', '.join(results)}")
    return "\n".join(lines) + "\n"


def _operators(words: Words) -> str:
    n, plan = _lists(words), words.plan
    reads = n["reads"]
    results = ", ".join(["Tensor"] * (len(reads) + len(plan.states)))
    grads = ", ".join(["Tensor"] * len(n["all"]))
    inputs = ", ".join(f"Tensor {x}" for x in n["all"])
    given = [*(f"d_{r}" for r in reads), *(f"d_{s}_end" for s in n["states"])]
    fakes = []
    for j in range(len(reads)):
        kind = "like.dtype" if _direct(plan, j) else "torch.float32"
        shape = "like.shape" if j < plan.output_reads else "like.shape if variance else (0,)"
        fakes.append(f"like.new_empty({shape}, dtype={kind})")
    v = n["all"].index(n["v_in"][0])
    k = n["all"].index(n["k_in"][0])
    first = len(n["all"]) - len(plan.states)
    return f"""
_ratio_op = torch.library.custom_op(
    f"{{_OPS}}::ratio", lambda *arguments: _ratio_forward(*arguments), mutates_args=(),
    schema="({inputs}, float scale, Tensor? offsets, bool variance) -> ({results})",
)
_ratio_backward_op = torch.library.custom_op(
    f"{{_OPS}}::ratio_backward", lambda *arguments: _ratio_backward(*arguments), mutates_args=(),
    schema="({inputs}, {", ".join(f"Tensor {g}" for g in given)}, float scale, Tensor? offsets, bool variance)"
    " -> ({grads})",
)


@_ratio_op.register_fake
def _ratio_fake(*arguments):
    *tensors, scale, offsets, variance = arguments
    like = tensors[{v}].new_empty(tensors[{v}].shape, dtype=tensors[{k}].dtype)
    return {", ".join(fakes)}, *(torch.empty_like(t) for t in tensors[{first}:])


@_ratio_backward_op.register_fake
def _ratio_backward_fake(*arguments):
    return tuple(torch.empty_like(t) for t in arguments[:{len(n["all"])}])


def _ratio_save(ctx, inputs, output):
    *tensors, ctx.scale, offsets, ctx.variance = inputs
    ctx.save_for_backward(*tensors, offsets)


def _ratio_gradient(ctx, *grads):
    *tensors, offsets = ctx.saved_tensors
    given = (g.contiguous() for g in grads)
    return (*_ratio_backward_op(*tensors, *given, ctx.scale, offsets, ctx.variance), None, None, None)


_ratio_op.register_autograd(_ratio_gradient, setup_context=_ratio_save)
"""


def _core(recurrence: Recurrence, words: Words) -> str:
    n, plan, names = _lists(words), words.plan, words.names
    every = [names[v.name] for v in (*recurrence.inputs, *recurrence.parameters)]
    every += [names[s.name] for s in recurrence.states]
    like = names[recurrence.inputs[0].name]
    lines = [f"def _chunk_triton_core({', '.join(every)}, scale, offsets, want_variance):"]
    lines.append(
        '    """States by matmuls over chunks of 16 tokens, reads element by element; all chunks in parallel."""'
    )
    lines += [
        f"    if {like}.dtype == torch.float64:  # no tensor cores for it",
        f"        return _reference_core({', '.join(every)}, scale, offsets, want_variance)",
        f"    size_k, size_v = _sizes({', '.join(every)})",
        f"    batch, steps, heads = {like}.shape[:3]",
    ]
    direct = [words.of(t) for t in plan.tensors if t.symbol == t.expr]
    kinds = [f"{x}.dtype" for x in direct] or [f"{like}.dtype"]
    kind = kinds[0]
    for other in kinds[1:]:
        kind = f"torch.promote_types({kind}, {other})"
    lines.append(f"    dtype = {kind}  # operands of the matmuls")
    aligned = {v.name: f"{names[v.name]}_" for v in (*recurrence.inputs, *recurrence.parameters)}
    table = recurrence.axes_table() | {r: "v" for r in plan.reads}
    show = _Printer({**aligned, "scale": "scale"}, table)
    made = [t for t in (*plan.tensors, *plan.decays) if t.symbol != t.expr]
    finish = [e for e in (plan.output, None if plan.direct_variance else plan.variance) if e is not None]
    used = {s for t in made for s in t.expr.free_symbols} | {s for e in finish for s in e.free_symbols}
    for v in (*recurrence.inputs, *recurrence.parameters):
        if v.symbol in used:
            lines.append(f"    {names[v.name]}_ = {names[v.name]}.float(){_ALIGN[v.axes]}")
    for t in made:
        lines.append(f"    {t.name} = {_made(t, like, show, table)}  # {t.expr}")

    def argument(t: Tensor, cast: str) -> str:
        return f"{words.of(t)}{cast}.contiguous()" if t.symbol == t.expr else f"{t.name}.contiguous()"

    arguments = [argument(t, ".to(dtype)") for t in plan.tensors] + [argument(t, "") for t in plan.decays]
    arguments += [f"{p}.contiguous()" for p in (*words.parameters, *n["states"])]
    ends = [f"{s}_end" for s in n["states"]]
    lines += [
        f"    {', '.join([*n['reads'], *ends])} = _ratio_op(",
        f"        {', '.join(arguments)}, scale, offsets, want_variance,",
        "    )",
    ]
    if plan.output is None:
        lines.append(f"    output = {n['reads'][0]}.to({like}.dtype)")
    else:
        lines += [f"    {r} = {r}[..., None, :]" for r in n["reads"][: plan.output_reads]]
        lines.append(f"    output = {_result(plan.output, show)}.to({like}.dtype)")
    lines.append("    variance = None")
    if plan.variance is not None:
        lines.append("    if want_variance:")
        if plan.direct_variance:
            lines.append(f"        variance = {n['reads'][plan.output_reads]}.to({like}.dtype)")
        else:
            second = n["reads"][plan.output_reads :]
            lines += [f"        {r} = {r}[..., None, :]" for r in second]
            if plan.output is None and plan.reads[0] in plan.variance.free_symbols:
                lines.append(f"        {n['reads'][0]} = {n['reads'][0]}[..., None, :]")
            lines.append(f"        variance = {_result(plan.variance, show)}.to({like}.dtype)")
    lines.append(f"    return output, variance, {', '.join(ends)}")
    return "\n".join(lines) + "\n"


def _made(t: Tensor, like: str, show: _Printer, table: dict[sympy.Symbol, Axes]) -> str:
    """A feature as ``[B, T, H, *axes]``."""
    sizes = f"batch, steps, heads, {'size_k' if 'k' in t.axes else 1}, {'size_v' if 'v' in t.axes else 1}"
    kind = ".to(dtype)" if t.axes else ""
    if not t.expr.free_symbols:
        return f"torch.full(({sizes}), {float(t.expr)!r}, device={like}.device){_STRIP[t.axes]}{kind}"
    assert axes_of(t.expr, table) in ("", t.axes)
    return f"({show(t.expr)}).expand({sizes}){_STRIP[t.axes]}{kind}"


def _result(expr: sympy.Expr, show: _Printer) -> str:
    return f"({show(expr)}).expand(batch, steps, heads, 1, size_v)[..., 0, :]"

"""The Triton section of class c: ratios (any elementwise read) of affine states with one decay per token.

A generated section has five kernels (:mod:`.ratio_forward`, :mod:`.ratio_backward`) and their launches. Heads are
taken in groups, so that the states at chunk starts and their adjoints, 2 bytes an element every 16 tokens in
bfloat16, never take more than ``BUDGET`` bytes.
"""

from __future__ import annotations

import builtins

import sympy

from dspace.emit.base import Section
from dspace.emit.naming import INTERNAL, Namer, internal_names
from dspace.emit.printers import TorchPrinter
from dspace.emit.triton import boundary, host
from dspace.emit.triton.ratio_backward import carry_kernel, local_kernel, settle_kernel
from dspace.emit.triton.ratio_forward import SLABS, reads_kernel, states_kernel
from dspace.emit.triton.ratio_text import HELPERS, Words
from dspace.math.functions import Softplus
from dspace.math.ir import Analysis, Axes, Recurrence, axes_of
from dspace.plan.ratio import RatioPlan, Tensor, ratio_plan

BUDGET = 128 * 2**20
"""Bytes of scratch for states and adjoints at chunk borders; more heads at a time than fit are not launched."""

_ALIGN: dict[Axes, str] = {"": "[..., None, None]", "k": "[..., :, None]", "v": "[..., None, :]", "kv": ""}
_STRIP: dict[Axes, str] = {"": "[..., 0, 0]", "k": "[..., 0]", "v": "[..., 0, :]"}
_RESERVED = frozenset(
    """raw i_c i_l i_h i_n i_v i_k i_e i_r o_c o_k o_v o_e o_p m_v m_k m_ck m_cv m_e m_out m_tile row live at at_l at_k
    at_v at_part causal whole part seen begin end base first block tile slab slot own pick product products chunks
    adjoints handed heads user last total until spans offsets bases parts total shift T NT H HEAD HEADS K V BK BV BE
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
    parts = [host.COMMON, host.TABLES, boundary.SPAN, boundary.DECAY_SUMS, HELPERS]
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
    return BK, 8, 4, 2, 128 if BK == 16 else 168 if BK == 32 else 0


def _backward_tiles(K, V, dtype):
    """The same for the kernel of local adjoints, whose slabs are a loop unless there is only one."""
    BK = 16 if K <= 16 else 64 if 32 < K <= 64 else 32
    if dtype != torch.bfloat16:
        return min(BK, 32), 8, 4, 1, 0
    return BK, 8, 4, 2, 0


def _heads_at_once(heads, bytes_a_head):
    """Heads of one launch: as many as the scratch budget of {BUDGET // 2**20} MiB holds."""
    return max(1, min(heads, {BUDGET} // max(1, bytes_a_head)))


def _sums(decay, spans, T, NT, chunks):
    """Sums of log decays inside chunks."""
    H = decay.shape[2]
    sums = torch.empty(decay.shape, dtype=torch.float32, device=decay.device)
    BW = _tile(H, 64)
    _decay_sums_kernel[(chunks, triton.cdiv(H, BW))](
        decay, sums, spans, T, NT, H, C=16, W=1, BW=BW, PACKED=spans is not None
    )
    return sums
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


def _sizes_lines(words: Words, names: dict[str, list[str]]) -> list[str]:
    k, v = names["k_in"][0], names["v_in"][0]
    return [
        f"    B, T, H, K = {k}.shape",
        f"    V = {v}.shape[-1]",
        f"    N = {words.states[0]}.shape[0]",
        f"    dtype = {k}.dtype",
        "    OT, precision = _operands(dtype)",
        "    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32",
        "    spans, bases, NT, chunks = _plan(T, offsets, N, 16)",
        '    common = {"OT": OT, "PRECISION": precision, "PACKED": offsets is not None}',
        *(f"    sums_{d} = _sums(decay_{d}, spans, T, NT, chunks)" for d in range(len(words.plan.decays))),
    ]


def _states_launch(words: Words, names: dict[str, list[str]], indent: int) -> list[str]:
    arguments = [*names["key_in"], *names["value_in"], *words.sums, *names["states"], "border"]
    arguments += [f"{s}_end" for s in names["states"]]
    lines = [
        "BK, BV = _tile(K, 32), _tile(V, 64)",
        "_states_kernel[(triton.cdiv(V, BV), triton.cdiv(K, BK), N * heads)](",
        f"    {', '.join(arguments)}, offsets, bases, T, NT, H, head, heads,",
        "    K=K, V=V, BK=BK, BV=BV, num_warps=4, num_stages=3, **common,",
        ")",
    ]
    return [" " * indent + line for line in lines]


def _forward(words: Words) -> str:
    n, plan = _lists(words), words.plan
    reads, count = n["reads"], len(plan.states)
    lines = [f"def _ratio_forward({', '.join(n['all'])}, scale, offsets, variance):"]
    lines.append('    """Reads of every token and final states."""')
    lines += _sizes_lines(words, n)
    for j, r in enumerate(reads):
        kind = "dtype" if _direct(plan, j) else "torch.float32"
        shape = "(B, T, H, V)" if j < plan.output_reads else "(B, T, H, V) if variance else (0,)"
        lines.append(f"    {r} = torch.empty({shape}, dtype={kind}, device={n['k_in'][0]}.device)")
    lines += [f"    {s}_end = torch.empty_like({s})" for s in n["states"]]
    lines += [
        f"    group = _heads_at_once(H, chunks * {count} * K * V * kept.itemsize)",
        f"    border = torch.empty(chunks * group * {count} * V * K, dtype=kept, device={n['k_in'][0]}.device)",
        "    for head in range(0, H, group):",
        "        heads = min(group, H - head)",
        *_states_launch(words, n, 8),
        "        BK, BV, warps, stages, registers = _forward_tiles(K, V, dtype)",
        "        _reads_kernel[(chunks, heads)](",
        f"            {', '.join([*n['k_in'], *n['v_in'], *words.sums, *n['parameters'], 'border', *reads])}, spans,",
        "            scale, T, NT, H, head, K=K, V=V, BK=BK, BV=BV, FAST=_fast(border), VARIANCE=variance,",
        "            num_warps=warps, num_stages=stages, **_registers(border, registers), **common,",
        "        )",
        f"    return {', '.join([*reads, *(f'{s}_end' for s in n['states'])])}",
    ]
    return "\n".join(lines) + "\n"


def _direct(plan: RatioPlan, read: int) -> bool:
    return plan.output is None if read < plan.output_reads else plan.direct_variance


def _backward(words: Words) -> str:
    n, plan = _lists(words), words.plan
    reads, count = n["reads"], len(plan.states)
    groups = range(len(plan.decays))
    device = f"device={n['k_in'][0]}.device"
    given = [*(f"d_{r}" for r in reads), *(f"d_{s}_end" for s in n["states"])]
    lines = [f"def _ratio_backward({', '.join([*n['all'], *given])}, scale, offsets, variance):"]
    lines.append('    """Gradients of tensors, log decays, parameters and initial states."""')
    lines += _sizes_lines(words, n)
    lines += [f"    d_{x}_out = torch.empty_like({x})" for x in (*n["k_in"], *n["v_in"])]
    lines += [f"    d_decay_{d} = torch.empty(sums_{d}.shape, dtype=torch.float32, {device})" for d in groups]
    lines += [f"    d_{s}_start = torch.empty_like({s})" for s in n["states"]]
    lines += [f"    {s}_end = torch.empty_like({s})" for s in n["states"]]
    lines += [f"    d_{p}_parts = []" for p in n["parameters"]]
    lines += [
        f"    group = _heads_at_once(H, 2 * chunks * {count} * K * V * kept.itemsize)",
        f"    border = torch.empty(chunks * group * {count} * V * K, dtype=kept, {device})",
        "    adjoints = torch.empty_like(border)",
        *(f"    d_{x}_part = torch.empty(B * T * group * K, dtype=torch.float32, {device})" for x in n["k_in"]),
        *(f"    d_{x}_part = torch.empty(B * T * group * V, dtype=torch.float32, {device})" for x in n["v_in"]),
        *(f"    along_{d} = torch.empty(B * T * group, dtype=torch.float32, {device})" for d in groups),
    ]
    if plan.exclusive:
        lines += [f"    wrote_{d} = torch.empty(B * T * group, dtype=torch.float32, {device})" for d in groups]
    BE = 512
    lines += [
        f"    parts = triton.cdiv(K * V, {BE})",
        f"    products = torch.empty(chunks * group * {len(plan.decays)} * parts, dtype=torch.float32, {device})",
        "    for head in range(0, H, group):",
        "        heads = min(group, H - head)",
        *(f"        d_{p}_part = torch.empty((chunks, heads), dtype=torch.float32, {device})" for p in n["parameters"]),
        *_states_launch(words, n, 8),
        "        BK, BV, warps, stages, registers = _backward_tiles(K, V, dtype)",
        "        _local_kernel[(chunks, heads)](",
    ]
    part = [f"d_{x}_part" for x in (*n["k_in"], *n["v_in"])]
    along = [f"along_{d}" for d in groups] + ([f"wrote_{d}" for d in groups] if plan.exclusive else [])
    arguments = [*n["k_in"], *n["v_in"], *words.sums, *n["parameters"], "border", *(f"d_{r}" for r in reads), *part]
    arguments += [*along, *(f"d_{p}_part" for p in n["parameters"]), "adjoints", "spans"]
    lines += [
        f"            {', '.join(arguments)},",
        "            scale, T, NT, H, head, K=K, V=V, BK=BK, BV=BV, FAST=_fast(border), VARIANCE=variance,",
        "            num_warps=warps, num_stages=stages, **_registers(border, registers), **common,",
        "        )",
        *(f"        d_{p}_parts.append(d_{p}_part.sum(0))" for p in n["parameters"]),
        "        _carry_kernel[(parts, N * heads)](",
        f"            border, adjoints, {', '.join([*words.sums, *(f'd_{s}_end' for s in n['states'])])},",
        f"            {', '.join(f'd_{s}_start' for s in n['states'])}, products, offsets, bases, T, NT, H, head, heads,",
        f"            K=K, V=V, BE={BE}, PACKED=offsets is not None, num_warps=4,",
        "        )",
        "        BK, BV = _tile(K, 32), _tile(V, 64)",
        "        _settle_kernel[(chunks, heads)](",
        f"            {', '.join([*n['key_in'], *n['value_in'], *words.sums, 'adjoints', 'products', *along, *part])},",
        f"            {', '.join(f'd_{x}_out' for x in (*n['k_in'], *n['v_in']))}, {', '.join(f'd_decay_{d}' for d in groups)}, spans,",
        "            T, NT, H, head, K=K, V=V, BK=BK, BV=BV, PARTS=parts, BP=triton.next_power_of_2(parts),",
        "            num_warps=4, num_stages=2, **common,",
        "        )",
    ]
    results = [f"d_{x}_out" for x in n["tensors"]] + [f"d_decay_{d}.to(decay_{d}.dtype)" for d in groups]
    results += [f"torch.cat(d_{p}_parts).to({p}.dtype)" for p in n["parameters"]] + [
        f"d_{s}_start" for s in n["states"]
    ]
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
    every = [names[v.name] for v in (*recurrence.inputs, *recurrence.parameters, *recurrence.states)]
    like = names[recurrence.inputs[0].name]
    plain = {v.symbol: v for v in recurrence.inputs}
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
    direct = [names[t.expr.name] for t in plan.tensors if t.expr in plain]
    kinds = [f"{x}.dtype" for x in direct] or [f"{like}.dtype"]
    kind = kinds[0]
    for other in kinds[1:]:
        kind = f"torch.promote_types({kind}, {other})"
    lines.append(f"    dtype = {kind}  # operands of the matmuls")
    aligned = {v.name: f"{names[v.name]}_" for v in (*recurrence.inputs, *recurrence.parameters)}
    table = recurrence.axes_table() | {r: "v" for r in plan.reads}
    show = _Printer({**aligned, "scale": "scale"}, table)
    made = [t for t in (*plan.tensors, *plan.decays) if t.expr not in plain]
    finish = [e for e in (plan.output, None if plan.direct_variance else plan.variance) if e is not None]
    used = {s for t in made for s in t.expr.free_symbols} | {s for e in finish for s in e.free_symbols}
    for v in (*recurrence.inputs, *recurrence.parameters):
        if v.symbol in used:
            lines.append(f"    {names[v.name]}_ = {names[v.name]}.float(){_ALIGN[v.axes]}")
    for t in made:
        lines.append(f"    {t.name} = {_made(t, like, show, table)}  # {t.expr}")

    def argument(t: Tensor, cast: str) -> str:
        return f"{words.of(t)}{cast}.contiguous()" if t.expr in plain else f"{t.name}.contiguous()"

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

"""The Triton section of class c: ratios (any elementwise read) of affine states with one decay per token.

A generated section has six kernels (:mod:`.ratio_forward`, :mod:`.ratio_backward`, :mod:`.ratio_settle`) and
their launches (:mod:`.ratio_host`).
"""

from __future__ import annotations

import builtins

import sympy

from dspace.emit.base import LEAN, Section
from dspace.emit.naming import INTERNAL, KernelNamer, internal_names
from dspace.emit.printers import TorchPrinter
from dspace.emit.triton import launching
from dspace.emit.triton.fragments import TILES
from dspace.emit.triton.ratio_backward import local_kernel
from dspace.emit.triton.ratio_forward import reads_kernel, states_kernel
from dspace.emit.triton.ratio_host import backward, config, forward, lists, operators
from dspace.emit.triton.ratio_settle import carry_kernel, settle_kernel
from dspace.emit.triton.ratio_text import HELPERS, Words
from dspace.math.functions import Softplus
from dspace.math.ir import Analysis, Axes, Recurrence, axes_of
from dspace.plan.ratio import Tensor, ratio_plan

_ALIGN: dict[Axes, str] = {"": "[..., None, None]", "k": "[..., :, None]", "v": "[..., None, :]", "kv": ""}
_STRIP: dict[Axes, str] = {"": "[..., 0, 0]", "k": "[..., 0]", "v": "[..., 0, :]"}
_RESERVED = frozenset(
    """along at base batch before begin bounds change channel channel_t chunks adjoints column column_8 dtype end half inside
    lane_row last left like live live_column live_row many middle offsets operand own part parts place pointers product products
    reads results row side slot slots spans tile token triton tl until user values whole zero zeros
    ahead arguments bases border bytes_a_token common decay device grads here inputs start sums tensors
    given high keep kept longest low most precision registers slabs unroll variance warps
    B T NT H LOW HIGH ROWS STORE K V I N BK BV BE BP NK NV OT PRECISION PACKED PARTS FAST VARIANCE SLABS UNROLL AHEAD""".split()
)


class _Printer(TorchPrinter):
    functions = {**TorchPrinter.functions, Softplus: "-torch.nn.functional.logsigmoid(-({}))"}


def section(analysis: Analysis) -> Section | None:
    """The section, or None where :func:`dspace.plan.ratio.ratio_plan` has no plan."""
    plan = ratio_plan(analysis)
    if plan is None:
        return None
    recurrence = analysis.recurrence
    names = internal_names(recurrence, KernelNamer(INTERNAL | _RESERVED | set(dir(builtins)) | {"scale"}))
    names |= {t.name: t.name for t in (*plan.tensors, *plan.decays) if t.name not in names}
    words = Words(plan, names)
    kernels = [states_kernel, reads_kernel, local_kernel, carry_kernel, settle_kernel]
    parts = [launching.COMMON, launching.TABLES, launching.FAST, TILES, HELPERS]
    parts += [make(words) for make in kernels]
    parts += [config(), forward(words), backward(words), operators(words), _core(recurrence, words)]
    return Section(
        device="cuda",
        imports=launching.IMPORTS,
        code="\n\n".join(p.strip("\n") + "\n" for p in parts),
        chunk="_chunk_triton_core",
        recurrent=None,
    )


def _core(recurrence: Recurrence, words: Words) -> str:
    n, plan, names = lists(words), words.plan, words.names
    every = [names[v.name] for v in (*recurrence.inputs, *recurrence.parameters)]
    every += [names[s.name] for s in recurrence.states]
    like = names[recurrence.inputs[0].name]
    lines = [f"def _chunk_triton_core({', '.join(every)}, scale, offsets, want_variance, want_final=True):"]
    lines.append(
        '    """States by matmuls over chunks of 16 tokens, reads element by element; all chunks in parallel."""'
    )
    lines += [
        f"    if {like}.dtype == torch.float64:  # no tensor cores for it",
        f"        return _reference_core({', '.join(every)}, scale, offsets, want_variance)",
    ]
    sizes = len(lines)
    direct = [words.of(t) for t in plan.tensors if t.symbol == t.expr]
    lines.append(f"    dtype = {launching.common_type(direct or [like])}  # operands of the matmuls")
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
        return f"{cast.format(words.of(t))}.contiguous()" if t.symbol == t.expr else f"{t.name}.contiguous()"

    arguments = [argument(t, "_typed({}, dtype)") for t in plan.tensors] + [argument(t, "{}") for t in plan.decays]
    arguments += [f"{p}.contiguous()" for p in words.parameters]
    starts = f"*(s if s is None else s.contiguous() for s in ({', '.join(n['states'])},))"
    ends = [f"{s}_end" for s in n["states"]]
    lines += [
        f"    {', '.join([*n['reads'], *ends])} = _ratio(",
        f"        {', '.join([*arguments, starts])}, scale, offsets, want_variance, want_final,",
        "    )",
    ]
    if plan.output is None:
        lines.append(f"    output = _typed({n['reads'][0]}, {like}.dtype)")
    else:
        lines += [f"    {r} = {r}[..., None, :]" for r in n["reads"][: plan.output_reads]]
        lines.append(f"    output = {_result(plan.output, show)}.to({like}.dtype)")
    lines.append("    variance = None")
    if plan.variance is not None:
        lines.append("    if want_variance:")
        if plan.direct_variance:
            lines.append(f"        variance = _typed({n['reads'][plan.output_reads]}, {like}.dtype)")
        else:
            second = n["reads"][plan.output_reads :]
            lines += [f"        {r} = {r}[..., None, :]" for r in second]
            if plan.output is None and plan.reads[0] in plan.variance.free_symbols:
                lines.append(f"        {n['reads'][0]} = {n['reads'][0]}[..., None, :]")
            lines.append(f"        variance = {_result(plan.variance, show)}.to({like}.dtype)")
    lines.append(f"    return output, variance, {', '.join(ends)}")
    lines[sizes:sizes] = launching.sizes(every, like, lines[sizes:])
    return "\n".join(lines) + LEAN.format(core="_chunk_triton_core")


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

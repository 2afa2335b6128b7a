"""States with one axis or none, on a GPU: evaluated at every token by one kernel, with the features made of them.

A vector state (a normaliser, a precision over k) is a feature of every token, most often inside a query that it
divides. One program runs over the chunks of a (sequence, head, tile of channels): it loads the inputs, scans
``S_t = decay_t S_(t-1) + write_t`` in float32, evaluates the features that need it and stores only those. The
backward kernel runs over the chunks in reverse from the states kept at chunk borders; its expressions are the
symbolic derivatives of the same maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dspace.emit.triton.printer import TritonPrinter
from dspace.math.ir import AffineState, Axes, Variable


@dataclass(frozen=True)
class VectorGroup:
    """States on the same axis, and the features on that axis that are computed with them.

    ``raw`` states are also stored themselves, for expressions outside the kernel.
    """

    axes: Axes
    states: tuple[AffineState, ...]
    symbols: Mapping[str, sympy.Symbol]
    inputs: tuple[Variable, ...]
    parameters: tuple[Variable, ...]
    features: Mapping[str, sympy.Expr]

    @property
    def tag(self) -> str:
        return self.axes or "scalar"

    def write(self, state: AffineState) -> sympy.Expr:
        return sympy.Add(*(w.key * w.value for w in state.writes))


COMPOSE = '''
@_kernel
def _compose(decay_a, write_a, decay_b, write_b):
    """One step S -> decay S + write after another."""
    return decay_a * decay_b, write_a * decay_b + write_b
'''

BEFORE = '''
def _before(values, initial, offsets):
    """Values before each token, from those after it and the initial ones."""
    if offsets is None:
        return torch.cat([initial[:, None], values[:, :-1]], 1)
    rows = torch.arange(values.shape[1], device=values.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    first = (rows == offsets[sequence]).view(1, -1, *(1,) * (values.dim() - 2))
    return torch.where(first, initial[sequence][None], torch.cat([values[:, :1], values[:, :-1]], 1))
'''


def source(group: VectorGroup, names: Mapping[str, str]) -> str:
    """Kernels, launches, operators and the function ``_vector_TAG`` of one group."""
    return "\n".join([_forward_kernel(group, names), _backward_kernel(group, names), _host(group, names)])


def _statements(exprs: Mapping[str, sympy.Expr], names: Mapping[str, str], indent: str) -> list[str]:
    """Assignments of ``exprs``, with common subexpressions named first."""
    show = TritonPrinter(names)
    shared, results = sympy.cse(
        list(exprs.values()), symbols=(sympy.Symbol(f"c{i}", real=True) for i in range(10**6)), order="none"
    )
    lines = [f"{indent}{symbol.name} = {show(value)}" for symbol, value in shared]
    return lines + [f"{indent}{name} = {show(value)}" for name, value in zip(exprs, results, strict=True)]


def _load(group: VectorGroup, names: Mapping[str, str], variable: Variable, at: str, mask: str) -> str:
    name = names[variable.name]
    if variable.axes and group.axes:
        return f"tl.load({name}_in + ({at})[:, None] * W + o_w[None, :], mask=({mask})[:, None] & m_w[None, :], other=0.0).to(tl.float32)"
    return f"tl.load({name}_in + {at}, mask={mask}, other=0.0).to(tl.float32)[:, None]"


_HEAD = """    NW: tl.constexpr = (W + BW - 1) // BW
    pid = tl.program_id(0)
    i_w = pid % NW
    i_nh = (pid // NW).to(tl.int64)
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_w = i_w * BW + tl.arange(0, BW)
    m_w = o_w < W
    o_c = tl.arange(0, C)"""


def _parameters(group: VectorGroup, names: Mapping[str, str]) -> list[str]:
    lines = []
    for p in group.parameters:
        name = names[p.name]
        if p.axes and group.axes:
            lines.append(
                f"    {name} = tl.load({name}_in + i_h * W + o_w, mask=m_w, other=1.0).to(tl.float32)[None, :]"
            )
        else:
            lines.append(f"    {name} = tl.load({name}_in + i_h).to(tl.float32)")
    return lines


def _signature(kernel: str, arguments: list[str]) -> list[str]:
    return [
        '@_kernel(do_not_specialize=["T", "NT", "H", "TOTAL"])'
        if "TOTAL" in arguments
        else '@_kernel(do_not_specialize=["T", "NT", "H"])',
        f"def {kernel}(",
        f"    {', '.join(arguments)},",
        "    offsets, bases, scale, T, NT, H,",
        "    W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr, RAW: tl.constexpr, PACKED: tl.constexpr,",
        "):",
    ]


def _scan(group: VectorGroup, names: Mapping[str, str]) -> list[str]:
    """Lines that compute every state before (``S_before``) and after (``S``) each token of a chunk."""
    pad = " " * 8
    lines = [f"{pad}# the decays and writes of the token before, so that the scan ends just before each token"]
    earlier = {v.name: names[v.name] + "_" for v in group.inputs}
    shifted = {**names, **earlier}
    for v in group.inputs:
        lines.append(f"{pad}{earlier[v.name]} = " + _load(group, names, v, "at - H", "inner"))
    for s in group.states:
        name = names[s.name]
        lines += _statements({"decay": s.decay, "write": group.write(s)}, shifted, pad)
        lines += [
            f"{pad}decay = tl.where(inner[:, None] & m_w[None, :], decay, 1.0)",
            f"{pad}write = tl.where(inner[:, None] & m_w[None, :], write, 0.0)",
            f"{pad}decay, write = tl.associative_scan((decay, write), 0, _compose)",
            f"{pad}{name}_before = decay * {name}_start[None, :] + write",
        ]
    for v in group.inputs:
        lines.append(f"{pad}{names[v.name]} = " + _load(group, names, v, "at", "live"))
    for s in group.states:
        name = names[s.name]
        lines += _statements({f"{name}_decay": s.decay, "write": group.write(s)}, names, pad)
        lines += [
            f"{pad}{name}_decay = tl.where(live[:, None] & m_w[None, :], {name}_decay, 1.0)",
            f"{pad}{name} = {name}_decay * {name}_before + tl.where(live[:, None] & m_w[None, :], write, 0.0)",
        ]
    return lines


_CHUNK = """        row = begin + i_c * C + o_c
        live = row < end
        inner = (row <= end) & (o_c > 0)  # the token before is one of this chunk
        at = row * H + i_h
        wide = at[:, None] * W + o_w[None, :]
        m_cw = live[:, None] & m_w[None, :]"""


def _forward_kernel(group: VectorGroup, names: Mapping[str, str]) -> str:
    states = [names[s.name] for s in group.states]
    arguments = [f"{names[v.name]}_in" for v in (*group.inputs, *group.parameters)]
    arguments += [f"{s}_initial" for s in states] + [f"{f}_out" for f in group.features]
    arguments += [f"{s}_{part}" for part in ("out", "border", "final") for s in states]
    lines = _signature(f"_vector_{group.tag}_kernel", arguments)
    about = "; ".join(f"{s.name} = {s.decay} {s.name} + {group.write(s)}" for s in group.states)
    lines += [f'    """{about}; features of every token."""', _HEAD, *_parameters(group, names)]
    lines += [
        f"    {s}_start = tl.load({s}_initial + i_nh * W + o_w, mask=m_w, other=0.0).to(tl.float32)" for s in states
    ]
    lines += ["    for i_c in range(0, tl.cdiv(end - begin, C)):"]
    lines += [f"        tl.store({s}_border + ((base + i_c) * H + i_h) * W + o_w, {s}_start, mask=m_w)" for s in states]
    lines += [_CHUNK, *_scan(group, names)]
    lines += _statements({f"{f}_now": e for f, e in group.features.items()}, names, " " * 8)
    for f in group.features:
        lines.append(f"        tl.store({f}_out + wide, ({f}_now).to({f}_out.dtype.element_ty), mask=m_cw)")
    lines.append("        if RAW:")
    lines += [f"            tl.store({s}_out + wide, {s}, mask=m_cw)" for s in states]
    lines += [f"        {s}_start = tl.sum(tl.where(o_c[:, None] == C - 1, {s}, 0.0), axis=0)" for s in states]
    lines += [f"    tl.store({s}_final + i_nh * W + o_w, {s}_start, mask=m_w)" for s in states]
    return "\n".join(lines) + "\n"


def _backward_kernel(group: VectorGroup, names: Mapping[str, str]) -> str:
    states = [names[s.name] for s in group.states]
    leaves = (*group.inputs, *group.parameters)
    arguments = [f"{names[v.name]}_in" for v in leaves] + [f"{s}_border" for s in states]
    arguments += [f"d_{f}_in" for f in group.features] + [f"d_{s}_in" for s in states]
    arguments += [f"d_{s}_final" for s in states]
    arguments += [f"d_{names[v.name]}_out" for v in leaves] + [f"d_{s}_initial" for s in states] + ["TOTAL"]
    lines = _signature(f"_vector_{group.tag}_backward_kernel", arguments)
    lines += ['    """Cotangents of the inputs, parameters and initial states, chunks in reverse."""', _HEAD]
    lines += _parameters(group, names)
    lines += [f"    {s}_carry = tl.load(d_{s}_final + i_nh * W + o_w, mask=m_w, other=0.0)" for s in states]
    lines += [f"    sum_{names[p.name]} = tl.zeros([BW], dtype=tl.float32)" for p in group.parameters]
    lines += [
        "    chunks = tl.cdiv(end - begin, C)",
        "    for i_r in range(0, chunks):",
        "        i_c = chunks - 1 - i_r",
    ]
    lines += [_CHUNK]
    lines += [
        f"        {s}_start = tl.load({s}_border + ((base + i_c) * H + i_h) * W + o_w, mask=m_w, other=0.0)"
        for s in states
    ]
    lines += _scan(group, names)
    for f in group.features:
        lines.append(f"        d_{f} = tl.load(d_{f}_in + wide, mask=m_cw, other=0.0).to(tl.float32)")
    cotangent = {f: sympy.Symbol(f"d_{f}", real=True) for f in group.features}
    local = {**names, **{c.name: c.name for c in cotangent.values()}}
    through = {
        f"{names[s.name]}_in_token": sympy.Add(
            *(cotangent[f] * sympy.diff(e, group.symbols[s.name]) for f, e in group.features.items())
        )
        for s in group.states
    }
    lines += _statements(through, local, " " * 8)
    lines.append("        if RAW:")
    lines += [
        f"            {s}_in_token += tl.load(d_{s}_in + wide, mask=m_cw, other=0.0)"
        if group.features
        else f"            {s}_in_token = tl.load(d_{s}_in + wide, mask=m_cw, other=0.0)"
        for s in states
    ]
    lines += ["        # cotangent of a state = its own part of this token + next token's decay times next cotangent"]
    later = {v.name: names[v.name] + "_" for v in group.inputs}
    for v in group.inputs:
        lines.append(
            f"        {later[v.name]} = " + _load(group, names, v, "at + H", "live & (o_c < C - 1) & (row + 1 < end)")
        )
    for s in group.states:
        name = names[s.name]
        lines += _statements({"decay": s.decay}, {**names, **later}, " " * 8)
        lines += [
            "        follows = live & (o_c < C - 1) & (row + 1 < end)",
            "        decay = tl.where(follows[:, None] & m_w[None, :], decay, 1.0)",
            f"        write = tl.where(m_cw, {name}_in_token, 0.0)",
            "        decay, write = tl.associative_scan((decay, write), 0, _compose, reverse=True)",
            f"        d_{name} = decay * {name}_carry[None, :] + write",
            f"        {name}_carry = tl.sum(tl.where(o_c[:, None] == 0, {name}_decay * d_{name}, 0.0), axis=0)",
        ]
    gradients = {}
    for v in leaves:
        terms = [cotangent[f] * sympy.diff(e, v.symbol) for f, e in group.features.items()]
        for s in group.states:
            incoming = sympy.Symbol(f"d_{names[s.name]}", real=True)
            before = sympy.Symbol(f"{names[s.name]}_before", real=True)
            terms.append(incoming * (sympy.diff(group.write(s), v.symbol) + before * sympy.diff(s.decay, v.symbol)))
        gradients[f"grad_{names[v.name]}"] = sympy.Add(*terms)
    lines += _statements(gradients, local, " " * 8)
    for v in group.inputs:
        name = names[v.name]
        if v.axes and group.axes:
            lines.append(
                f"        tl.store(d_{name}_out + wide, tl.where(m_cw, grad_{name}, 0.0).to(d_{name}_out.dtype.element_ty), mask=m_cw)"
            )
        else:
            lines.append(
                f"        tl.store(d_{name}_out + i_w * TOTAL + at, tl.sum(tl.where(m_cw, grad_{name}, 0.0), axis=1), mask=live)"
            )
    for p in group.parameters:
        lines.append(f"        sum_{names[p.name]} += tl.sum(tl.where(m_cw, grad_{names[p.name]}, 0.0), axis=0)")
    lines += [
        f"    tl.store(d_{names[p.name]}_out + i_nh * W + o_w, sum_{names[p.name]}, mask=m_w)" for p in group.parameters
    ]
    lines += [f"    tl.store(d_{s}_initial + i_nh * W + o_w, {s}_carry, mask=m_w)" for s in states]
    return "\n".join(lines) + "\n"


def _host(group: VectorGroup, names: Mapping[str, str]) -> str:
    tag, counts = group.tag, (len(group.inputs), len(group.parameters), len(group.states), len(group.features))
    channels = tuple(bool(v.axes and group.axes) for v in (*group.inputs, *group.parameters))
    n_in, n_par, n_state, n_feature = counts
    tensors = n_in + n_par + n_state
    schema = ", ".join(f"Tensor t{i}" for i in range(tensors))
    grads = ", ".join(f"Tensor t{i}" for i in range(tensors + n_feature + 2 * n_state))
    result = ", ".join(["Tensor"] * (n_feature + 3 * n_state))
    returned = ", ".join(["Tensor"] * tensors)
    forward_launch = f"_vector_{tag}_kernel[grid]"
    backward_launch = f"_vector_{tag}_backward_kernel[grid]"
    width = f"tensors[{n_in + n_par}].shape[2]" if group.axes else "1"
    return f'''
_VECTOR_{tag} = {channels!r}  # which inputs and parameters have channels


def _vector_{tag}_tile(W):
    """Tokens a chunk, channels a program, warps."""
    return 64, 1 if W == 1 else _tile(W, 32), 4


def _vector_{tag}_forward(*arguments):
    *tensors, scale, raw, offsets, dtype = arguments
    inputs, parameters, initial = tensors[:{n_in}], tensors[{n_in}:{n_in + n_par}], tensors[{n_in + n_par}:]
    B, T, H = inputs[0].shape[:3] if inputs else dtype.shape[:3]
    W = {width}
    N = initial[0].shape[0]
    C, BW, warps = _vector_{tag}_tile(W)
    _, bases, NT, chunks = _plan(T, offsets, N, C)
    like = initial[0]
    channels = (W,) if {bool(group.axes)} else ()
    features = [torch.empty((B, T, H, *channels), dtype=dtype.dtype, device=like.device) for _ in range({n_feature})]
    values = [like.new_empty((B, T, H, *channels) if raw else (0,)) for _ in initial]
    borders = [like.new_empty((chunks, H, *channels)) for _ in initial]
    final = [torch.empty_like(t) for t in initial]
    grid = (_cdiv(W, BW) * N * H,)
    {forward_launch}(
        *inputs, *parameters, *initial, *features, *values, *borders, *final, offsets, bases, scale, T, NT, H,
        W=W, C=C, BW=BW, RAW=raw, PACKED=offsets is not None, num_warps=warps,
    )
    return (*features, *values, *borders, *final)


def _vector_{tag}_backward(*arguments):
    *tensors, scale, raw, offsets = arguments
    inputs, parameters = tensors[:{n_in}], tensors[{n_in}:{n_in + n_par}]
    borders = tensors[{n_in + n_par}:{tensors}]
    d_features = tensors[{tensors}:{tensors + n_feature}]
    d_values = tensors[{tensors + n_feature}:{tensors + n_feature + n_state}]
    d_final = tensors[{tensors + n_feature + n_state}:]
    like = d_final[0]
    N, H = like.shape[:2]
    B, T = inputs[0].shape[:2] if inputs else d_features[0].shape[:2]
    W = like.shape[2] if {bool(group.axes)} else 1
    C, BW, warps = _vector_{tag}_tile(W)
    _, bases, NT, chunks = _plan(T, offsets, N, C)
    tiles = _cdiv(W, BW)
    grid = (tiles * N * H,)
    d_inputs = [
        torch.empty_like(t) if wide else like.new_empty((tiles, B, T, H)) for t, wide in zip(inputs, _VECTOR_{tag})
    ]
    d_parameters = [like.new_empty((N, H, W)) for _ in parameters]
    d_initial = [torch.empty_like(t) for t in d_final]
    {backward_launch}(
        *inputs, *parameters, *borders, *d_features, *d_values, *d_final, *d_inputs, *d_parameters, *d_initial,
        B * T * H, offsets, bases, scale, T, NT, H,
        W=W, C=C, BW=BW, RAW=raw, PACKED=offsets is not None, num_warps=warps,
    )
    d_inputs = [d if wide else d.sum(0).to(t.dtype) for d, t, wide in zip(d_inputs, inputs, _VECTOR_{tag})]
    d_parameters = [
        d.sum(0).reshape(t.shape) if wide else d.sum((0, 2)) for d, t, wide in zip(d_parameters, parameters, _VECTOR_{tag}[{n_in}:])
    ]
    return (*d_inputs, *d_parameters, *d_initial)


_vector_{tag}_op = torch.library.custom_op(
    f"{{_OPS}}::vector_{tag}", _vector_{tag}_forward, mutates_args=(),
    schema="({schema}, float scale, bool raw, Tensor? offsets, Tensor dtype) -> ({result})",
)
_vector_{tag}_backward_op = torch.library.custom_op(
    f"{{_OPS}}::vector_{tag}_backward", _vector_{tag}_backward, mutates_args=(),
    schema="({grads}, float scale, bool raw, Tensor? offsets) -> ({returned})",
)


@_vector_{tag}_op.register_fake
def _vector_{tag}_fake(*arguments):
    *tensors, scale, raw, offsets, dtype = arguments
    initial = tensors[{n_in + n_par}:]
    B, T, H = dtype.shape[:3]
    chunks = -(-T // 64) * B if offsets is None else T // 64 + initial[0].shape[0]
    channels = initial[0].shape[2:]
    features = [dtype.new_empty((B, T, H, *channels)) for _ in range({n_feature})]
    values = [t.new_empty((B, T, H, *channels) if raw else (0,)) for t in initial]
    borders = [t.new_empty((chunks, H, *channels)) for t in initial]
    return (*features, *values, *borders, *(torch.empty_like(t) for t in initial))


@_vector_{tag}_backward_op.register_fake
def _vector_{tag}_backward_fake(*arguments):
    tensors = arguments[:-3]
    return (*(torch.empty_like(t) for t in tensors[:{n_in + n_par}]), *(torch.empty_like(t) for t in tensors[-{n_state}:]))


def _vector_{tag}_save(ctx, inputs, output):
    *tensors, scale, raw, offsets, dtype = inputs
    ctx.scale, ctx.raw = scale, raw
    ctx.save_for_backward(*tensors[:{n_in + n_par}], *output[{n_feature + n_state}:{n_feature + 2 * n_state}], offsets)


def _vector_{tag}_gradient(ctx, *cotangents):
    *saved, offsets = ctx.saved_tensors
    used = [*cotangents[:{n_feature + n_state}], *cotangents[{n_feature + 2 * n_state}:]]
    grads = _vector_{tag}_backward_op(*saved, *(t.contiguous() for t in used), ctx.scale, ctx.raw, offsets)
    return (*grads, None, None, None, None)


_vector_{tag}_op.register_autograd(_vector_{tag}_gradient, setup_context=_vector_{tag}_save)


class _vector_{tag}_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _vector_{tag}_forward(*arguments)
        _vector_{tag}_save(ctx, arguments, output)
        borders = output[{n_feature + n_state}:{n_feature + 2 * n_state}]
        ctx.mark_non_differentiable(*borders)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        *saved, offsets = ctx.saved_tensors
        used = [*cotangents[:{n_feature + n_state}], *cotangents[{n_feature + 2 * n_state}:]]
        grads = _vector_{tag}_backward(*saved, *(t.contiguous() for t in used), ctx.scale, ctx.raw, offsets)
        return (*grads, None, None, None, None)


def _vector_{tag}(*arguments):
    """Features of every token, values of the states (empty unless ``raw``), final states: each a list."""
    *tensors, scale, raw, offsets, like = arguments
    run = _vector_{tag}_op if torch.compiler.is_compiling() else _vector_{tag}_eager.apply
    out = run(*(t.contiguous() for t in tensors), scale, raw, offsets, like.detach())
    return out[:{n_feature}], out[{n_feature}:{n_feature + n_state}], out[{n_feature + 2 * n_state}:]
'''

"""Source of the host side of the class c kernels: tiles, windows of time, launches, custom operators.

Time is taken in windows, each a call of all kernels with the state (or adjoint) of its border carried from one to the
next, so that the states at chunk starts and their adjoints (2 bytes an element every 16 tokens in bfloat16) need not
exist for all tokens at once.
"""

from __future__ import annotations

from dspace.emit.triton.launching import MULTIPROCESSORS
from dspace.emit.triton.ratio_backward import k_gradient, kept_sums
from dspace.emit.triton.ratio_text import Words
from dspace.plan.ratio import RatioPlan

BUDGET = 104 * 2**20
"""Bytes that states and adjoints at chunk starts may take: sets the tokens of a window, never fewer than 256."""


def config() -> str:
    return f'''
def _registers(tensor, count):
    """Compile option: fewer registers a thread, for more blocks on a multiprocessor."""
    return {{"maxnreg": count}} if _fast(tensor) and count else {{}}


def _reads_proposals(K, V, dtype):
    """(I, N, unroll, registers, ahead) of the forward kernel: N slabs of 16 I key channels are in registers at once.

    ahead: what is loaded while others are at work: 0 nothing, 1 values, 2 values and states.
    """
    tiles = _cdiv(K, 16)
    if dtype != torch.bfloat16:  # twice the registers for operands
        return [(1, min(tiles, 2), 2, 0, 0)]
    N = _cdiv(tiles, _cdiv(tiles, 6))
    first = (1, N, 2, 168 if 1 < N < 4 else 0, 0 if N > 4 else 2 if N in (1, 4) else 1)
    others = [(1, 1, 2, 0, 0)] if N == 1 else [(1, N, 4, 168, 1)] if N < 4 else [(1, N, 2, 0, 1)]
    return [first, *others]


def _states_proposals(K, V, dtype):
    """(BK, BV, warps) of the kernel of the states at chunk starts."""
    BK, BV = _tile(K, 32), _tile(V, 64)
    first = BK, BV, 4 if BK * BV >= 2048 else 2
    return [first, (BK, _tile(V, 32), 2), (BK, _tile(V, 16), 1)] if dtype == torch.bfloat16 else [first]


def _local_proposals(K, V, dtype):
    """(I, N, registers) of the kernel of local adjoints, which has a program for each slab."""
    tiles = _cdiv(K, 16)
    if dtype != torch.bfloat16:
        return [(1, 1, 0)]
    one = (1, 1, 168)  # three warps at a time where two would have registers to spare
    return [(2, 1, 0), one] if tiles % 2 == 0 else [one, (1, 1, 0)]


def _settle_tiles(K, V):
    """(BK, BV, warps) of the kernel that settles gradients, which has all key channels at once."""
    BK = _tile(K, 256)
    BV = _tile(V, 64 if BK <= 64 else 32)
    return BK, BV, 1 if BK * BV <= 512 else 4


{MULTIPROCESSORS.strip()}


def _windows(T, bytes_a_token, share, warps_a_chunk, device):
    """Bounds of the windows of time; forward, ``share`` is 6 instead of 2: gradients do not yet take memory then.

    A window's warps fill the GPU, 8 to a multiprocessor, a whole number of times: else its last turn would idle.
    """
    size = max(256, share * {BUDGET} // 2 // max(1, bytes_a_token))
    size = -(-T // -(-T // size)) if T else size  # no short one at the end
    turn = 16 * 8 * _multiprocessors(device) // warps_a_chunk
    size = -(-(-(-size // turn) * turn if size > turn > 0 else size) // 16) * 16
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


def _shares(dtype, device, *sizes):
    """Tensors of these numbers of elements (multiples of 16, save the last one's) in one allocation."""
    return torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)


def _sums(decay, sums, spans, T, low, high, NT, chunks):
    """Sums of log decays inside the chunks of a window."""
    H = decay.shape[2]
    BH = _tile(H, 64)
    grid = (chunks, _cdiv(H, BH), 1)
    _launch(_sums_kernel, grid, (decay, sums, spans), (T, low, high, NT), (H,), BH=BH, PACKED=spans is not None)
'''


def lists(words: Words) -> dict[str, list[str]]:
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


_SLABS = [
    "    I_local, N_local, registers = _chosen(_local_proposals, 'ratio_local', K, V, dtype)",
    "    slabs_here = _cdiv(K, 16 * I_local * N_local)",
]


def _sizes_lines(words: Words, names: dict[str, list[str]], adjoints: int) -> list[str]:
    k, v, count = names["k_in"][0], names["v_in"][0], len(words.plan.states)
    return [
        f"    B, T, H, K = {k}.shape",
        f"    V = {v}.shape[-1]",
        "    N = B if offsets is None else offsets.shape[0] - 1",
        f"    dtype, device = {k}.dtype, {k}.device",
        "    OT, precision = _operands(dtype)",
        *(_SLABS if adjoints > 1 else []),
        "    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32",
        "    common = {'OT': OT, 'PRECISION': precision, 'PACKED': offsets is not None}",
        f"    bytes_a_token = {adjoints * count} * B * H * K * V * kept.itemsize // 16",
        f"    bounds = _windows(T, bytes_a_token, {6 if adjoints == 1 else 2}, {'slabs_here * ' if adjoints > 1 else ''}N * H, device)",
        *(["    if given:", "        bounds = [0, T]"] if adjoints > 1 else []),
        "    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:]))",
        "    most = N * -(-longest // 16) if offsets is None else longest // 16 + N  # chunks of a window",
    ]


_STATE = "torch.empty((N, H, K, V), dtype=torch.float32, device=device)"

TABLES = """
        inside, spans, bases, NT, chunks = _window(T, low, high, offsets, N)
        place = (T, low, high, NT)
""".strip("\n").splitlines()


def _states_lines(words: Words, names: dict[str, list[str]], store: bool, indent: int) -> list[str]:
    """Decay sums and states of one window."""
    border = [*names["key_in"], *names["value_in"], *words.sums]
    border += [*(f"{s}_start" for s in names["states"]), "border", *(f"{s}_end" for s in names["states"])]
    lines = [
        *(f"_sums(decay_{d}, sums_{d}, spans, T, low, high, NT, chunks)" for d in range(len(words.plan.decays))),
        "BK, BV, warps = _chosen(_states_proposals, 'ratio_states', K, V, dtype)",
        f"pointers = ({', '.join(border)}, inside, bases)",
        "_launch(",
        "    _states_kernel, (_cdiv(V, BV), _cdiv(K, BK), N * H), pointers, place, (H,),",
        f"    K=K, V=V, BK=BK, BV=BV, STORE={store}, num_warps=warps, num_stages=3, **common,",
        ")",
    ]
    return [" " * indent + line for line in lines]


def forward(words: Words) -> str:
    n, plan = lists(words), words.plan
    reads, count = n["reads"], len(plan.states)
    lines = [
        f"@_repeated\ndef _ratio_forward({', '.join(n['all'])}, scale, offsets, variance, want_final=True, keep=False):"
    ]
    lines.append(
        '    """Reads of every token, final states; with ``keep``, if it is small, what spares the backward pass work.\n\n'
        '    Initial states may be None: zero. Final states and the reads of the variance are None unless wanted.\n    """'
    )
    lines += _sizes_lines(words, n, 1)
    for j, r in enumerate(reads):
        kind = _kind(plan, j)
        wanted = "" if j < plan.output_reads else " if variance else None"
        lines.append(f"    {r} = torch.empty((B, T, H, V), dtype={kind}, device=device){wanted}")
    lines += [f"    {s}_end = {s}" for s in n["states"]]
    lines += [
        f"    border = torch.empty(most * H * {count} * V * K, dtype=kept, device=device)",
        *(f"    {s} = torch.empty((B, T, H), dtype=torch.float32, device=device)" for s in words.sums),
        "    for low, high in zip(bounds[:-1], bounds[1:]):",
        *(f"        {s}_start, {s}_end = {s}_end, None" for s in n["states"]),
        "        if want_final or high < T:",
        *(f"            {s}_end = {_STATE}" for s in n["states"]),
        *TABLES,
        *_states_lines(words, n, True, 8),
        "        I, slabs, unroll, registers, ahead = _chosen(_reads_proposals, 'ratio_reads', K, V, dtype)",
        f"        pointers = ({', '.join([*n['k_in'], *n['v_in'], *words.decays, *n['parameters'], 'border', *reads])}, spans)",
        "        _launch(",
        "            _reads_kernel, (chunks * H, 1, 1), pointers, (scale, *place), (H,),",
        "            K=K, V=V, I=I, N=slabs, UNROLL=unroll, AHEAD=ahead, FAST=_fast(border), VARIANCE=variance,",
        "            num_warps=1, num_stages=1, **_registers(border, registers), **common,",
        "        )",
        f"    keep = keep and len(bounds) == 2 and border.numel() <= {' + '.join(f'{x}.numel()' for x in n['tensors'])}",
        f"    kept = (border, {', '.join(words.sums)}) if keep else ()",
        f"    return {', '.join([*reads, *(f'{s}_end' for s in n['states'])])}, *kept",
    ]
    return "\n".join(lines) + "\n"


def _direct(plan: RatioPlan, read: int) -> bool:
    return plan.output is None if read < plan.output_reads else plan.direct_variance


def _kind(plan: RatioPlan, read: int) -> str:
    return "dtype" if _direct(plan, read) else "torch.float32"


def _shared(parts: list[tuple[str, str]], kind: str) -> list[str]:
    """Tensors in one allocation, each of which costs the host as much as a launch; (name, elements) of each."""
    return [
        f"    {', '.join(n for n, _ in parts)}{',' if len(parts) == 1 else ''} = _shares(",
        f"        {kind}, device, {', '.join(size for _, size in parts)}",
        "    )",
    ]


def backward(words: Words) -> str:
    n, plan = lists(words), words.plan
    reads, count, states = n["reads"], len(plan.states), n["states"]
    groups = range(len(plan.decays))
    given = [*(f"d_{r}" for r in reads), *(f"d_{s}_end" for s in states)]
    lines = [f"@_repeated\ndef _ratio_backward({', '.join([*n['all'], *given])}, scale, offsets, variance, *given):"]
    lines.append(
        '    """Gradients of tensors, log decays, parameters and initial states; ``given`` is what the forward pass kept."""'
    )
    lines += _sizes_lines(words, n, 2)
    keyed, parts = n["key_in"], kept_sums(words)
    fresh = "torch.empty({}, dtype=torch.float32, device=device)"
    first, second = reads[: plan.output_reads], reads[plan.output_reads :]
    zeros = {r: f"torch.zeros((B, T, H, V), dtype={_kind(plan, j)}, device=device)" for j, r in enumerate(reads)}
    for r in first:
        lines += [f"    if d_{r} is None:", f"        d_{r} = {zeros[r]}"]
    if second:
        lines.append(f"    variance = variance and not ({' and '.join(f'd_{r} is None' for r in second)})")
    for r in second if len(second) > 1 else ():
        lines += [f"    if variance and d_{r} is None:", f"        d_{r} = {zeros[r]}"]
    kept_parts = [(f"{x}_part", "slabs_here * most * 16 * H * V") for x in parts] + [("adjoints", "border.numel()")]
    full_parts = [(f"d_{x}_part", "most * 16 * H * K") for x in keyed]
    full_parts += [(f"direct_{d}_part", "slabs_here * most * 16 * H") for d in groups]
    full_parts += [("products", f"most * H * {len(plan.decays)} * parts")]
    lines += [f"    d_{x}_out = torch.empty_like({x})" for x in (*n["k_in"], *n["v_in"])]
    lines += [
        "    BE = 256 if K * V >= 256 else 32  # elements of a state that one warp scans",
        "    parts = _cdiv(K * V, BE)",
        *(f"    d_decay_{d} = torch.empty_like(decay_{d})" for d in groups),
        *(f"    d_{p} = {fresh.format('(H,)')}" for p in n["parameters"]),
        "    if given:",
        f"        border, {', '.join(words.sums)} = given",
        "    else:",
        f"        border = torch.empty(most * H * {count} * V * K, dtype=kept, device=device)",
        *(f"        {s} = torch.empty((B, T, H), dtype=torch.float32, device=device)" for s in words.sums),
        *_shared(kept_parts, "kept"),
        *_shared(full_parts, "torch.float32"),
        "    # states at the start of every window",
        *(f"    {s}_end, {s}_starts = {s}, []" for s in states),
        "    for low, high in zip(bounds[:-1], bounds[1:]):",
        *(f"        {s}_starts.append({s}_end if low == 0 else {s}_end.to(kept))" for s in states),
        "        if high == T:",
        "            break",
        *(f"        {s}_start, {s}_end = {s}_end, {_STATE}" for s in states),
        *TABLES,
        *_states_lines(words, n, False, 8),
        "    for low, high in zip(bounds[-2::-1], bounds[:0:-1]):",
        *(f"        {s}_start, {s}_end = {s}_starts.pop(), None" for s in states),
        *TABLES,
        "        if not given:",
        *_states_lines(words, n, True, 12),
        *(f"        d_{p}_part = {fresh.format('(slabs_here * chunks, H)')}" for p in n["parameters"]),
    ]
    arguments = [*n["k_in"], *n["v_in"], *words.decays, *n["parameters"], "border", *(f"d_{r}" for r in reads)]
    arguments += [*(k_gradient(words, x) for x in n["k_in"]), *(f"{x}_part" for x in parts)]
    arguments += [f"direct_{d}_part" for d in groups] + [f"d_{p}_part" for p in n["parameters"]] + ["adjoints", "spans"]
    summed = [name for p in n["parameters"] for name in (f"d_{p}_part", f"d_{p}")]
    settled = [*keyed, *n["value_in"], *words.sums, "adjoints", "products", *(f"{x}_part" for x in parts)]
    settled += [*(f"direct_{d}_part" for d in groups), *(f"d_{x}_part" for x in keyed)]
    settled += [f"d_{x}_out" for x in (*keyed, *n["v_in"])] + [f"d_decay_{d}" for d in groups]
    lines += [
        f"        pointers = ({', '.join(arguments)})",
        "        _launch(",
        "            _local_kernel, (chunks * H, slabs_here, 1), pointers, (scale, *place), (H,),",
        "            K=K, V=V, I=I_local, N=N_local, FAST=_fast(border), VARIANCE=variance,",
        "            num_warps=1, num_stages=1, **_registers(border, registers), **common,",
        "        )",
        *(f"        d_{s}_start = None if low == 0 and {s} is None else {_STATE}" for s in states),
        f"        pointers = (border, adjoints, {', '.join([*words.sums, *(f'd_{s}_end' for s in states)])},",
        f"                    {', '.join([*(f'd_{s}_start' for s in states), 'products', *summed])}, inside, bases)",
        "        _launch(",
        f"            _carry_kernel, (parts, N * H, 1), pointers, {'(*place, slabs_here * chunks)' if summed else 'place'}, (H,),",
        "            K=K, V=V, BE=BE, PACKED=offsets is not None, num_warps=1,",
        "        )",
        "        BK, BV, warps = _settle_tiles(K, V)",
        f"        pointers = ({', '.join(settled)}, spans)",
        "        _launch(",
        "            _settle_kernel, (chunks * H, 1, 1), pointers, place, (H,),",
        "            K=K, V=V, BK=BK, BV=BV, SLABS=slabs_here, PARTS=parts, BP=triton.next_power_of_2(parts),",
        "            num_warps=warps, num_stages=2, **common,",
        "        )",
        *(f"        d_{s}_end = d_{s}_start" for s in states),
    ]
    results = [f"d_{x}_out" for x in n["tensors"]] + [f"d_decay_{d}" for d in groups]
    results += [f"_typed(d_{p}, {p}.dtype)" for p in n["parameters"]] + [f"d_{s}_start" for s in states]
    lines.append(f"    return {', '.join(results)}")
    return "\n".join(lines) + "\n"


def operators(words: Words) -> str:
    n, plan = lists(words), words.plan
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
    second = "" if plan.direct_variance else ", dtype=torch.float32"
    v = n["all"].index(n["v_in"][0])
    k = n["all"].index(n["k_in"][0])
    first = len(n["all"]) - len(plan.states)
    count = len(reads) + len(plan.states)
    return f'''
def _ratio_whole(*arguments):
    """As an operator, which returns tensors: the reads of the variance are empty unless wanted."""
    like = arguments[{k}]
    return tuple([like.new_empty(0{second}) if r is None else r for r in _ratio_forward(*arguments)])


_ratio_op = torch.library.custom_op(
    f"{{_OPS}}::ratio", lambda *arguments: _ratio_whole(*arguments), mutates_args=(),
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
    given = [g.contiguous() for g in grads]
    return (*_ratio_backward_op(*tensors, *given, ctx.scale, offsets, ctx.variance), None, None, None)


_ratio_op.register_autograd(_ratio_gradient, setup_context=_ratio_save)


class _ratio_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.scale, offsets, ctx.variance, _ = arguments
        results = _ratio_forward(*arguments, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, offsets, *results[{count}:])
        return results[:{count}]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        tensors, offsets, kept = saved[:{len(n["all"])}], saved[{len(n["all"])}], saved[{len(n["all"]) + 1}:]
        given = [None if g is None else g.contiguous() for g in grads]
        return (*_ratio_backward(*tensors, *given, ctx.scale, offsets, ctx.variance, *kept), None, None, None, None)


def _ratio(*arguments):
    """Reads of every token and, if the last argument asks for them, final states, differentiable."""
    if torch.compiler.is_compiling():
        return _ratio_op(*arguments[:-1])
    if torch.is_grad_enabled() and any([isinstance(t, torch.Tensor) and t.requires_grad for t in arguments]):
        return _ratio_eager.apply(*arguments)
    return _ratio_forward(*arguments)
'''

"""The front door of a generated module: checks, defaults and dispatch, shared by its three public functions.

The text below is emitted as it stands into every module; what differs from variant to variant are the tables
that :func:`section` writes before it.
"""

from __future__ import annotations

import sympy

from dspace.emit.naming import internal_names, public_names
from dspace.emit.printers import TorchPrinter
from dspace.math.ir import Recurrence

_PARAMETER_ALIGN = {"": "[:, None, None]", "k": "[:, :, None]", "v": "[:, None, :]", "kv": ""}
_PARAMETER_SHAPE = {"": "heads", "k": "heads, size_k", "v": "heads, size_v", "kv": "heads, size_k, size_v"}
_PARAMETER_STRIP = {"": "[:, 0, 0]", "k": "[:, :, 0]", "v": "[:, 0, :]", "kv": ""}
_EXPAND = {"": "1, 1", "k": "size_k, 1", "v": "1, size_v", "kv": "size_k, size_v"}

FRONT_DOOR = '''
_known_offsets = None  # the last cu_seqlens of a GPU that was checked: reference, version, T, device, offsets


def _sizes(*tensors):
    """Number of key and value channels, read from the first tensor that has the axis (1 where none has it)."""
    size_k = size_v = 1
    for tensor, (_, axes) in zip(reversed(tensors), reversed(_INPUTS + _PARAMETERS + _STATES)):
        if tensor is None:
            continue
        if "v" in axes:
            size_v = tensor.shape[-1]
        if "k" in axes:
            size_k = tensor.shape[-2 if "v" in axes else -1]
    return size_k, size_v


def _shape_text(axes, *lead):
    return "[" + ", ".join([*lead, *axes.upper()]) + "]"


_seen = {}  # sizes of arguments that were checked, by their shapes, dtypes and devices


def _checked(inputs, parameters, states):
    """As ``_check``, without checking again what it let pass before: that takes longer than launching a kernel."""
    if torch.compiler.is_compiling():
        return _check(inputs, parameters, states)
    try:
        key = tuple([(t.shape, t.dtype, t.device) for t in (*inputs, *parameters, *states)])
        sizes = _seen.get(key)
    except (AttributeError, TypeError):  # not tensors
        return _check(inputs, parameters, states)
    if sizes is None:
        sizes = _check(inputs, parameters, states)
        if len(_seen) >= 256:
            _seen.clear()
        _seen[key] = sizes
    return sizes


def _check(inputs, parameters, states):
    """Device, kind and shape of every tensor; returns (B, T, HV, K, V, whether cores take the inputs as they are)."""
    first = inputs[0]
    groups = (("input", _INPUTS, inputs, 3), ("parameter", _PARAMETERS, parameters, 1), ("state", _STATES, states, 2))
    named = [
        (kind, name, axes, tensor, lead)
        for kind, table, tensors, lead in groups
        for (name, axes), tensor in zip(table, tensors)
    ]
    for kind, name, axes, tensor, lead in named:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{_NAME}: {kind} {name!r} must be a tensor, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{_NAME}: {kind} {name!r} must be floating point, not {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(
                f"{_NAME}: {kind} {name!r} is on {tensor.device} but {_INPUTS[0][0]!r} is on {first.device}"
            )
        if tensor.dim() != lead + len(axes):
            letters = ("B", "T", "H") if lead == 3 else ("H",) if lead == 1 else ("N", "HV")
            raise ValueError(
                f"{_NAME}: {kind} {name!r} must have shape {_shape_text(axes, *letters)}, got {tuple(tensor.shape)}"
            )
    batch, steps = first.shape[0], first.shape[1]
    heads = max([t.shape[2] for t in inputs] + [t.shape[0] for t in parameters])
    known = {}
    for kind, name, axes, tensor, lead in named:
        if kind == "input" and (tensor.shape[0] != batch or tensor.shape[1] != steps):
            raise ValueError(
                f"{_NAME}: input {name!r} has batch and time {tuple(tensor.shape[:2])}, "
                f"but {_INPUTS[0][0]!r} has {(batch, steps)}"
            )
        own = tensor.shape[lead - 1]
        if (kind == "state" and own != heads) or own < 1 or heads % own:
            raise ValueError(f"{_NAME}: {kind} {name!r} has {own} heads, which do not divide into {heads} heads")
        for axis, size in zip(axes, tensor.shape[lead:]):
            owner, seen = known.setdefault(axis, (name, size))
            if size != seen:
                raise ValueError(f"{_NAME}: {name!r} has {axis.upper()} = {size}, but {owner!r} has {seen}")
    plain = all(t.shape[2] == heads and t.dtype != torch.float64 for t in inputs)
    plain = plain and all(t.shape[0] == heads and t.dtype == torch.float32 for t in parameters)
    return batch, steps, heads, known.get("k", ("", 1))[1], known.get("v", ("", 1))[1], plain


def _offsets(cu_seqlens, batch, steps, device):
    """Checked int64 offsets of packed sequences, on ``device``.

    Values on a GPU are read, which waits for it, once for each tensor (and once more after a change in place): the
    other layers and steps that are given the same one cost nothing. Where they cannot be read (under torch.compile,
    while a CUDA graph is captured) they are brought into order on the device, so that no kernel leaves its tensors.
    """
    global _known_offsets
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_NAME}: cu_seqlens must be an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{_NAME}: cu_seqlens must have shape [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"{_NAME}: packed sequences (cu_seqlens) need batch size 1, got {batch}")
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        inner = cu_seqlens[1:-1].to(device=device, dtype=torch.int64).clamp(0, steps).cummax(0).values
        return torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), steps)))
    memory = cu_seqlens.is_cuda and not cu_seqlens.is_inference()
    if memory and _known_offsets is not None:
        reference, version, length, place, offsets = _known_offsets
        if reference() is cu_seqlens and (version, length, place) == (cu_seqlens._version, steps, device):
            return offsets
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != steps:
        raise ValueError(f"{_NAME}: cu_seqlens must run from 0 to T = {steps}, got {values[0]} to {values[-1]}")
    if any(a > b for a, b in zip(values[:-1], values[1:])):
        raise ValueError(f"{_NAME}: cu_seqlens must not decrease")
    offsets = cu_seqlens.to(device=device, dtype=torch.int64)
    if memory:
        _known_offsets = weakref.ref(cu_seqlens), cu_seqlens._version, steps, device, offsets
    return offsets


def _expand_heads(tensor, dim, heads):
    """Grouped heads: head h of ``heads`` reads head ``h // (heads / own)`` of the tensor."""
    return tensor if tensor.shape[dim] == heads else tensor.repeat_interleave(heads // tensor.shape[dim], dim)


def _call(form, inputs, parameters, scale, initial_state, output_final_state, output_variance, cu_seqlens):
    """Checks the arguments, fills in defaults, runs the core ``form`` for the device, shapes the results."""
    if output_variance and not _HAS_VARIANCE:
        raise ValueError(f"{_NAME} has no predictive variance: its spec states none, so output_variance must be False")
    given = ()
    if initial_state is not None:
        given = (initial_state,) if isinstance(initial_state, torch.Tensor) else tuple(initial_state)
        if len(given) != len(_STATES):
            raise ValueError(
                f"{_NAME}: initial_state must hold {len(_STATES)} tensor(s) "
                f"({', '.join(name for name, _ in _STATES)}), got {len(given)}"
            )
    batch, steps, heads, size_k, size_v, _ = sizes = _checked(inputs, parameters, given)
    first, device = inputs[0], inputs[0].device
    offsets, sequences = None, batch
    if cu_seqlens is not None:
        offsets = _offsets(cu_seqlens, batch, steps, device)
        sequences = offsets.shape[0] - 1
    for (name, _), state in zip(_STATES, given):
        if state.shape[0] != sequences:
            raise ValueError(
                f"{_NAME}: initial state {name!r} is for {state.shape[0]} sequence(s), but there are {sequences}"
            )
    scale = float(size_k) ** -0.5 if scale is None else float(scale)
    arguments = form, inputs, parameters, given, scale, offsets, output_variance, output_final_state, sizes
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):  # accumulation stays in float32 under autocast
            o, variance, final = _run(sequences, *arguments)
    else:
        o, variance, final = _run(sequences, *arguments)
    state = None
    if output_final_state:
        state = final[0] if len(_STATES) == 1 else tuple(final)
    if output_variance:
        return o, variance, state
    return o, state


def _transformed(inputs, parameters, states):
    """Whether the call is inside a transform of torch.func, or has forward-mode tangents: only plain PyTorch has those.

    But vmap alone repeats what runs on a CPU, an operator, and that is faster.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        others = [i for i in torch._C._functorch.get_interpreter_stack() if i.key() != torch._C._functorch.TransformType.Vmap]
        return bool(others) or inputs[0].is_cuda
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return any([forward_ad.unpack_dual(t).tangent is not None for t in (*inputs, *parameters, *states)])


def _run(sequences, form, inputs, parameters, given, scale, offsets, output_variance, output_final_state, sizes):
    """Heads expanded, dtypes settled, initial states filled in, and the core called; o and variance as the caller's."""
    batch, steps, heads, size_k, size_v, plain = sizes
    first, double, work = inputs[0], False, torch.float32
    if not plain:
        double = any([t.dtype == torch.float64 for t in inputs])
        work = torch.float64 if double else torch.float32
        inputs = [_expand_heads(t.to(work) if double else t, 2, heads) for t in inputs]
        parameters = [_expand_heads(t.to(work), 0, heads) for t in parameters]
    core, compiling = _CORES.get((first.device.type, form), _reference_core), torch.compiler.is_compiling()
    if not compiling and _transformed(inputs, parameters, given):
        core = _reference_core
    lean = not (double or compiling) and steps and batch and getattr(core, "lean", False)
    if given:
        states = [t.to(work) for t in given]
    elif lean and _STARTS_AT_ZERO:
        states = [None] * len(_STATES)
    else:
        states = _initial_states(*parameters, sequences, heads, size_k, size_v, work, first.device)
    if steps == 0 or batch == 0:
        nothing = sum([t[:0].sum().to(first.dtype) for t in (*inputs, *parameters)])  # whose gradients are zeros
        o = first.new_zeros(batch, steps, heads, size_v) + nothing
        return o, o, states
    arguments = *inputs, *parameters, *states, scale, offsets, output_variance
    if lean:
        arguments = *arguments, output_final_state
    if first.is_cuda and not compiling and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):  # Triton launches on the current device
            o, variance, *final = core(*arguments)
    else:
        o, variance, *final = core(*arguments)
    o = o if o.dtype == first.dtype else o.to(first.dtype)
    return o, None if variance is None else variance.to(first.dtype), final
'''


def initial_states(recurrence: Recurrence) -> str:
    """Source of ``_initial_states``: what a state is where the caller gives none, differentiable in the parameters."""
    names = internal_names(recurrence)
    table = recurrence.axes_table()
    show = TorchPrinter(names, table)
    used = {x for s in recurrence.states for x in s.init.free_symbols}
    arguments = [names[p.name] for p in recurrence.parameters]
    lines = [
        f"def _initial_states({', '.join([*arguments, 'sequences', 'heads', 'size_k', 'size_v', 'dtype', 'device'])}):",
        '    """States before the first token, ``[N, HV, *axes]``."""',
    ]
    for p in recurrence.parameters:
        if p.symbol in used and _PARAMETER_ALIGN[p.axes]:
            lines.append(f"    {names[p.name]} = {names[p.name]}{_PARAMETER_ALIGN[p.axes]}")
    results = []
    for s in recurrence.states:
        shape = f"sequences, {_PARAMETER_SHAPE[s.axes]}"
        if s.init.free_symbols:
            text = f"({show(s.init)}).expand(heads, {_EXPAND[s.axes]}){_PARAMETER_STRIP[s.axes]}.expand({shape})"
        elif s.init == 0:
            text = f"torch.zeros({shape}, dtype=dtype, device=device)"
        else:
            text = f"torch.full(({shape}), {float(s.init)!r}, dtype=dtype, device=device)"
        results.append(f"        {text},  # {s.name} = {sympy.sstr(s.init)}")
    lines += ["    return (", *results, "    )"] if results else ["    return ()"]
    return "\n".join(lines) + "\n"


def section(recurrence: Recurrence) -> str:
    """Source of the tables, ``_initial_states`` and the front door."""
    public = public_names(recurrence)
    tables = [
        f"_NAME = {recurrence.name!r}",
        f"_INPUTS = {tuple((public[v.name], v.axes) for v in recurrence.inputs)!r}",
        f"_PARAMETERS = {tuple((public[v.name], v.axes) for v in recurrence.parameters)!r}",
        f"_STATES = {tuple((s.name, s.axes) for s in recurrence.states)!r}",
        f"_HAS_VARIANCE = {recurrence.variance is not None}",
        f"_STARTS_AT_ZERO = {all(s.init == 0 for s in recurrence.states)}",
    ]
    return "\n".join(tables) + "\n\n\n" + initial_states(recurrence) + "\n" + FRONT_DOOR

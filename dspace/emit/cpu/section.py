"""The CPU section: native loops for the sequential plan, as PyTorch operators with their own backward."""

from __future__ import annotations

from dspace.emit.base import Section
from dspace.emit.cpu import loops
from dspace.emit.cpu.loops import Loop
from dspace.emit.cpu.running import RUNNING
from dspace.math.ir import Analysis

RUNTIME = '''
def _native_split(args, *counts):
    """``args`` cut into tuples of the given lengths, and the rest."""
    parts = []
    for count in counts:
        parts.append(args[:count])
        args = args[count:]
    return *parts, args


def _native_offsets(offsets, batch, steps):
    """Bounds of each sequence in the flat list of tokens, checked once more where the values are at hand."""
    if offsets is None:
        return numpy.arange(batch + 1, dtype=numpy.int64) * steps
    offsets = offsets.numpy()
    if offsets[0] != 0 or offsets[-1] != steps or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{_NAME}: cu_seqlens must rise from 0 to T = {steps}")
    return numpy.ascontiguousarray(offsets)


def _native_layout(inputs, states, every, offsets):
    """Sizes of everything a call allocates; also what the fake implementations need."""
    batch, steps, heads = inputs[0].shape[:3]
    sequences = batch if offsets is None else offsets.shape[0] - 1
    # Sequence n saves from slot begin // every + n on: room for all, whatever their lengths.
    segments = (batch * steps) // every + sequences if every else 0
    return batch, steps, heads, sequences, segments


def _native_flat(tensors, dtype):
    return [t.to(dtype).contiguous().flatten(0, 1) for t in tensors]


def _native_forward(*args):
    inputs, parameters, states, (offsets, scale, every, want_variance) = _native_split(
        args, len(_INPUTS), len(_PARAMETERS), len(_STATES)
    )
    batch, steps, heads, sequences, segments = _native_layout(inputs, states, every, offsets)
    sizes = _sizes(*inputs, *parameters, *states)
    dtype = _native_dtype(inputs)
    readouts = [inputs[0].new_empty(batch * steps, heads, sizes[1], dtype=dtype) for _ in range(2 if want_variance else 1)]
    states = [s.to(dtype, copy=True, memory_format=torch.contiguous_format) for s in states]
    saved = [s.new_empty(segments, heads, *s.shape[2:]) for s in states]
    loop, shapes = _NATIVE["forward", want_variance]
    tensors = [*_native_flat(inputs, dtype), *(p.to(dtype).contiguous() for p in parameters), *states, *readouts, *saved]
    bounds = _native_offsets(offsets, batch, steps)
    _native_run(loop, shapes, sequences * heads, heads, every, sizes, scale, bounds, tensors, 2**18)
    readouts = [r.view(batch, steps, heads, sizes[1]).to(inputs[0].dtype) for r in readouts]
    variance = readouts[1] if want_variance else inputs[0].new_empty(0)
    return readouts[0], variance, *states, *saved


def _native_backward(*args):
    count = len(_STATES)
    inputs, parameters, saved, (d_o, d_variance), d_states, (offsets, scale, every, want_variance) = _native_split(
        args, len(_INPUTS), len(_PARAMETERS), count, 2, count
    )
    batch, steps, heads, sequences, _ = _native_layout(inputs, d_states, every, offsets)
    sizes = _sizes(*inputs, *parameters, *saved)
    dtype = _native_dtype(inputs)
    flat = _native_flat(inputs, dtype)
    given = _native_flat([d_o, d_variance] if want_variance else [d_o], dtype)
    d_states = [d.to(dtype, copy=True, memory_format=torch.contiguous_format) for d in d_states]
    d_inputs = [torch.empty_like(x) for x in flat]
    d_parameters = [p.new_zeros(sequences, *p.shape, dtype=dtype) for p in parameters]
    loop, shapes = _NATIVE["backward", want_variance]
    tensors = [*flat, *(p.to(dtype).contiguous() for p in parameters), *saved, *given, *d_states]
    tensors += [*d_inputs, *d_parameters]
    bounds = _native_offsets(offsets, batch, steps)
    _native_run(loop, shapes, sequences * heads, heads, every, sizes, scale, bounds, tensors, 2**16)
    return (
        *(d.view(x.shape).to(x.dtype) for d, x in zip(d_inputs, inputs)),
        *(d.sum(0).to(p.dtype) for d, p in zip(d_parameters, parameters)),
        *d_states,
    )


def _native_dtype(tensors):
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def _native_schema(tensors, results):
    given = "".join(f"Tensor x{i}, " for i in range(tensors))
    made = ", ".join(["Tensor"] * results)
    return f"({given}Tensor? offsets, float scale, int every, bool want_variance) -> ({made})"


_native_forward_op = torch.library.custom_op(
    f"{_OPS}::native_forward",
    _native_forward,
    mutates_args=(),
    device_types="cpu",
    schema=_native_schema(len(_INPUTS + _PARAMETERS + _STATES), 2 + 2 * len(_STATES)),
)
_native_backward_op = torch.library.custom_op(
    f"{_OPS}::native_backward",
    _native_backward,
    mutates_args=(),
    device_types="cpu",
    schema=_native_schema(len(_INPUTS + _PARAMETERS) + 2 * len(_STATES) + 2, len(_INPUTS + _PARAMETERS + _STATES)),
)


@_native_forward_op.register_fake
def _native_forward_fake(*args):
    inputs, parameters, states, (offsets, _, every, want_variance) = _native_split(
        args, len(_INPUTS), len(_PARAMETERS), len(_STATES)
    )
    batch, steps, heads, _, segments = _native_layout(inputs, states, every, offsets)
    size_v = _sizes(*inputs, *parameters, *states)[1]
    o = inputs[0].new_empty(batch, steps, heads, size_v)
    variance = torch.empty_like(o) if want_variance else inputs[0].new_empty(0)
    dtype = _native_dtype(inputs)
    final = [s.new_empty(s.shape, dtype=dtype) for s in states]
    return o, variance, *final, *(s.new_empty(segments, heads, *s.shape[2:], dtype=dtype) for s in states)


@_native_backward_op.register_fake
def _native_backward_fake(*args):
    inputs, parameters, _, _, d_states, _ = _native_split(
        args, len(_INPUTS), len(_PARAMETERS), len(_STATES), 2, len(_STATES)
    )
    dtype = _native_dtype(inputs)
    return (
        *(x.new_empty(x.shape) for x in (*inputs, *parameters)),
        *(d.new_empty(d.shape, dtype=dtype) for d in d_states),
    )


def _native_save(ctx, inputs, output):
    count = len(_INPUTS) + len(_PARAMETERS)
    *_, offsets, ctx.scale, ctx.every, ctx.want_variance = inputs
    ctx.state_shapes = [s.shape for s in inputs[count : count + len(_STATES)]]
    ctx.o_shape = output[0].shape
    ctx.save_for_backward(*inputs[:count], *output[2 + len(_STATES) :], offsets)
    ctx.set_materialize_grads(False)


def _native_gradient(ctx, d_o, d_variance, *d_rest):
    *tensors, offsets = ctx.saved_tensors
    like = tensors[0]
    if d_o is None:
        d_o = like.new_zeros(ctx.o_shape)
    if not ctx.want_variance:
        d_variance = like.new_empty(0)
    elif d_variance is None:
        d_variance = like.new_zeros(ctx.o_shape)
    dtype = _native_dtype(tensors)
    d_states = [
        like.new_zeros(shape, dtype=dtype) if d is None else d for d, shape in zip(d_rest, ctx.state_shapes)
    ]
    gradients = _native_backward_op(
        *tensors, d_o, d_variance, *d_states, offsets, ctx.scale, ctx.every, ctx.want_variance
    )
    return *gradients, None, None, None, None


def _native_twice(ctx, *cotangents):
    raise NotImplementedError(f"{_NAME}: second derivatives go through reference_{_NAME}")


_native_forward_op.register_autograd(_native_gradient, setup_context=_native_save)
_native_backward_op.register_autograd(_native_twice)


def _native_plain(tensors):
    """Whether nobody watches this call: then the operator around the loop, a tenth of a short call, is left out.

    Watchers are compilers and tracers, profilers, dispatch modes, transforms such as vmap, tensors of another kind and
    those that are a lazy negation.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_neg() for t in tensors)


def _native_core(*args):
    """The sequential plan in compiled loops; the backward pass restarts from states saved every few tokens."""
    *tensors, scale, offsets, want_variance = args
    every, run = 0, _native_forward_op
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        every = 32 if tensors[0].shape[1] <= 1024 else 64
    elif _native_plain(tensors):
        run = _native_forward
    o, variance, *rest = run(*tensors, offsets, scale, every, want_variance)
    return (o, variance if want_variance else None, *rest[: len(_STATES)])
'''


def _table(made: dict[tuple[str, bool], Loop]) -> str:
    lines = ["# Loop, and the shapes of its scratch arrays, by (pass, with variance).", "_NATIVE = {"]
    for key, loop in made.items():
        shapes = ", ".join(f"({shape})" for shape in loop.scratch)
        lines += [f"    {key!r}: (", f"        {loop.name},", f"        lambda size_k, size_v, every: [{shapes}],"]
        lines += ["    ),"]
    return "\n".join([*lines, "}"]) + "\n"


def section(analysis: Analysis) -> Section:
    """The native loops of any recurrence, whatever its class."""
    r = analysis.recurrence
    made: dict[tuple[str, bool], Loop] = {}
    for variance in (False, True) if r.variance is not None else (False,):
        made["forward", variance] = loops.forward(r, variance)
        made["backward", variance] = loops.backward(r, analysis.adjoint, variance)
    code = [loop.code for loop in made.values()]
    return Section(
        device="cpu",
        imports=(
            "import ctypes",
            "import functools",
            "import itertools",
            "import math",
            "import os",
            "import queue",
            "import threading",
            "import numpy",
        ),
        code="\n\n".join([*code, _table(made), RUNNING.strip("\n") + "\n", RUNTIME.strip("\n") + "\n"]),
        chunk=None,
        recurrent="_native_core",
    )

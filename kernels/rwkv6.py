"""RWKV-6 (Finch): read before the write, with a bonus for the present token

References: arXiv:2404.05892

One token, per head (k: key channel, v: value channel):

    S[k,v] <- S*exp(w) + k*v    (sum of v k^T, decayed per key channel)
              starts at 0
    output[v] = scale*SumK(q*(S + k*u*v))    (read before the update)

Class b: affine, decay per channel.
every state is affine, its decay is per channel, its writes are products key * value, the readout is linear

Generated from the spec 'rwkv6', hash cc917fea3b34bc03, by emitter 4.
Made by a program: change the spec and generate again rather than editing this file.
"""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode
import copy
import ctypes
import functools
import importlib.util
import itertools
import math
import numpy
import operator
import os
import queue
import sys
import threading
import torch
import types
import weakref


SPEC = {'name': 'rwkv6',
 'title': 'RWKV-6 (Finch): read before the write, with a bonus for the present token',
 'references': ['arXiv:2404.05892'],
 'hash': 'cc917fea3b34bc035239cab62ff82cbfbff6cdab80860837457c1f9a8640e24c',
 'class': 'b',
 'class_name': 'affine, decay per channel',
 'reason': 'every state is affine, its decay is per channel, its writes are products key * value, the readout is '
           'linear',
 'inputs': [{'name': 'q', 'axes': 'k', 'domain': 'real', 'doc': 'receptance'},
            {'name': 'k', 'axes': 'k', 'domain': 'real', 'doc': ''},
            {'name': 'v', 'axes': 'v', 'domain': 'real', 'doc': ''},
            {'name': 'w', 'axes': 'k', 'domain': 'nonpositive', 'doc': 'log retention of each key channel'}],
 'parameters': [{'name': 'u', 'axes': 'k', 'domain': 'real', 'doc': 'bonus of the present token', 'init': 0.5}],
 'states': [{'name': 'S',
             'axes': 'kv',
             'domain': 'real',
             'doc': 'sum of v k^T, decayed per key channel',
             'init': '0'}],
 'variance': False,
 'read': 'before',
 'forms': {'cpu/chunk': '_cpu_chunk_core',
           'cpu/recurrent': '_native_core',
           'cuda/chunk': '_chunk_triton_core',
           'cuda/recurrent': '_recurrent_triton_core'},
 'double_backward': ['reference'],
 'layer': {'q': 'conv(linear)', 'k': 'conv(linear)', 'v': 'conv(linear)', 'w': '-exp(minimum(low_rank - 1, 2))'},
 'versions': {'emitter': '4'}}
_ID = 'dspace_rwkv6_cc917fea'  # by which its operators and tuned configurations are known


def _namespace(wish):
    """``wish`` for the PyTorch operators of this module, with a number behind if a copy that was loaded before has it.

    To register them by the same names again would take them away from that copy. All copies see ``sys.modules``.
    """
    name, copies = wish, 1
    while name in sys.modules:
        copies += 1
        name = f"{wish}_{copies}"
    sys.modules[name] = types.ModuleType(name, "Name of the PyTorch operators of a generated module.")
    return name


_OPS = _namespace(_ID)


_NAME = 'rwkv6'
_INPUTS = (('q', 'k'), ('k', 'k'), ('v', 'v'), ('w', 'k'))
_PARAMETERS = (('u', 'k'),)
_STATES = (('S', 'kv'),)
_HAS_VARIANCE = False
_STARTS_AT_ZERO = True


def _initial_states(u, sequences, heads, size_k, size_v, dtype, device):
    """States before the first token, ``[N, HV, *axes]``."""
    return (
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # S = 0
    )


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


def _reference_core(q, k, v, w, u, S, scale, offsets, want_variance):
    """Token by token, as the formulas of the header stand: slow, simple, the measure of the rest."""
    if offsets is not None:  # packed: one sequence after the other
        bounds = offsets.tolist()
        parts = [
            _reference_core(
                q[:, begin:end],
                k[:, begin:end],
                v[:, begin:end],
                w[:, begin:end],
                u,
                S[count : count + 1],
                scale, None, want_variance,
            )
            for count, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:]))
        ]
        output = torch.cat([rows[0] for rows in parts], 1)
        variance = torch.cat([rows[1] for rows in parts], 1) if want_variance else None
        return (output, variance, *(torch.cat([rows[2 + i] for rows in parts]) for i in range(1)))
    dtype = S.dtype
    like = q
    size_k, size_v = _sizes(q, k, v, w, u, S)
    # Every tensor is aligned to [sequence, head, K, V], with size 1 where it has no such axis.
    q_all = q.to(dtype)[..., :, None]
    k_all = k.to(dtype)[..., :, None]
    v_all = v.to(dtype)[..., None, :]
    w_all = w.to(dtype)[..., :, None]
    u = u[..., :, None]
    outputs, variances = [], []
    for token in range(like.shape[1]):
        q = q_all[:, token]
        k = k_all[:, token]
        v = v_all[:, token]
        w = w_all[:, token]
        outputs.append((scale * (q * (S + k * u * v)).sum(-2, keepdim=True)).expand(like.shape[0], like.shape[2], 1, size_v))
        S = S * torch.exp(w) + k * v
    empty = like.new_zeros(like.shape[0], 0, like.shape[2], size_v)
    output = torch.stack(outputs, 1)[:, :, :, 0].to(like.dtype) if outputs else empty
    variance = None
    if want_variance:
        variance = torch.stack(variances, 1)[:, :, :, 0].to(like.dtype) if variances else empty
    return output, variance, S


def _native_forward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, w, u, S, o, saved_S, sum0,
):
    """Tasks ``first`` to ``last`` forward, token by token."""
    real = q.dtype.type
    zero = real(0.0)
    one = real(1.0)
    scale = real(scale)
    count_k = real(size_k)
    count_v = real(size_v)
    for task in range(first, last):
        sequence = task // heads
        head = task - sequence * heads
        begin = offsets[sequence]
        end = offsets[sequence + 1]
        u_h = u[head]
        S_h = S[sequence, head]
        for token in range(begin, end):
            if every and (token - begin) % every == 0:  # the backward pass restarts from here
                segment = begin // every + sequence + (token - begin) // every
                for i in range(size_k):
                    for j in range(size_v):
                        saved_S[segment, head][i, j] = S_h[i, j]
            for i in range(0, size_k, 16):
                _native_fetch(q, token + 4, head, i)
                _native_fetch(k, token + 4, head, i)
                _native_fetch(w, token + 4, head, i)
            for j in range(0, size_v, 16):
                _native_fetch(v, token + 4, head, j)
                _native_fetch(o, token + 4, head, j)
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            w_t = w[token, head]
            o_t = o[token, head]
            for i in range(size_k):
                S_h_row = S_h[i]
                k_i = k_t[i]
                q_i = q_t[i]
                u_i = u_h[i]
                w_i = w_t[i]
                row0 = math.exp(w_i)
                for j in range(size_v):
                    S_ij = S_h_row[j]
                    x0 = k_i * v_t[j]
                    S_new = S_ij * row0 + x0
                    sum0[j] += q_i * (S_ij + u_i * x0)
                    S_h_row[j] = S_new
            for j in range(size_v):
                o_t[j] = scale * sum0[j]
                sum0[j] = zero


def _native_backward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, w, u, saved_S, d_output, d_S, d_q, d_k,
    d_v, d_w, d_u, past_S, col0, row0_, row1, row2, sum0, sum2, sum4, sum5,
):
    """Tasks ``first`` to ``last`` backward; ``d_STATE`` goes from final to initial in place."""
    real = q.dtype.type
    zero = real(0.0)
    one = real(1.0)
    scale = real(scale)
    count_k = real(size_k)
    count_v = real(size_v)
    for task in range(first, last):
        sequence = task // heads
        head = task - sequence * heads
        begin = offsets[sequence]
        end = offsets[sequence + 1]
        u_h = u[head]
        d_S_h = d_S[sequence, head]
        d_u_h = d_u[sequence, head]
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    past_S[0][i, j] = saved_S[segment, head][i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                w_t = w[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token + 4, head, i)
                    _native_fetch(k, token + 4, head, i)
                    _native_fetch(w, token + 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token + 4, head, j)
                S_h = past_S[token - start]
                S_next = past_S[token - start + 1]
                for i in range(size_k):
                    S_h_row = S_h[i]
                    k_i = k_t[i]
                    w_i = w_t[i]
                    row0 = math.exp(w_i)
                    S_next_row = S_next[i]
                    for j in range(size_v):
                        S_ij = S_h_row[j]
                        S_new = S_ij * row0 + k_i * v_t[j]
                        S_next_row[j] = S_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                w_t = w[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token - 4, head, i)
                    _native_fetch(k, token - 4, head, i)
                    _native_fetch(w, token - 4, head, i)
                    _native_fetch(d_q, token - 4, head, i)
                    _native_fetch(d_k, token - 4, head, i)
                    _native_fetch(d_w, token - 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token - 4, head, j)
                    _native_fetch(d_output, token - 4, head, j)
                    _native_fetch(d_v, token - 4, head, j)
                S_old = past_S[token - start]
                S_now = past_S[token - start + 1]
                d_output_t = d_output[token, head]
                d_q_t = d_q[token, head]
                d_k_t = d_k[token, head]
                d_v_t = d_v[token, head]
                d_w_t = d_w[token, head]
                sum1 = zero
                for j in range(size_v):
                    col0_j = d_output_t[j] * scale
                    col0[j] = col0_j
                    sum1 += d_output_t[j] * v_t[j]
                sum3 = zero
                for i in range(size_k):
                    row0__i = math.exp(w_t[i])
                    row0_[i] = row0__i
                    row1_i = k_t[i] * u_h[i]
                    row1[i] = row1_i
                    sum3 += q_t[i] * row1_i
                c0 = scale * sum1
                for i in range(size_k):
                    row2_i = c0 * q_t[i]
                    row2[i] = row2_i
                    d_u_h[i] += k_t[i] * row2_i
                for i in range(size_k):
                    S_old_row = S_old[i]
                    d_S_h_row = d_S_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0__i = row0_[i]
                    row1_i = row1[i]
                    sum0_i = zero
                    sum2_i = zero
                    sum5_i = zero
                    for j in range(size_v):
                        S_ij_ = S_old_row[j]
                        d_S_ij = d_S_h_row[j]
                        x0 = col0[j] * q_i + d_S_ij * row0__i
                        sum0_i += d_output_t[j] * (S_ij_ + row1_i * v_t[j])
                        sum2_i += d_S_ij * v_t[j]
                        sum4[j] += d_S_ij * k_i_
                        sum5_i += S_ij_ * d_S_ij
                        d_S_h_row[j] = x0
                    sum0[i] = sum0_i
                    sum2[i] = sum2_i
                    sum5[i] = sum5_i
                for j in range(size_v):
                    d_v_t[j] = col0[j] * sum3 + sum4[j]
                    sum4[j] = zero
                for i in range(size_k):
                    d_q_t[i] = scale * sum0[i]
                    d_k_t[i] = row2[i] * u_h[i] + sum2[i]
                    d_w_t[i] = row0_[i] * sum5[i]


# Loop, and the shapes of its scratch arrays, by (pass, with variance).
_NATIVE = {
    ('forward', False): (
        _native_forward_loop,
        lambda size_k, size_v, every: [(size_v,)],
    ),
    ('backward', False): (
        _native_backward_loop,
        lambda size_k, size_v, every: [(every + 1, size_k, size_v,), (size_v,), (size_k,), (size_k,), (size_k,), (size_k,), (size_k,), (size_v,), (size_k,)],
    ),
}


def _native_fetch(typing, array, token, head, place):
    """For numba: ask the memory for ``array[token, head, place]`` ahead of its use, without looking whether it exists.

    The rows of a head lie apart, and the processor does not foresee them: a loop would wait for memory every token.
    """
    from numba.core import cgutils, types

    def generate(context, builder, signature, values):
        view = context.make_array(signature.args[0])(context, builder, values[0])
        steps = map(builder.mul, cgutils.unpack_tuple(builder, view.strides), values[1:])
        pointer = cgutils.pointer_add(builder, view.data, functools.reduce(builder.add, steps), cgutils.voidptr_t)
        arguments = [cgutils.voidptr_t, *[cgutils.int32_t] * 3]
        made = cgutils.ir.FunctionType(cgutils.ir.VoidType(), arguments)
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", arguments[:1], made)
        builder.call(prefetch, [pointer, *(cgutils.int32_t(flag) for flag in (0, 3, 1))])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(array, token, head, place), generate


@functools.cache
def _native(loop):
    """``loop`` compiled by numba at its first call, and kept beside this file for the next process."""
    import numba
    import numba.extending
    from numba.core.compiler import CompilerBase, DefaultPassBuilder

    class DistinctArrays(CompilerBase):
        """The usual compiler, told that no two arrays overlap: without it the inner loops do not vectorise."""

        def define_pipelines(self):
            self.state.flags.noalias = True
            return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    options = {
        "nogil": True,
        "error_model": "numpy",  # a division by zero is inf or nan, as in PyTorch
        "fastmath": {"contract", "reassoc", "nsz", "arcp"},  # NaN and infinity keep their meaning
        "pipeline_class": DistinctArrays,
    }
    # Numba keeps the name of the function's module with the code and imports it by that name, whatever name the file
    # has in the next process: so the module is one that is always there.
    used = {name: globals()[name] for name in loop.__code__.co_names if name in globals()}
    plain = numba.config.DISABLE_JIT  # NUMBA_DISABLE_JIT=1: the loops run as Python, for a debugger
    used["_native_fetch"] = (lambda *_: None) if plain else numba.extending.intrinsic(_native_fetch)
    loop = types.FunctionType(loop.__code__, {**used, "__name__": "numpy"}, loop.__name__)
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # nowhere to keep the compiled code
        return numba.njit(**options)(loop)


@functools.cache
def _native_crew(process, threads):
    """The queue from which worker threads of this process take jobs (a fork has none of its parent's, hence the key)."""
    jobs = queue.SimpleQueue()

    def serve():
        while True:
            jobs.get()()

    for _ in range(threads):
        threading.Thread(target=serve, name="native", daemon=True).start()
    return jobs


@functools.cache
def _native_pool():
    """``GOMP_parallel`` of the OpenMP under PyTorch, or None where it is absent or must not be called.

    After a parallel operation of PyTorch the threads of this pool spin for milliseconds, on the cores that threads of
    our own would need: so they get our work. A forked process has the pool without its threads, and would wait for
    them for ever; Linux tells by the flag 0x40, and a system that tells nothing at all is not trusted.
    """
    try:
        with open("/proc/self/stat") as stat:
            flags = int(stat.read().rpartition(")")[2].split()[6])
        pool = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    if not flags or flags & 0x40:
        return None
    pool.argtypes, pool.restype = (_NativeShare, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return pool


_NativeShare = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_native_pool.cache_clear)


def _native_team(pool, threads, work):
    """``work()`` in this thread and the others of ``pool``; what it raises in any of them is raised here."""
    caller = threading.get_ident()
    errors = {caller: KeyboardInterrupt()}  # stays if Ctrl-C comes before the lines that would see it

    def share(_):
        try:
            work()
            errors[threading.get_ident()] = None
        except BaseException as error:
            errors[threading.get_ident()] = error

    pool(_NativeShare(share), None, threads, 0)
    for error in errors.values():
        if error is not None:
            raise error


def _native_scratch(shapes, dtype):
    """Zeroed arrays, each from a multiple of 64 bytes on as PyTorch's are: vectors across two lines of memory are slow."""
    counts = [math.prod(shape) for shape in shapes]
    starts = list(itertools.accumulate((-(-count // 16) * 16 for count in counts), initial=0))
    room = numpy.zeros(starts[-1] + 16, dtype)
    room = room[-room.ctypes.data % 64 // room.itemsize :]
    return [room[a : a + count].reshape(shape) for a, count, shape in zip(starts, counts, shapes)]


def _native_run(loop, shapes, tasks, heads, every, sizes, scale, offsets, tensors, grain):
    """Run ``loop`` over all tasks, on as many threads as PyTorch may use; every task writes its own rows only.

    Those of PyTorch's pool if the call needs them all, since a pool that is resized starts its threads again; else
    plain threads. Never numba's own: calls from several threads at once, or after a fork, end its process. A thread
    must have at least ``grain`` state elements times tokens to update, or waking it costs more than it saves.
    """
    loop = _native(loop)
    arrays = [t.detach().numpy() for t in tensors]
    updates = arrays[0].shape[0] * heads * sizes[0] * sizes[1]
    threads = max(1, min(torch.get_num_threads(), tasks, 1 + updates // (2 * grain)))
    shares = threads if threads == 1 else min(tasks, 4 * threads)
    turn = itertools.count()  # whoever is free takes the next share

    def work():
        scratch = _native_scratch(shapes(*sizes, every), arrays[0].dtype)
        while (i := next(turn)) < shares:
            first, last = tasks * i // shares, tasks * (i + 1) // shares
            loop(first, last, heads, every, *sizes, scale, offsets, *arrays, *scratch)

    if threads == 1:
        return work()
    if threads == torch.get_num_threads() and (pool := _native_pool()):
        return _native_team(pool, threads, work)
    helpers = [_NativeHelper(work) for _ in range(threads - 1)]
    for helper in helpers:
        _native_crew(os.getpid(), threads - 1).put(helper)
    work()
    for helper in helpers:
        helper.join()


class _NativeHelper:
    """``work`` as a job for another thread; a lighter future, since a short call takes little longer than one."""

    def __init__(self, work):
        self.work, self.error = work, None
        self.claim, self.running = threading.Lock(), threading.Lock()
        self.running.acquire()

    def __call__(self):
        if self.claim.acquire(blocking=False):
            try:
                self.work()
            except BaseException as error:
                self.error = error
            finally:
                self.running.release()

    def join(self):
        """Wait for the end of the work, unless it has not even started: then all is done already."""
        if not self.claim.acquire(blocking=False):
            self.running.acquire()
            if self.error is not None:
                raise self.error


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


# Blocks of the chunkwise form; this variant's decay is per channel.
_LOG_DECAY_FLOOR = -30.0


def _spread(x: torch.Tensor | float, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A feature as a tensor of ``shape``; it may be a constant, or lack tokens, heads or channels."""
    return torch.as_tensor(x, dtype=like.dtype, device=like.device).expand(shape)


def _packed_rows(offsets: torch.Tensor, tokens: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of packed tokens as a padded batch: ``(rows [N, L], places [tokens])``; ``rows == tokens`` is padding."""
    lengths = offsets[1:] - offsets[:-1]
    longest = int(lengths.max()) if lengths.numel() else 0
    padded = max(chunk, -(-longest // chunk) * chunk)
    steps = torch.arange(padded, device=offsets.device)
    rows = torch.where(steps[None] < lengths[:, None], offsets[:-1, None] + steps[None], tokens)
    token = torch.arange(tokens, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
    return rows, sequence * padded + token - offsets[sequence]


def _to_chunks(x: torch.Tensor, rows: torch.Tensor | None, chunk: int) -> torch.Tensor:
    """``[B, T, H, ...]`` to ``[N, H, NT, C, ...]``, padded with zeros."""
    if rows is None:
        padding = max(-x.shape[1] % chunk, chunk - x.shape[1])  # at least one chunk, even of nothing
        if padding:
            x = torch.cat([x, x.new_zeros(x.shape[0], padding, *x.shape[2:])], 1)
    else:
        x = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])[rows]
    return x.unflatten(1, (-1, chunk)).movedim(3, 1)


def _from_chunks(x: torch.Tensor, places: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """``[N, H, NT, C, ...]`` back to ``[B, T, H, ...]``."""
    x = x.movedim(1, 3).flatten(1, 2)
    return x[:, :tokens] if places is None else x.flatten(0, 1)[places][None]


def _shift(x: torch.Tensor, dim: int, first: float) -> torch.Tensor:
    """Move every entry one token later along ``dim``; the first token sees ``first``."""
    start = torch.full_like(x.narrow(dim, 0, 1), first)
    return torch.cat([start, x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _decays(g: torch.Tensor, exclusive: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decays inside a chunk from log decays ``g [N, H, NT, C]``, one number per token.

    Returns ``within [.., C, C]`` (from the write at s to the read at t, 0 where s is not yet seen), ``since [.., C]``
    (from the chunk's start to the read at t), ``until [.., C]`` (from the write at s to the chunk's end) and
    ``total [..]``. ``exclusive`` reads before the token's own decay and write.
    """
    size = g.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    later = g[..., :, None].expand(*g.shape, size).masked_fill(~lower.tril(-1), 0.0)
    within = later.cumsum(-2).masked_fill(~lower, -torch.inf).exp()
    since = g.cumsum(-1).exp()
    until, total = within[..., -1, :], since[..., -1]
    if exclusive:
        within, since = _shift(within, -2, 0.0), _shift(since, -1, 1.0)
    return within, since, until, total


def _channel_decays(g: torch.Tensor, exclusive: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`_decays` for log decays per channel, ``g [N, H, NT, C, X]``; ``within`` is ``[.., C, C, X]``."""
    size = g.shape[-2]
    total_log = g.clamp(min=_LOG_DECAY_FLOOR).cumsum(-2)
    read_log = _shift(total_log, -2, 0.0) if exclusive else total_log
    seen = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1 if exclusive else 0)[..., None]
    log_within = read_log[..., :, None, :] - total_log[..., None, :, :]
    within = log_within.masked_fill(~seen, -torch.inf).exp()
    until = (total_log[..., -1:, :] - total_log).exp()
    return within, read_log.exp(), until, total_log[..., -1, :].exp()


def _carry(local: torch.Tensor, total: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States at the start of each chunk ``[N, H, NT, ...]`` and after the last, from each chunk's own writes."""
    state, starts = start, []
    for c in range(local.shape[2]):
        starts.append(state)
        state = total[:, :, c] * state + local[:, :, c]
    return torch.stack(starts, 2), state


def _matrix_state(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    queries: list[torch.Tensor],
    g: torch.Tensor,
    start: torch.Tensor,
    channel: str,
    exclusive: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Reads ``sum_k S * query`` of ``S = decay * S + sum_j key_j value_j`` at every token, and the final state.

    Keys and queries ``[N, H, NT, C, K]``, values ``[N, H, NT, C, V]``, ``start [N, H, K, V]``. ``channel`` says where
    the decay lives: "" (``g [N, H, NT, C]``), "k" or "v" (one more axis). Reads are ``[N, H, NT, C, V]``.
    """
    within, since, until, total = (_channel_decays if channel else _decays)(g, exclusive)
    if channel == "k":
        total = total[..., :, None]
    elif channel == "v":
        total = total[..., None, :]
    else:
        since, until, total = since[..., None], until[..., None], total[..., None, None]
    local = torch.zeros_like(start)[:, :, None]
    for key, value in zip(keys, values, strict=True):
        if channel == "v":
            local = local + key.transpose(-1, -2) @ (value * until)
        else:
            local = local + (key * until).transpose(-1, -2) @ value
    starts, final = _carry(local, total, start)
    reads = []
    for query in queries:
        read = since * (query @ starts) if channel == "v" else (query * since) @ starts
        for key, value in zip(keys, values, strict=True):
            if channel == "k":
                read = read + torch.einsum("...tk,...sk,...tsk->...ts", query, key, within) @ value
            elif channel == "v":
                read = read + torch.einsum("...ts,...tsv,...sv->...tv", query @ key.transpose(-1, -2), within, value)
            else:
                read = read + (query @ key.transpose(-1, -2) * within) @ value
        reads.append(read)
    return reads, final


def _chunk_torch_core(q, k, v, w, u, S, scale, offsets, want_variance):
    """Chunks of 16 tokens: matmuls inside a chunk, states carried from chunk to chunk."""
    like, like_state = q, S
    dtype = like_state.dtype
    size_k, size_v = _sizes(q, k, v, w, u, S)
    batch, steps, heads = like.shape[:3]
    rows, places = (None, None) if offsets is None else _packed_rows(offsets, steps, 16)

    def feature(x, channels):
        return _spread(x, (batch, steps, heads, *channels), like_state)

    # Every input is aligned to [B, T, H, K, V], with size 1 where it has no such axis.
    q = q.to(dtype)[..., :, None]
    k = k.to(dtype)[..., :, None]
    v = v.to(dtype)[..., None, :]
    w = w.to(dtype)[..., :, None]
    u = u[..., :, None]

    # S_t = exp(w) * S_(t-1) + (k) * (v)
    reads, _final_S = _matrix_state(
        [_to_chunks(feature(k, (size_k, 1,))[..., 0], rows, 16)],
        [_to_chunks(feature(v, (1, size_v,))[..., 0, :], rows, 16)],
        [_to_chunks(feature(q, (size_k, 1,))[..., 0], rows, 16)],
        _to_chunks(feature(w, (size_k, 1,))[..., 0], rows, 16),
        S,
        "k",
        True,
    )
    (_read_read_0_S,) = reads

    # read_0 = sum_k S*q
    read_0 = _from_chunks(_read_read_0_S, places, steps)[..., None, :]
    output = feature(scale * (read_0 + v * (k * q * u).sum(-2, keepdim=True)), (1, size_v))[..., 0, :].to(like.dtype)
    variance = None
    return output, variance, _final_S


try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton here: the forms for the CPU work without it
    triton = tl = None


def _kernel(function=None, **options):
    """triton.jit, or nothing where there is no Triton."""
    if function is None:
        return lambda f: _kernel(f, **options)
    return function if triton is None else triton.jit(function, **options)


_TAPES = {}  # what calls of a kind do, by function and kind: see _repeated
_TAPE_MEMORY = 2**28  # bytes that a repeated call makes at most; with more, its kernels take longer than the host
_recording = threading.local()  # .tape: that of the call which this thread records, if any


class _Choices(dict):
    """Configurations in use. A change makes forget the calls that were recorded before."""

    def __setitem__(self, key, config):
        _TAPES.clear()
        super().__setitem__(key, config)

    def clear(self):
        _TAPES.clear()
        super().clear()


class _Tape(TorchDispatchMode):
    """While entered, writes down new tensors, operations of PyTorch, and what ``_launch`` launches."""

    def __init__(self, given, times):
        super().__init__()
        self.times = times
        self.given, self.device, self.made, self.steps, self.valid = given, given[0].device, [], [], True
        self.owners, self.alive = {}, []  # whose memory a view is in; all tensors, so that no two get the same id

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        self.alive += [*arguments, *results]
        by_value = torch.Tag.dynamic_output_shape in operation.tags or operation._schema.is_mutable
        elsewhere = not all([isinstance(t, torch.Tensor) and t.device == self.device for t in results])
        if by_value or elsewhere or _tensors(list((options or {}).values())):
            self.valid = False
        elif operation.is_view:
            self.owners.update({id(t): self.owners.get(id(arguments[0]), arguments[0]) for t in results})
        elif "empty" in operation.name() and results[0].is_contiguous():
            self.made += results
        else:
            self.steps.append((operation, arguments, options or {}, results))
        return result

    def launched(self, compiled, grid, pointers, rest):
        self.steps.append((_shortest(compiled, grid, len(pointers), rest), pointers))

    def written(self, returned):
        """What ``_repeat`` does: (new tensors, addresses within tensors, steps, what is returned); None if impossible.

        A place is the number of a tensor among those given, made, and results of operations, the bytes from there,
        and for a view its size and strides. What only kernels see shares the memory of one tensor.
        """
        operations = [step for step in self.steps if len(step) > 2]
        seen = [*_tensors(returned), *[t for step in operations for t in _tensors(step[1])]]
        seen = {id(self.owners.get(id(t), t)) for t in seen}
        shown = [t for t in self.made if id(t) in seen]
        shapes, places, hidden = [(tuple(t.shape), t.dtype) for t in shown], {}, 0
        for t in self.made:
            if id(t) not in seen:
                places[id(t)] = len(self.given) + len(shown), hidden
                hidden += (t.numel() * t.element_size() // 256 + 1) * 256  # an address of its own, if it is empty too
        shapes += [((hidden,), torch.uint8)] if hidden else []
        later = [None] if hidden else []  # the place of that one tensor
        numbered = [*self.given, *shown, *later, *[t for step in operations for t in step[3]]]
        places.update({id(t): (i, 0) for i, t in enumerate(numbered)})
        bytes_made = sum([t.numel() * t.element_size() for t in self.made])
        if not self.valid or bytes_made > self.times * _TAPE_MEMORY or len(operations) == len(self.steps):
            return None
        try:
            steps = [(step[0], self._placed(step[1], places), *step[2:3]) for step in self.steps]
            return self._addressed(shapes, steps, self._placed(returned, places))
        except KeyError:  # a tensor of which the tape does not know where it comes from
            return None

    def _addressed(self, shapes, steps, returned):
        """Launches with what takes their addresses out of a list: None, those within tensors, those of all tensors."""
        pointers = [p for step in steps if len(step) == 2 for p in step[1] if p is not None]
        within = sorted({p[:2] for p in pointers if p[1]})
        if any([number >= len(self.given) + len(shapes) for number, _ in within]):
            raise KeyError("within the result of an operation")
        entries = {pair: 1 + i for i, pair in enumerate(within)}

        def getter(pointers):
            at = [0 if p is None else entries[p[:2]] if p[1] else 1 + len(within) + p[0] for p in pointers]
            # of one entry it would give the entry, not a tuple
            return operator.itemgetter(*at) if len(at) > 1 else operator.itemgetter(slice(at[0], at[0] + 1))

        return shapes, within, [(s[0], getter(s[1])) if len(s) == 2 else s for s in steps], returned

    def _placed(self, x, places):
        """``x`` with the place of each tensor instead."""
        if isinstance(x, (tuple, list)):
            return [self._placed(y, places) for y in x]
        if not isinstance(x, torch.Tensor):
            return x
        owner = self.owners.get(id(x), x)
        (number, begin), shape = places[id(owner)], (x.size(), x.stride())
        begin += x.data_ptr() - owner.data_ptr()
        if x.data_ptr() == owner.data_ptr() and shape == (owner.size(), owner.stride()):
            shape = None, None
        elif x.dtype != owner.dtype:
            raise KeyError(x.dtype)
        return _Place((number, begin, *shape))


def _tensors(x):
    """All tensors in lists of lists."""
    if isinstance(x, (tuple, list)):
        return [t for y in x for t in _tensors(y)]
    return [x] if isinstance(x, torch.Tensor) else []


class _Place(tuple):
    """Which tensor of a call: see ``_Tape.written``."""


def _repeated(function, times=1):
    """``function``, of which calls of the same kind, from the third on, are a list of steps.

    It takes tensors, None, and what decides with their shapes, dtypes and alignment all that it does on the host:
    values of tensors do not. What it does is make tensors, launch kernels by ``_launch``, call PyTorch; a call in
    which anything else was seen is not repeated.

    ``times`` as much memory as others may make is allowed to a function that holds what it makes until it ends, as
    a list of steps does.
    """

    @functools.wraps(function)
    def call(*arguments):
        if getattr(_recording, "tape", None) is not None or _hooked():  # part of a call that is being recorded
            return function(*arguments)
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        kinds = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
        addresses = [t.data_ptr() for t in given]
        same = () if len(set(addresses)) == len(addresses) else map(addresses.index, addresses)  # a tensor given twice
        key = (function, given[0].device, *kinds, *[a % 16 for a in addresses], *same)
        tape = _TAPES.get(key, 0)
        if isinstance(tape, tuple):
            return _repeat(tape, given, addresses)
        if tape is None:
            return function(*arguments)
        if tape == 0:  # seen for the first time: lengths that never come again are not worth recording
            result = function(*arguments)
            if len(_TAPES) >= 256:
                _TAPES.clear()
            _TAPES[key] = 1
            return result
        _recording.tape = tape = _Tape(given, times)
        try:
            with tape:
                result = function(*arguments)
        finally:
            _recording.tape = None
        _TAPES[key] = tape.written(result)
        return result

    return call


def _repeat(tape, tensors, addresses):
    """The steps of a recorded call with other tensors of the same kind."""
    made, within, steps, returned = tape
    device = tensors[0].device
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in made]
    tensors += made
    addresses += [t.data_ptr() for t in made]
    addresses = [None, *[addresses[i] + begin for i, begin in within], *addresses]
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    for call, which, *options in steps:
        if not options:
            call(stream, which(addresses))
        else:
            results = call(*_at(which, tensors), **options[0])
            results = results if isinstance(results, (tuple, list)) else [results]
            tensors += results
            addresses += [t.data_ptr() for t in results]
    return tuple(_at(returned, tensors))


def _shortest(compiled, grid, count, rest):
    """``compiled[grid](*addresses, *rest)``, as a function of stream and addresses, without Triton's Python between.

    That is for the hooks of profilers and takes longer than the driver. What is called behind it is found by going
    through it once, with marks for stream and addresses and a launcher that only looks.
    """
    marks, calls = [object() for _ in range(count + 1)], []
    stream, addresses = marks[0], marks[1:]
    launcher = copy.copy(compiled.run)
    direct = getattr(launcher, "launch", None)
    own = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")  # with these a launch is not as the one before
    if direct is not None and not any([getattr(launcher, name, False) for name in own]):
        launcher.launch, copied = lambda *given: calls.append(given), copy.copy(compiled)
        try:
            copied._run, copied.launch_metadata = launcher, lambda *_: None
            copied[grid](*addresses, *rest, stream=stream)
        finally:
            copied.module = None  # which is the original's to unload
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    given = [None if any([x is hook for hook in hooks]) else x for call in calls for x in call]
    packed = bool(given) and isinstance(given[-1], tuple)  # newer Triton: what a kernel is given is one tuple
    last = list(given.pop()) if packed else given
    if len(calls) != 1 or not all([sum([x is mark for x in given + packed * last]) == 1 for mark in marks]):
        runner = compiled[grid]
        return lambda stream, addresses: runner(*addresses, *rest, stream=stream)
    first, at = last.index(marks[1]), given.index(stream)
    head, middle, tail = given[:at], given[at + 1 : None if packed else first], last[first + count :]
    if packed:
        return lambda stream, addresses: direct(*head, stream, *middle, (*addresses, *tail))
    return lambda stream, addresses: direct(*head, stream, *middle, *addresses, *tail)


def _hooked():
    """Whether a profiler wants to see every launch."""
    hooks = triton.knobs.runtime
    return any([getattr(h, "calls", h) for h in (hooks.launch_enter_hook, hooks.launch_exit_hook)])


def _at(place, tensors):
    """What is at a place, or at each of a list."""
    if isinstance(place, list):
        return [_at(x, tensors) for x in place]
    if not isinstance(place, _Place):
        return place
    number, begin, size, stride = place
    owner = tensors[number]
    if size is None:
        return owner
    return owner.as_strided(size, stride, owner.storage_offset() + begin // owner.element_size())


_COMPILED = {}  # kernels as Triton compiled them, and their constants in order, by all that they were compiled for


def _launch(kernel, grid, pointers, numbers, fixed, **constants):
    """``kernel[grid](*pointers, *numbers, *fixed, **constants)``.

    Triton finds out at each call what a kernel is compiled for, which takes longer than a small one runs. Here that is
    the key: types and alignment of ``pointers`` (tensors or None), ``fixed``, and constants. Kernels are not specialised
    on the values of ``numbers``. A compiled kernel gets addresses: of a tensor, Triton would ask the driver each time.
    """
    addresses = [None if p is None else p.data_ptr() for p in pointers]
    kinds = [None if p is None else p.dtype if a % 16 == 0 else (p.dtype,) for p, a in zip(pointers, addresses)]
    device = next(p.device for p in pointers if p is not None)
    key = (kernel.fn, device, fixed, max(numbers) >= 2**31, *kinds, *constants.values())
    found, tape = _COMPILED.get(key), getattr(_recording, "tape", None)
    if found is not None:
        rest = (*numbers, *fixed, *found[1])
        found[0][grid](*addresses, *rest)
        if tape is not None:
            tape.launched(found[0], grid, pointers, rest)
        return
    if tape is not None:  # not under the interpreter, and not where Triton has to be asked
        tape.valid = False
    compiled = kernel[grid](*pointers, *numbers, *fixed, **constants)
    # not under the interpreter, and not on AMD GPUs, where Triton looks at the sizes of tensors too
    if hasattr(compiled, "run") and torch.version.hip is None:
        _COMPILED[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]


_TUNED = {}  # what was measured to be the best on this GPU: "family sizes..." -> configuration, set from outside
_PROPOSALS = {}  # what there was to choose from, by key
_CONFIGS = _Choices()  # what is in use, by key


def _chosen(propose, *key):
    """The configuration for ``key``: the tuned one if it is among the proposals, else the first of them.

    The key holds what a kernel is compiled for, so never T: nothing is tuned, or compiled, again for another length.
    """
    config = _CONFIGS.get(key)
    if config is None:
        proposals = _PROPOSALS[key] = propose(*key[1:])
        tuned = _TUNED.get(" ".join(map(str, key)))
        config = _CONFIGS[key] = tuned if tuned in proposals else proposals[0]
    return config


def _plan(T, offsets, N, C):
    """Chunk table of a packed batch, made on the device without waiting for it; (spans, bases, NT, chunks)."""
    if offsets is None:
        NT = -(-T // C)
        return None, None, NT, N * NT
    counts = (offsets[1:] - offsets[:-1] + C - 1) // C
    ends = counts.cumsum(0)
    bases = ends - counts
    chunks = T // C + N
    index = torch.arange(chunks, device=offsets.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=N - 1)
    begin = offsets[sequence] + (index - bases[sequence]) * C
    end = torch.minimum(begin + C, offsets[sequence + 1])
    spans = torch.stack((begin, end), 1) * (index < ends[-1])[:, None]
    return spans.contiguous(), bases, 0, chunks


def _typed(tensor, dtype):
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # to asks more, and takes longer to do nothing


def _common(dtype, *others):
    """The type that holds what all of these do."""
    for other in others:
        dtype = dtype if other == dtype else torch.promote_types(dtype, other)
    return dtype


_EXACT = "ieee" if torch.version.hip else "tf32x3"  # how float32 is multiplied: AMD GPUs do not split it so


def _operands(dtype):
    """Operand type of the matmuls and how float32 ones are multiplied: half keeps its range by going through tf32."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "tf32" if dtype == torch.float16 else _EXACT


_KEPT = 2**25  # bytes: so much is kept for the backward pass, where launches cost more than memory


def _cdiv(size, tile):
    return -(-size // tile)  # Triton's own costs microseconds on the host


def _tile(size, most):
    return max(16, min(1 << (size - 1).bit_length(), most))


@_kernel
def _sequence(offsets, bases, i_n, T, NT, PACKED: tl.constexpr):
    """First token, end token and first chunk of sequence ``i_n``."""
    if PACKED:
        begin = tl.load(offsets + i_n).to(tl.int64)
        end = tl.load(offsets + i_n + 1).to(tl.int64)
        base = tl.load(bases + i_n).to(tl.int64)
    else:
        begin = i_n.to(tl.int64) * T
        end = begin + T
        base = i_n.to(tl.int64) * NT
    return begin, end, base


@_kernel
def _chunk(spans, i_c, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """First and end token of chunk ``i_c``; empty for the spare chunks of a packed batch."""
    if PACKED:
        begin = tl.load(spans + 2 * i_c).to(tl.int64)
        end = tl.load(spans + 2 * i_c + 1).to(tl.int64)
    else:
        sequence = (i_c // NT).to(tl.int64)
        begin = sequence * T + (i_c % NT).to(tl.int64) * C
        end = tl.minimum(begin + C, sequence * T + T)
    return begin, end


@_kernel(do_not_specialize=["T", "NT", "H"])
def _decay_sums_key_kernel(g, G, spans, T, NT, H, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr):
    """G[t] = sum of log decays from the start of t's chunk to t, float32; W values a head."""
    i_c = tl.program_id(0)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    row = begin + tl.arange(0, C)
    here = (row < end)[:, None] & (column < H * W)[None, :]
    at = row[:, None] * (H * W) + column[None, :]
    step = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
    # exp(-40) is nothing beside 1: a longer step would only cost the sums their digits.
    step = tl.minimum(tl.maximum(step, -40.0), 0.0)
    tl.store(G + at, tl.cumsum(step, axis=0), mask=here)


@_kernel
def _state_tile_key(
    k, v,
    G,
    initial, states, final, offsets, bases, i_nh, i_k, i_v, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """One tile of S at the start of every chunk: S' = exp(G_C) S + sum_s exp(G_C - G_s) k_s v_s."""
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k = o_k < K
    m_v = o_v < V
    tile = o_k[:, None] * V + o_v[None, :]
    m_tile = m_k[:, None] & m_v[None, :]
    if initial is None:  # zero
        S = tl.zeros([BK, BV], tl.float32)
    else:
        S = tl.load(initial + i_nh * K * V + tile, mask=m_tile, other=0.0).to(tl.float32)
    for i_c in range(0, tl.cdiv(end - begin, C)):
        tl.store(states + ((base + i_c) * H + i_h) * K * V + tile, S.to(states.dtype.element_ty), mask=m_tile)
        row = begin + i_c * C + o_c
        live = row < end
        last = tl.minimum(begin + i_c * C + C, end) - 1
        at = row * H + i_h
        key = tl.load(k + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        value = tl.load(v + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
        whole = tl.load(G + (last * H + i_h) * K + o_k, mask=m_k, other=0.0)
        part = tl.load(G + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        weight = tl.exp(tl.minimum(whole[:, None] - part, 0.0))
        S = S * tl.exp(whole)[:, None]
        key = key * weight
        S = tl.dot(key.to(OT), value.to(OT), S, input_precision=PRECISION)
    if final is not None:
        tl.store(final + i_nh * K * V + tile, S, mask=m_tile)


@_kernel(do_not_specialize=["T", "NT", "H"])
def _states_key_kernel(
    k, v,
    G,
    initial, states, final, offsets, bases, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """S at the start of every chunk, one tile a program."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    _state_tile_key(
        k, v,
        G,
        initial, states, final, offsets, bases, (pid // (NV * NK)).to(tl.int64), (pid // NV) % NK, pid % NV, T, NT, H,
        K, V, C, BK, BV, OT, PRECISION, PACKED,
    )


@_kernel(do_not_specialize=["T", "NT", "H"])
def _cotangents_key_kernel(
    q, d_o,
    G,
    d_final, d_states, d_initial, offsets, bases, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dS at the end of every chunk, backwards: dS' = exp(G_C) dS + scale sum_t exp(Gq_t) q_t do_t."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_nh = (pid // (NV * NK)).to(tl.int64)
    i_h = i_nh % H
    begin, end, base = _sequence(offsets, bases, i_nh // H, T, NT, PACKED)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, C)
    m_k = o_k < K
    m_v = o_v < V
    tile = o_k[:, None] * V + o_v[None, :]
    m_tile = m_k[:, None] & m_v[None, :]
    if d_final is None:  # zero
        dS = tl.zeros([BK, BV], tl.float32)
    else:
        dS = tl.load(d_final + i_nh * K * V + tile, mask=m_tile, other=0.0).to(tl.float32)
    chunks = tl.cdiv(end - begin, C)
    for i_r in range(0, chunks):
        i_c = chunks - 1 - i_r
        tl.store(d_states + ((base + i_c) * H + i_h) * K * V + tile, dS.to(d_states.dtype.element_ty), mask=m_tile)
        row = begin + i_c * C + o_c
        live = row < end
        last = tl.minimum(begin + i_c * C + C, end) - 1
        at = row * H + i_h
        query = tl.load(q + at[None, :] * K + o_k[:, None], mask=m_k[:, None] & live[None, :], other=0.0)
        d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
        seen = live & (o_c > 0)
        at_q = at - H
        whole = tl.load(G + (last * H + i_h) * K + o_k, mask=m_k, other=0.0)
        part = tl.load(G + at_q[None, :] * K + o_k[:, None], mask=m_k[:, None] & seen[None, :], other=0.0)
        weight = tl.exp(part) * scale
        dS = dS * tl.exp(whole)[:, None]
        query = query * weight
        dS = tl.dot(query.to(OT), d_out.to(OT), dS, input_precision=PRECISION)
    if d_initial is not None:
        tl.store(d_initial + i_nh * K * V + tile, dS, mask=m_tile)


@_kernel(do_not_specialize=["T", "NT", "H"])
def _scores_key_kernel(
    q, k, G, A, spans, T, NT, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """A[t, s] = sum_k q_t exp(Gq_t - G_s) k_s, one chunk a program."""
    NK: tl.constexpr = (K + BK - 1) // BK
    LEVELS: tl.constexpr = tl.constexpr(C.bit_length() - 1)
    pid = tl.program_id(0)
    i_h = pid % H
    begin, end = _chunk(spans, pid // H, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        apart = o_c[:, None] ^ o_c[None, :]
        scores = tl.zeros([C, C], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_ck = live[:, None] & (o_k < K)[None, :]
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            seen = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & (o_c > 0)[:, None], other=0.0)
            for level in range(LEVELS):
                block = 1 << level
                upper = ((o_c & block) != 0)[:, None]
                middle = begin + (o_c | (2 * block - 1)) - block
                at_mid = tl.minimum(middle, end - 1) * H + i_h
                mid = tl.load(G + at_mid[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
                weight = tl.exp(tl.minimum(tl.where(upper, seen - mid, mid - part), 0.0))
                own = tl.where(upper, query, key).to(tl.float32)
                scaled = (own * weight).to(OT)
                pairs = (apart >= block) & (apart < 2 * block) & (o_c[:, None] > o_c[None, :])
                scores += tl.where(pairs, tl.dot(scaled, tl.trans(scaled), input_precision=PRECISION), 0.0)
        tl.store(A + at[:, None] * C + o_c[None, :], scores.to(A.dtype.element_ty), mask=live[:, None])


@_kernel(do_not_specialize=["T", "NT", "H"])
def _outputs_key_kernel(
    q, k, v,
    G,
    A,
    states, o, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """o_t = scale (sum_s (q_t exp(Gq_t - G_s) k_s) v_s + (q_t exp(Gq_t)) S), one chunk and value tile a program."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_c = pid // (NV * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        scores = tl.load(A + at[:, None] * C + o_c[None, :], mask=live[:, None], other=0.0)
        out = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            tile = o_k[:, None] * V + o_v[None, :]
            S = tl.load(states + (i_c.to(tl.int64) * H + i_h) * K * V + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
            part = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & (o_c > 0)[:, None], other=0.0)
            out = tl.dot((query * tl.exp(part)).to(OT), S.to(OT), out, input_precision=PRECISION)
        value = tl.load(v + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
        out = tl.dot(scores.to(OT), value.to(OT), out, input_precision=PRECISION) * scale
        tl.store(o + at[:, None] * V + o_v[None, :], out.to(o.dtype.element_ty), mask=live[:, None] & m_v[None, :])


@_kernel(do_not_specialize=["T", "NT", "H"])
def _values_key_kernel(
    k, d_o, G, A, d_states, dv, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dv_s = scale sum_t A[t, s] do_t + (k_s exp(G_C - G_s)) dS, one chunk and value tile a program."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_c = pid // (NV * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_cv = live[:, None] & m_v[None, :]
        scores = tl.load(A + at[None, :] * C + o_c[:, None], mask=live[None, :], other=0.0)
        d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
        acc = tl.dot(scores.to(OT), d_out.to(OT), input_precision=PRECISION) * scale
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_ck = live[:, None] & m_k[None, :]
            key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            whole = tl.load(G + ((end - 1) * H + i_h) * K + o_k, mask=m_k, other=0.0)
            key = key * tl.exp(tl.minimum(whole[None, :] - part, 0.0))
            tile = (i_c.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
            dS = tl.load(d_states + tile, mask=m_k[:, None] & m_v[None, :], other=0.0)
            acc = tl.dot(key.to(OT), dS.to(OT), acc, input_precision=PRECISION)
        tl.store(dv + at[:, None] * V + o_v[None, :], acc.to(dv.dtype.element_ty), mask=m_cv)


@_kernel(do_not_specialize=["T", "NT", "H"])
def _keys_key_kernel(
    q, k, v, d_o, G, dg, states, d_states, dq, dk, spans, scale, T, NT, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """dq, dk and the log-decay gradient, one chunk and tile of key channels a program.

    dg_r is a sum over the pairs (t, s) whose decay contains r, and is added up as such: terms of queries from r on,
    of keys before r. Nothing large is subtracted.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    LEVELS: tl.constexpr = tl.constexpr(C.bit_length() - 1)
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    i_c = pid // (NK * H)
    begin, end = _chunk(spans, i_c, T, NT, C, PACKED)
    if begin < end:
        o_c = tl.arange(0, C)
        row = begin + o_c
        live = row < end
        at = row * H + i_h
        apart = o_c[:, None] ^ o_c[None, :]
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_ck = live[:, None] & m_k[None, :]
        at_state = (i_c.to(tl.int64) * H + i_h) * K * V
        d_scores = tl.zeros([C, C], dtype=tl.float32)
        d_scores_t = tl.zeros([C, C], dtype=tl.float32)
        acc_q = tl.zeros([C, BK], dtype=tl.float32)
        acc_k = tl.zeros([C, BK], dtype=tl.float32)
        carried = tl.zeros([BK], dtype=tl.float32)
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = o_v < V
            m_cv = live[:, None] & m_v[None, :]
            d_out = tl.load(d_o + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0).to(OT)
            value = tl.load(v + at[:, None] * V + o_v[None, :], mask=m_cv, other=0.0).to(OT)
            tile = o_k[None, :] * V + o_v[:, None]
            m_tile = m_v[:, None] & m_k[None, :]
            S = tl.load(states + at_state + tile, mask=m_tile, other=0.0)
            dS = tl.load(d_states + at_state + tile, mask=m_tile, other=0.0)
            d_scores = tl.dot(d_out, tl.trans(value), d_scores, input_precision=PRECISION)
            d_scores_t = tl.dot(value, tl.trans(d_out), d_scores_t, input_precision=PRECISION)
            acc_q = tl.dot(d_out, S.to(OT), acc_q, input_precision=PRECISION)
            acc_k = tl.dot(value, dS.to(OT), acc_k, input_precision=PRECISION)
            carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)
        # symmetric: [r, c] = scale do_max . v_min serves dq above and dk below the middle of a block
        mixed = (tl.where(o_c[None, :] > o_c[:, None], d_scores_t, d_scores) * scale).to(OT)
        same = tl.sum(tl.where(apart == 0, d_scores, 0.0), axis=1) * scale
        whole = tl.load(G + ((end - 1) * H + i_h) * K + o_k, mask=m_k, other=0.0)
        query = tl.load(q + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
        key = tl.load(k + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
        part = tl.load(G + at[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
        seen = tl.load(G + (at - H)[:, None] * K + o_k[None, :], mask=m_ck & (o_c > 0)[:, None], other=0.0)
        after = o_c[None, :] > o_c[:, None]
        earlier = o_c[None, :] < o_c[:, None]
        acc_q *= tl.exp(seen) * scale
        acc_k *= tl.exp(tl.minimum(whole[None, :] - part, 0.0))
        acc_g = tl.dot(tl.where(after, 1.0, 0.0).to(OT), (acc_q * query).to(OT), input_precision=PRECISION)
        acc_g = tl.dot(tl.where(earlier, 1.0, 0.0).to(OT), (acc_k * key).to(OT), acc_g, input_precision=PRECISION)
        acc_g += (carried * tl.exp(whole))[None, :]

        for level in range(LEVELS):
            block = 1 << level
            upper = ((o_c & block) != 0)[:, None]
            middle = begin + (o_c | (2 * block - 1)) - block
            at_mid = tl.minimum(middle, end - 1) * H + i_h
            mid = tl.load(G + at_mid[:, None] * K + o_k[None, :], mask=m_ck, other=0.0)
            weight = tl.exp(tl.minimum(tl.where(upper, seen - mid, mid - part), 0.0))
            own = tl.where(upper, query, key).to(tl.float32)
            pairs = (apart >= block) & (apart < 2 * block)
            operand = (own * weight).to(OT)
            change = tl.dot(tl.where(pairs, mixed, 0.0).to(OT), operand, input_precision=PRECISION) * weight
            acc_q += tl.where(upper, change, 0.0)
            acc_k += tl.where(upper, 0.0, change)
            around = ((apart < block) & ((upper & after) | ((o_c[:, None] & block) == 0) & earlier))
            around = tl.where(around, 1.0, 0.0).to(OT)
            acc_g = tl.dot(around, (change * own).to(OT), acc_g, input_precision=PRECISION)
        at_k = at[:, None] * K + o_k[None, :]
        tl.store(dg + at_k, acc_g, mask=m_ck)
        tl.store(dq + at_k, acc_q.to(dq.dtype.element_ty), mask=m_ck)
        tl.store(dk + at_k, acc_k.to(dk.dtype.element_ty), mask=m_ck)


def _config_proposals_key(K, V, dtype):
    """Chunk and (k tile, v tile, warps, stages) of the states, outputs and gradients kernels; the first by default.

    Tiles follow from the shared memory and registers that they take.
    """
    if dtype != torch.bfloat16:  # float32 operands take twice the shared memory, and three products each
        return [(32, (_tile(K, 32), _tile(V, 64), 4, 2), (_tile(K, 32), _tile(V, 64), 4, 1), (_tile(K, 32), _tile(V, 32), 4, 1))]
    k, v = _tile(K, 64), _tile(V, 64)
    if min(k, v) < 64:
        # Chunks of 32, or two warps, keep to the older matrix instructions: with operands narrower than 64, Triton 3.6
        # miscompiles the gradients for the warp-group ones. Two warps hold a chunk of 64 by spilling kilobytes.
        four, two = ((32, (k, v, 2, 3), (k, _tile(V, 128), w, 1), (k, v, w, 1)) for w in (4, 2))
        return [four, two, (64, (k, v, 2, 3), (k, _tile(V, 128), 2, 1), (k, v, 2, 1))]
    first = 64, (k, v, 4, 3), (k, _tile(V, 128), 4, 1), (k, v, 8, 1)
    deep = first[0], (k, v, 4, 4), first[2], first[3]
    wide = first[0], (k, _tile(V, 128), 4, 2), first[2], first[3]
    return [first, deep, wide]


def _config_key(K, V, dtype):
    return _chosen(_config_proposals_key, "linear_key", K, V, dtype)


def _decay_sums_key(g, spans, T, NT, chunks, C):
    H = g.shape[2]
    W = g.shape[3] if g.dim() == 4 else 1
    G = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    BW = _tile(H * W, 64)
    grid = (chunks, _cdiv(H * W, BW), 1)
    _launch(_decay_sums_key_kernel, grid, (g, G, spans), (T, NT, H), (), C=C, W=W, BW=BW, PACKED=spans is not None)
    return G


def _states_key(k, v,
    G,
    initial, offsets, bases, NT, chunks, config, N, want_final):
    C, (BK, BV, warps, stages), _, _ = config
    B, T, H, K = k.shape
    V = v.shape[-1]
    OT, precision = _operands(k.dtype)
    states = torch.empty((chunks, H, K, V), dtype=k.dtype if k.dtype == torch.bfloat16 else torch.float32, device=k.device)
    final = torch.empty((N, H, K, V), dtype=torch.float32, device=k.device) if want_final else None
    grid = (_cdiv(K, BK) * _cdiv(V, BV) * N * H, 1, 1)
    pointers = (
        k, v,
        G,
        initial, states, final, offsets, bases,
    )
    _launch(
        _states_key_kernel, grid, pointers, (T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    return states, final


def _scores_key(q, k, G, spans, NT, chunks, config):
    C, _, _, (BK, _, warps, stages) = config
    B, T, H, K = k.shape
    OT, precision = _operands(k.dtype)
    A = torch.empty((B, T, H, C), dtype=k.dtype if k.dtype == torch.bfloat16 else torch.float32, device=k.device)
    _launch(
        _scores_key_kernel, (H * chunks, 1, 1), (q, k, G, A, spans), (T, NT, H), (), K=K, C=C, BK=BK,
        OT=OT, PRECISION=precision, PACKED=spans is not None, num_warps=warps, num_stages=stages,
    )
    return A




@_repeated
def _forward_key(q, k, v,
    g,
    initial, scale, offsets, want_final=True, keep=False):
    """o and the final state, None unless wanted; with ``keep`` what is made on the way. ``initial`` may be None: zero."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config_key(K, V, k.dtype)
    C, _, (BK, BV, warps, stages), _ = config
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    G = _decay_sums_key(g, spans, T, NT, chunks, C)
    states, final = _states_key(k, v,
        G,
        initial, offsets, bases, NT, chunks, config, N, want_final)
    o = torch.empty_like(v)
    OT, precision = _operands(k.dtype)
    A = _scores_key(q, k, G, spans, NT, chunks, config)
    pointers = (
        q, k, v,
        G,
        A,
        states, o, spans,
    )
    _launch(
        _outputs_key_kernel, (_cdiv(V, BV) * H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    if not keep or states.numel() * states.element_size() > _KEPT:
        return o, final
    return (
        o, final, states,
        G,
        A,
    )


@_repeated
def _backward_key(q, k, v,
    g,
    initial, d_o, d_final, scale, offsets, *kept):
    """Gradients of the tensors before d_o; None for that of an initial state that is None, as d_final may be: zero."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    config = _config_key(K, V, k.dtype)
    C, (BK, BV, warps, stages), _, gradients = config
    spans, bases, NT, chunks = _plan(T, offsets, N, C)
    if kept:
        states, *kept = kept
        G, *kept = kept
    else:
        G = _decay_sums_key(g, spans, T, NT, chunks, C)
        states, _ = _states_key(k, v,
            G,
            initial, offsets, bases, NT, chunks, config, N, False)
    OT, precision = _operands(k.dtype)
    if d_o is None:
        d_o = torch.zeros_like(v)
    d_states = torch.empty_like(states)
    d_initial = None if initial is None else torch.empty_like(initial)
    dg = torch.empty_like(g)
    grid = (_cdiv(K, BK) * _cdiv(V, BV) * N * H, 1, 1)
    pointers = (
        q, d_o,
        G,
        d_final, d_states, d_initial, offsets, bases,
    )
    _launch(
        _cotangents_key_kernel, grid, pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _, _, (BK, BV, warps, stages), gradients = config
    A = kept[0] if kept else _scores_key(q, k, G, spans, NT, chunks, config)
    pointers = (k, d_o, G, A, d_states, dv, spans)
    _launch(
        _values_key_kernel, (_cdiv(V, BV) * H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    BK, BV, warps, stages = gradients
    pointers = (q, k, v, d_o, G, dg, states, d_states, dq, dk, spans)
    _launch(
        _keys_key_kernel, (_cdiv(K, BK) * H * chunks, 1, 1), pointers, (scale, T, NT, H), (), K=K, V=V, C=C, BK=BK, BV=BV,
        OT=OT, PRECISION=precision, PACKED=offsets is not None, num_warps=warps, num_stages=stages,
    )
    return (
        dq, dk, dv,
        dg,
        d_initial,
    )


_linear_key_op = torch.library.custom_op(
    f"{_OPS}::linear_key",
    lambda *arguments: _forward_key(*arguments),
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor initial, float scale, Tensor? offsets) -> (Tensor, Tensor)",
)
_linear_key_backward_op = torch.library.custom_op(
    f"{_OPS}::linear_key_backward",
    lambda *arguments: _backward_key(*arguments),
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor initial, Tensor d_o, Tensor d_final, float scale, Tensor? offsets)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_linear_key_op.register_fake
def _linear_key_fake(q, k, v, *rest):
    initial = rest[-3]
    return torch.empty_like(v), torch.empty_like(initial)


@_linear_key_backward_op.register_fake
def _linear_key_backward_fake(*tensors):
    return tuple(torch.empty_like(t) for t in tensors[:-4])


def _linear_key_save(ctx, inputs, output):
    *tensors, ctx.scale, offsets = inputs
    ctx.save_for_backward(*tensors, offsets)


def _linear_key_gradient(ctx, d_o, d_final):
    *tensors, offsets = ctx.saved_tensors
    grads = _linear_key_backward_op(*tensors, d_o.contiguous(), d_final.contiguous(), ctx.scale, offsets)
    return (*grads, None, None)


_linear_key_op.register_autograd(_linear_key_gradient, setup_context=_linear_key_save)


class _linear_key_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a small problem takes."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.scale, offsets, _ = arguments
        o, final, *kept = _forward_key(*arguments, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, offsets, *kept)
        return o, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, d_final):
        q, k, v, g, initial, offsets, *kept = ctx.saved_tensors
        tensors = q, k, v, g, initial
        given = [None if d is None else d.contiguous() for d in (d_o, d_final)]
        return (*_backward_key(*tensors, *given, ctx.scale, offsets, *kept), None, None, None)


def _linear_key(*arguments):
    """o_t = scale q_t S_t and the final state of S_t = exp(g_t) S_(t-1) + k_t v_t, differentiable.

    The initial state may be None: zero; the last argument says whether the final one is wanted.
    """
    *tensors, scale, offsets, want_final = arguments
    tensors = [None if t is None else t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        return _linear_key_op(*tensors, scale, offsets)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return _linear_key_eager.apply(*tensors, scale, offsets, want_final)
    return _forward_key(*tensors, scale, offsets, want_final)


def _chunk_triton_core(q, k, v, w, u, S, scale, offsets, want_variance, want_final=True):
    """Features of every token, then matmuls over chunks with the states at their borders."""
    if q.dtype == torch.float64:  # no tensor cores for it
        return _reference_core(q, k, v, w, u, S, scale, offsets, want_variance)
    dtype = _common(q.dtype, k.dtype, v.dtype)  # operands of the matmuls
    # aligned to [B, T, H, K, V], with size 1 where there is no such axis
    q_ = q.float()[..., :, None]
    k_ = k.float()[..., :, None]
    v_ = v.float()[..., None, :]
    u_ = u.float()[..., :, None]

    # S_t = exp(w) * S_(t-1) + (k) (v)
    S_decay = w
    S_key = _typed(k, dtype)
    S_value = _typed(v, dtype)
    read_0_S, S_final = _linear_key(_typed(q, dtype), S_key, S_value, S_decay, S, 1.0, offsets, want_final)

    read_0 = (read_0_S).float()[..., None, :]  # sum_k S*q
    output = _typed((scale * (read_0 + (k_ * q_ * u_).sum(-2, keepdim=True) * v_))[..., 0, :], q.dtype)
    variance = None
    return output, variance, S_final


_chunk_triton_core.lean = True  # initial states may be None: zero; final states are left out unless ``want_final``


@_kernel
def _bounds(offsets, i_n, T, PACKED: tl.constexpr):
    """First token and number of tokens of sequence ``i_n``, never outside the tokens that there are; rows in all."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(offsets + i_n).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(offsets + i_n + 1).to(tl.int64), begin), T)
        rows = T
    else:
        begin = i_n * T
        end = begin + T
        rows = end
    return begin, (end - begin).to(tl.int32), rows


@_kernel
def _live(x, mask, EXACT: tl.constexpr):
    """``x`` with 0 in the lanes beyond the last channel."""
    if EXACT:
        return x
    else:
        return tl.where(mask, x, 0.0)


@_kernel(do_not_specialize=["T", "EVERY"])
def _sequential_kernel(
    q_in, k_in, v_in, w_in, u_in, S_initial, o, variance, S_final, S_saved,
    offsets, scale, T, EVERY, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OUTPUT: tl.constexpr, VARIANCE: tl.constexpr,
    SAVE: tl.constexpr, PACKED: tl.constexpr, ONE: tl.constexpr,
):
    """Tokens forward from the initial states; SAVE keeps the states before every EVERY-th token; ONE token."""
    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K == BK
    EXACT_V: tl.constexpr = V % BV == 0
    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    r_k = tl.arange(0, BK)
    r_v = i_v * BV + tl.arange(0, BV)
    o_k = r_k[:, None]
    o_v = r_v[None, :]
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k & m_v
    t_kv = o_k * V + o_v
    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)
    if ONE:  # one token, for decoding: no loop, and nothing is loaded ahead
        steps = 1
    at = tl.minimum(begin, rows - 1) * H + i_h
    u = tl.load(u_in + i_h * K + r_k, mask=r_k < K, other=0.0)
    q_next = tl.load(q_in + at * K + r_k, mask=r_k < K, other=0.0)
    k_next = tl.load(k_in + at * K + r_k, mask=r_k < K, other=0.0)
    v_next = tl.load(v_in + at * V + r_v, mask=r_v < V, other=0.0)
    w_next = tl.load(w_in + at * K + r_k, mask=r_k < K, other=0.0)
    S = tl.load(S_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0)
    S = S.to(tl.float32)
    u = u.to(tl.float32)[:, None]
    for t in range(0, steps):
        at = (begin + t) * H + i_h
        ahead = (begin + tl.minimum(t + 1, steps - 1)) * H + i_h
        q = q_next.to(tl.float32)[:, None]
        k = k_next.to(tl.float32)[:, None]
        v = v_next.to(tl.float32)[None, :]
        w = w_next.to(tl.float32)[:, None]
        q_next = tl.load(q_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        k_next = tl.load(k_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        v_next = tl.load(v_in + ahead * V + r_v, mask=r_v < V, other=0.0)
        w_next = tl.load(w_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        if SAVE:
            if t % EVERY == 0:
                slot = (begin // EVERY + i_n + t // EVERY) * H + i_h
                tl.store(S_saved + slot * K * V + t_kv, (S).to(S_saved.dtype.element_ty), mask=m_kv)
        row0 = tl.exp(w)
        x0 = k * v
        S_new = S * row0 + x0
        if OUTPUT:
            sum0 = tl.sum(_live(q * (S + u * x0), m_k, EXACT_K), axis=0)[None, :]
            tl.store(o + at * V + o_v, (scale * sum0).to(o.dtype.element_ty), mask=m_v)
        S_after = S_new
        S = S_after
    if OUTPUT:
        tl.store(S_final + i_nh * K * V + t_kv, (S).to(S_final.dtype.element_ty), mask=m_kv)


@_kernel(do_not_specialize=["T", "EVERY", "TOTAL"])
def _sequential_backward_kernel(
    q_in_, k_in_, v_in_, w_in_, u_in_, S_saved_, S_past, d_output_in, d_S_final, d_q_out, d_k_out, d_v_out,
    d_w_out, d_u_out, d_S_initial,
    offsets, scale, T, EVERY, TOTAL, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
):
    """Cotangents of inputs, parameters and initial states: segments in reverse, each from its saved states."""
    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K == BK
    EXACT_V: tl.constexpr = V % BV == 0
    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    r_k = tl.arange(0, BK)
    r_v = i_v * BV + tl.arange(0, BV)
    o_k = r_k[:, None]
    o_v = r_v[None, :]
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k & m_v
    t_kv = o_k * V + o_v
    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)
    t_past = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
    NH = tl.num_programs(0) // NV
    shared = i_v * NH + i_nh  # row of what value blocks share
    u = tl.load(u_in_ + i_h * K + r_k, mask=r_k < K, other=0.0)
    u = u.to(tl.float32)[:, None]
    d_S = tl.load(d_S_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    sum_u = zero_k
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (begin // EVERY + i_n + segment) * H + i_h
        S = tl.load(S_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        # The states of this segment once more.
        at = first * H + i_h
        k_next_ = tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next_ = tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        w_next_ = tl.load(w_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        for t in range(0, count):
            at = (first + t) * H + i_h
            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            tl.store(S_past + place * BK * BV + t_past, S)
            k = k_next_.to(tl.float32)[:, None]
            v = v_next_.to(tl.float32)[None, :]
            w = w_next_.to(tl.float32)[:, None]
            k_next_ = tl.load(k_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next_ = tl.load(v_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            w_next_ = tl.load(w_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            row0_ = tl.exp(w)
            S_new_ = S * row0_ + k * v
            S_after_ = S_new_
            S = S_after_
        tl.debug_barrier()  # other threads of this program read what these wrote
        # Cotangents, last token first.
        at = (first + count - 1) * H + i_h
        q_next_ = tl.load(q_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        k_next__ = tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next__ = tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        w_next__ = tl.load(w_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        d_output_next = tl.load(d_output_in + at * V + r_v, mask=r_v < V, other=0.0)
        for back_t in range(0, count):
            t = count - 1 - back_t
            at = (first + t) * H + i_h
            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            S_old = tl.load(S_past + place * BK * BV + t_past)
            q = q_next_.to(tl.float32)[:, None]
            k = k_next__.to(tl.float32)[:, None]
            v = v_next__.to(tl.float32)[None, :]
            w = w_next__.to(tl.float32)[:, None]
            q_next_ = tl.load(q_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            k_next__ = tl.load(k_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next__ = tl.load(v_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            w_next__ = tl.load(w_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            d_output = d_output_next.to(tl.float32)[None, :]
            d_output_next = tl.load(d_output_in + ahead * V + r_v, mask=r_v < V, other=0.0)
            col0 = d_output * scale
            row0__ = tl.exp(w)
            sum1 = tl.sum(_live(d_output * v, m_v, EXACT_V))
            c0 = scale * sum1
            row2 = c0 * q
            row1 = k * u
            sum0_ = tl.sum(_live(d_output * (S_old + row1 * v), m_v, EXACT_V), axis=1)[:, None]
            sum2 = tl.sum(_live(d_S * v, m_v, EXACT_V), axis=1)[:, None]
            sum3 = tl.sum(_live(q * row1, m_k, EXACT_K))
            sum4 = tl.sum(_live(d_S * k, m_k, EXACT_K), axis=0)[None, :]
            sum5 = tl.sum(_live(S_old * d_S, m_v, EXACT_V), axis=1)[:, None]
            x0_ = col0 * q + d_S * row0__
            tl.store(d_q_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (scale * sum0_).to(d_q_out.dtype.element_ty), mask=m_k)
            tl.store(d_k_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (row2 * u + sum2).to(d_k_out.dtype.element_ty), mask=m_k)
            tl.store(d_v_out + at * V + o_v, (col0 * sum3 + sum4).to(d_v_out.dtype.element_ty), mask=m_v)
            tl.store(d_w_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (row0__ * sum5).to(d_w_out.dtype.element_ty), mask=m_k)
            sum_u += k * row2
            d_S_after = x0_
            d_S = d_S_after
        tl.debug_barrier()
    tl.store(d_u_out + shared * K + o_k, (sum_u).to(d_u_out.dtype.element_ty), mask=m_k)
    tl.store(d_S_initial + i_nh * K * V + t_kv, (d_S).to(d_S_initial.dtype.element_ty), mask=m_kv)


_SEQUENTIAL_SPLITS = True  # whether value channels may run as separate blocks
_SEQUENTIAL_COUNTS = (4, 1, 1)  # inputs, parameters, states
_SEQUENTIAL_TILES = 1  # states on kv: what the registers hold


def _sequential_proposals(K, V, few, backward):
    """Tile of k, tile of v, warps; the first by default. With ``few`` tokens it is a matter of moving the states.

    Forward over many tokens, a narrow block of v gives many programs and keeps sums over k within a warp. Moving
    states, or writing gradients that every block has its own copy of, a block is 128 bytes wide.
    """
    BK, full = 1 << (K - 1).bit_length(), 1 << (V - 1).bit_length()
    moving = backward or few
    widths = [full]
    if _SEQUENTIAL_SPLITS:
        BV = min(full, 32 if moving else max(8, min(512 // BK, 32)))
        widths = [BV, *(w for w in (BV // 2, 2 * BV) if 8 <= w <= full)]
    share = 32 * (32 if moving else 64)  # elements of the states that one warp holds
    found = []
    for share, width in [(share, w) for w in widths] + [(share // 2, w) for w in widths[:1]]:
        warps = max(1, min(16, BK * width * max(1, _SEQUENTIAL_TILES) // share))
        if (BK, width, warps) not in found:
            found.append((BK, width, warps))
    return found


def _sequential_config(K, V, steps, backward):
    """``steps`` is the mean length of a sequence; four or fewer are few."""
    return _chosen(_sequential_proposals, "sequential " + _ID, K, V, steps <= 4, backward)


def _sequential_sizes(inputs, parameters, states, offsets):
    """B, T, H, K, V, number of sequences, mean tokens a sequence."""
    B, T, H = inputs[0].shape[:3]
    K, V = _sizes(*inputs, *parameters, *states)
    N = B if offsets is None else offsets.shape[0] - 1
    return B, T, H, K, V, N, -(-B * T // max(N, 1))


def _sequential_split(arguments):
    """Inputs, parameters, states, and the other arguments."""
    a, b, c = _SEQUENTIAL_COUNTS
    return arguments[:a], arguments[a : a + b], arguments[a + b : a + b + c], arguments[a + b + c :]


def _of_blocks(like, axes, blocks, *lead):
    """Room for the cotangent of ``like``, float32: what has no v axis gets a row from each block of v."""
    return like.new_empty(*(() if "v" in axes else (blocks,)), *lead, *like.shape, dtype=torch.float32)


def _of_inputs(inputs, blocks):
    """Room for the cotangents of inputs; those that one row suffices for have their types."""
    return [
        torch.empty_like(x) if "v" in axes or blocks == 1 else _of_blocks(x, axes, blocks)
        for x, (_, axes) in zip(inputs, _INPUTS)
    ]


def _summed(rows, like):
    """The cotangent of ``like`` from its rows of blocks and sequences, or the one row that it has."""
    return rows if rows.shape == like.shape else rows.flatten(0, rows.dim() - like.dim() - 1).sum(0).to(like.dtype)


def _sequential_launch(inputs, parameters, states, offsets, scale, config, o, variance, final, saved, every):
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    BK, BV, warps = config
    pointers = (*inputs, *parameters, *states, o, variance, *final, *saved, offsets)
    _launch(
        _sequential_kernel, (-(-V // BV) * N * H, 1, 1), pointers, (scale, T, every), (H,),
        K=K, V=V, BK=BK, BV=BV, OUTPUT=o is not None, VARIANCE=variance is not None, SAVE=o is None,
        PACKED=offsets is not None, ONE=T == 1 and o is not None and offsets is None, num_warps=warps,
    )


@_repeated
def _sequential_forward(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    o = inputs[0].new_empty(B, T, H, V)
    variance = torch.empty_like(o) if want_variance else None
    final = [torch.empty_like(s) for s in states]
    config = _sequential_config(K, V, steps, False)
    none = [None] * len(states)
    _sequential_launch(inputs, parameters, states, offsets, scale, config, o, variance, final, none, 1)
    return (o, variance if want_variance else o.new_empty(0), *final)


@_repeated
def _sequential_backward(*arguments):
    inputs, parameters, states, (d_o, d_variance, *d_final, offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    # States are saved every sqrt(T) tokens: saved and recomputed states then take the same memory.
    every = 1 << min((max(steps, 1) - 1).bit_length() + 1 >> 1, 7)
    slots = B * T // every + N
    none = [None] * len(states)
    saved = [s.new_empty(slots, *s.shape[1:]) for s in states]
    config = _sequential_config(K, V, steps, False)
    _sequential_launch(inputs, parameters, states, offsets, scale, config, None, None, none, saved, every)

    BK, BV, warps = _sequential_config(K, V, steps, True)
    blocks = -(-V // BV)
    padded = {"": (), "k": (BK,), "v": (BV,), "kv": (BK, BV)}
    past = [s.new_empty(blocks * N * H, every, *padded[axes]) for s, (_, axes) in zip(states, _STATES)]
    d_leaves = [
        *_of_inputs(inputs, blocks),
        *[_of_blocks(p, axes, blocks, N) for p, (_, axes) in zip(parameters, _PARAMETERS)],
        *[_of_blocks(s, axes, blocks) for s, (_, axes) in zip(states, _STATES)],
    ]
    given = [d_o, d_variance] if want_variance else [d_o]
    pointers = (*inputs, *parameters, *saved, *past, *given, *d_final, *d_leaves, offsets)
    _launch(
        _sequential_backward_kernel, (blocks * N * H, 1, 1), pointers, (scale, T, every, B * T * H), (H,),
        K=K, V=V, BK=BK, BV=BV, PACKED=offsets is not None, num_warps=warps,
    )
    return tuple([_summed(d, x) for d, x in zip(d_leaves, (*inputs, *parameters, *states))])


_sequential_op = torch.library.custom_op(
    f"{_OPS}::sequential",
    lambda *arguments: _sequential_forward(*arguments),
    mutates_args=(),
    schema="(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5, Tensor? offsets, float scale, bool want_variance) -> (Tensor, Tensor, Tensor)",
)
_sequential_backward_op = torch.library.custom_op(
    f"{_OPS}::sequential_backward",
    lambda *arguments: _sequential_backward(*arguments),
    mutates_args=(),
    schema="(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5, Tensor d0, Tensor d1, Tensor d2, Tensor? offsets, float scale, bool want_variance)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_sequential_op.register_fake
def _sequential_fake(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    o = inputs[0].new_empty(*inputs[0].shape[:3], _sizes(*inputs, *parameters, *states)[1])
    return (o, torch.empty_like(o) if want_variance else o.new_empty(0), *(s.new_empty(s.shape) for s in states))


@_sequential_backward_op.register_fake
def _sequential_backward_fake(*arguments):
    return tuple(t.new_empty(t.shape) for t in arguments[: sum(_SEQUENTIAL_COUNTS)])


def _sequential_save(ctx, inputs, output):
    *tensors, offsets, ctx.scale, ctx.want_variance = inputs
    ctx.save_for_backward(*tensors, offsets)


def _sequential_gradient(ctx, *cotangents):
    *tensors, offsets = ctx.saved_tensors
    cotangents = [t.contiguous() for t in cotangents]
    return (*_sequential_backward_op(*tensors, *cotangents, offsets, ctx.scale, ctx.want_variance), None, None, None)


_sequential_op.register_autograd(_sequential_gradient, setup_context=_sequential_save)


class _sequential_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a token takes."""

    @staticmethod
    def forward(ctx, *arguments):
        _sequential_save(ctx, arguments, None)
        return _sequential_forward(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        *tensors, offsets = ctx.saved_tensors
        cotangents = [t.contiguous() for t in cotangents]
        return (*_sequential_backward(*tensors, *cotangents, offsets, ctx.scale, ctx.want_variance), None, None, None)


def _recurrent_triton_core(*arguments):
    """Token by token, states in registers; the same kernel decodes."""
    *tensors, scale, offsets, want_variance = arguments
    if triton is None or tensors[0].dtype == torch.float64:
        return _reference_core(*arguments)
    tensors = [t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        run = _sequential_op
    elif torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        run = _sequential_eager.apply
    else:
        run = _sequential_forward
    o, variance, *final = run(*tensors, offsets, scale, want_variance)
    return (o, variance if want_variance else None, *final)


_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def _cpu_chunk_core(*args):
    """The faster form for these sizes: matmuls over chunks for large states, else the native loop."""
    size_k, size_v = _sizes(*args[:-3])
    large = False
    return (_chunk_torch_core if large or not _HAS_NUMBA else _native_core)(*args)


_CORES = {
    ('cpu', 'chunk'): _cpu_chunk_core,
    ('cpu', 'recurrent'): _native_core,
    ('cuda', 'chunk'): _chunk_triton_core,
    ('cuda', 'recurrent'): _recurrent_triton_core,
}


def chunk_rwkv6(
    q,
    k,
    v,
    w,
    u,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    output_variance=False,
    cu_seqlens=None,
):
    """The fastest form for whole sequences: training and prefill.

    Args:
        q: ``[B, T, H, K]``. receptance
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        w: ``[B, T, H, K]``, nonpositive. log retention of each key channel
        u: ``[HV, K]``. bonus of the present token
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: S ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too (this variant has none).
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "chunk", (q, k, v, w,), (u,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )


def recurrent_rwkv6(
    q,
    k,
    v,
    w,
    u,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    output_variance=False,
    cu_seqlens=None,
):
    """Token by token in a compiled loop, with its own backward: decoding, and a check of the other forms.

    Args:
        q: ``[B, T, H, K]``. receptance
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        w: ``[B, T, H, K]``, nonpositive. log retention of each key channel
        u: ``[HV, K]``. bonus of the present token
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: S ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too (this variant has none).
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "recurrent", (q, k, v, w,), (u,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )


def reference_rwkv6(
    q,
    k,
    v,
    w,
    u,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    output_variance=False,
    cu_seqlens=None,
):
    """Plain PyTorch, any dtype, differentiable any number of times: slow and simple.

    Args:
        q: ``[B, T, H, K]``. receptance
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        w: ``[B, T, H, K]``, nonpositive. log retention of each key channel
        u: ``[HV, K]``. bonus of the present token
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: S ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too (this variant has none).
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "reference", (q, k, v, w,), (u,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )

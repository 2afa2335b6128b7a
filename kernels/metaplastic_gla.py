"""Metaplastic gated linear attention: retention and prior precision per key channel

References: arXiv:2602.09075, arXiv:2312.06635

One token, per head (k: key channel, v: value channel):

    M[k,v] <- M*exp(g) + k*v    (mean * precision)
              starts at 0
    Ibar[k,v] <- Ibar*exp(g) + b*k**2    (precision - I_p)
                 starts at 0
    output[v] = scale*SumK(M*q/(I_p + Ibar))    (read after the update)
    variance[v] = scale**2*SumK(q**2/(I_p + Ibar))

Class c: ratio: nonlinear readout of affine states.
every state is affine, but the readout divides one by another inside the sum over k, and the divisor varies along
    both axes: it can fold neither into the query nor into the output

Generated from the spec 'metaplastic_gla', hash 7d174aeadbe77316, by emitter 4.
Made by a program: change the spec and generate again rather than editing this file.
"""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode
import copy
import ctypes
import functools
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


SPEC = {'name': 'metaplastic_gla',
 'title': 'Metaplastic gated linear attention: retention and prior precision per key channel',
 'references': ['arXiv:2602.09075', 'arXiv:2312.06635'],
 'hash': '7d174aeadbe77316e26426deccb46891a7ed52723f80f3c1dc5517e71d270fa0',
 'class': 'c',
 'class_name': 'ratio: nonlinear readout of affine states',
 'reason': 'every state is affine, but the readout divides one by another inside the sum over k, and the divisor '
           'varies along both axes: it can fold neither into the query nor into the output',
 'inputs': [{'name': 'q', 'axes': 'k', 'domain': 'real', 'doc': ''},
            {'name': 'k', 'axes': 'k', 'domain': 'real', 'doc': ''},
            {'name': 'v', 'axes': 'v', 'domain': 'real', 'doc': ''},
            {'name': 'b', 'axes': 'v', 'domain': 'nonnegative', 'doc': 'importance gain of this write'},
            {'name': 'g', 'axes': 'k', 'domain': 'nonpositive', 'doc': 'log retention of each key channel'}],
 'parameters': [{'name': 'I_p',
                 'axes': 'k',
                 'domain': 'positive',
                 'doc': 'prior precision of each key channel',
                 'init': 1.0}],
 'states': [{'name': 'M', 'axes': 'kv', 'domain': 'real', 'doc': 'mean * precision', 'init': '0'},
            {'name': 'Ibar', 'axes': 'kv', 'domain': 'nonnegative', 'doc': 'precision - I_p', 'init': '0'}],
 'variance': True,
 'read': 'after',
 'forms': {'cpu/chunk': '_native_core',
           'cpu/recurrent': '_native_core',
           'cuda/chunk': '_chunk_triton_core',
           'cuda/recurrent': '_recurrent_triton_core'},
 'double_backward': ['reference'],
 'layer': {'q': 'l2norm(silu(conv(linear)))',
           'k': 'l2norm(silu(conv(linear)))',
           'v': 'write_gate * silu(conv(linear))',
           'b': 'write_gate * sigmoid(low_rank) * softplus(head_scale)',
           'g': '-softplus(-low_rank) / 16'},
 'versions': {'emitter': '4'}}
_ID = 'dspace_metaplastic_gla_7d174aea'  # by which its operators and tuned configurations are known


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


_NAME = 'metaplastic_gla'
_INPUTS = (('q', 'k'), ('k', 'k'), ('v', 'v'), ('b', 'v'), ('g', 'k'))
_PARAMETERS = (('I_p', 'k'),)
_STATES = (('M', 'kv'), ('Ibar', 'kv'))
_HAS_VARIANCE = True
_STARTS_AT_ZERO = True


def _initial_states(I_p, sequences, heads, size_k, size_v, dtype, device):
    """States before the first token, ``[N, HV, *axes]``."""
    return (
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # M = 0
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # Ibar = 0
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


def _reference_core(q, k, v, b, g, I_p, M, Ibar, scale, offsets, want_variance):
    """Token by token, as the formulas of the header stand: slow, simple, the measure of the rest."""
    if offsets is not None:  # packed: one sequence after the other
        bounds = offsets.tolist()
        parts = [
            _reference_core(
                q[:, begin:end],
                k[:, begin:end],
                v[:, begin:end],
                b[:, begin:end],
                g[:, begin:end],
                I_p,
                M[count : count + 1],
                Ibar[count : count + 1],
                scale, None, want_variance,
            )
            for count, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:]))
        ]
        output = torch.cat([rows[0] for rows in parts], 1)
        variance = torch.cat([rows[1] for rows in parts], 1) if want_variance else None
        return (output, variance, *(torch.cat([rows[2 + i] for rows in parts]) for i in range(2)))
    dtype = M.dtype
    like = q
    size_k, size_v = _sizes(q, k, v, b, g, I_p, M, Ibar)
    # Every tensor is aligned to [sequence, head, K, V], with size 1 where it has no such axis.
    q_all = q.to(dtype)[..., :, None]
    k_all = k.to(dtype)[..., :, None]
    v_all = v.to(dtype)[..., None, :]
    b_all = b.to(dtype)[..., None, :]
    g_all = g.to(dtype)[..., :, None]
    I_p = I_p[..., :, None]
    outputs, variances = [], []
    for token in range(like.shape[1]):
        q = q_all[:, token]
        k = k_all[:, token]
        v = v_all[:, token]
        b = b_all[:, token]
        g = g_all[:, token]
        M, Ibar = (
            M * torch.exp(g) + k * v,
            Ibar * torch.exp(g) + b * k ** 2,
        )
        outputs.append((scale * (M * q / (I_p + Ibar)).sum(-2, keepdim=True)).expand(like.shape[0], like.shape[2], 1, size_v))
        if want_variance:
            variances.append((scale ** 2 * (q ** 2 / (I_p + Ibar)).sum(-2, keepdim=True)).expand(like.shape[0], like.shape[2], 1, size_v))
    empty = like.new_zeros(like.shape[0], 0, like.shape[2], size_v)
    output = torch.stack(outputs, 1)[:, :, :, 0].to(like.dtype) if outputs else empty
    variance = None
    if want_variance:
        variance = torch.stack(variances, 1)[:, :, :, 0].to(like.dtype) if variances else empty
    return output, variance, M, Ibar


def _native_forward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, b, g, I_p, M, Ibar, o, saved_M,
    saved_Ibar, sum0,
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
        I_p_h = I_p[head]
        M_h = M[sequence, head]
        Ibar_h = Ibar[sequence, head]
        for token in range(begin, end):
            if every and (token - begin) % every == 0:  # the backward pass restarts from here
                segment = begin // every + sequence + (token - begin) // every
                for i in range(size_k):
                    for j in range(size_v):
                        saved_M[segment, head][i, j] = M_h[i, j]
                for i in range(size_k):
                    for j in range(size_v):
                        saved_Ibar[segment, head][i, j] = Ibar_h[i, j]
            for i in range(0, size_k, 16):
                _native_fetch(q, token + 4, head, i)
                _native_fetch(k, token + 4, head, i)
                _native_fetch(g, token + 4, head, i)
            for j in range(0, size_v, 16):
                _native_fetch(v, token + 4, head, j)
                _native_fetch(b, token + 4, head, j)
                _native_fetch(o, token + 4, head, j)
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            b_t = b[token, head]
            g_t = g[token, head]
            o_t = o[token, head]
            for i in range(size_k):
                I_p_i = I_p_h[i]
                Ibar_h_row = Ibar_h[i]
                M_h_row = M_h[i]
                g_i = g_t[i]
                k_i = k_t[i]
                q_i = q_t[i]
                row0 = math.exp(g_i)
                row1 = k_i * k_i
                for j in range(size_v):
                    Ibar_ij = Ibar_h_row[j]
                    M_ij = M_h_row[j]
                    Ibar_new = Ibar_ij * row0 + b_t[j] * row1
                    M_new = M_ij * row0 + k_i * v_t[j]
                    sum0[j] += M_new * q_i * one / (I_p_i + Ibar_new)
                    M_h_row[j] = M_new
                    Ibar_h_row[j] = Ibar_new
            for j in range(size_v):
                o_t[j] = scale * sum0[j]
                sum0[j] = zero


def _native_backward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, b, g, I_p, saved_M, saved_Ibar,
    d_output, d_M, d_Ibar, d_q, d_k, d_v, d_b, d_g, d_I_p, past_M, past_Ibar, row0_, sum0, sum1, sum2, sum3,
    sum4, sum5, sum6, sum7,
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
        I_p_h = I_p[head]
        d_M_h = d_M[sequence, head]
        d_Ibar_h = d_Ibar[sequence, head]
        d_I_p_h = d_I_p[sequence, head]
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    past_M[0][i, j] = saved_M[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_Ibar[0][i, j] = saved_Ibar[segment, head][i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token + 4, head, i)
                    _native_fetch(k, token + 4, head, i)
                    _native_fetch(g, token + 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token + 4, head, j)
                    _native_fetch(b, token + 4, head, j)
                M_h = past_M[token - start]
                M_next = past_M[token - start + 1]
                Ibar_h = past_Ibar[token - start]
                Ibar_next = past_Ibar[token - start + 1]
                for i in range(size_k):
                    Ibar_h_row = Ibar_h[i]
                    M_h_row = M_h[i]
                    g_i = g_t[i]
                    k_i = k_t[i]
                    row0 = math.exp(g_i)
                    row1 = k_i * k_i
                    M_next_row = M_next[i]
                    Ibar_next_row = Ibar_next[i]
                    for j in range(size_v):
                        Ibar_ij = Ibar_h_row[j]
                        M_ij = M_h_row[j]
                        M_new = M_ij * row0 + k_i * v_t[j]
                        Ibar_new = Ibar_ij * row0 + b_t[j] * row1
                        M_next_row[j] = M_new
                        Ibar_next_row[j] = Ibar_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token - 4, head, i)
                    _native_fetch(k, token - 4, head, i)
                    _native_fetch(g, token - 4, head, i)
                    _native_fetch(d_q, token - 4, head, i)
                    _native_fetch(d_k, token - 4, head, i)
                    _native_fetch(d_g, token - 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token - 4, head, j)
                    _native_fetch(b, token - 4, head, j)
                    _native_fetch(d_output, token - 4, head, j)
                    _native_fetch(d_v, token - 4, head, j)
                    _native_fetch(d_b, token - 4, head, j)
                M_old = past_M[token - start]
                M_now = past_M[token - start + 1]
                Ibar_old = past_Ibar[token - start]
                Ibar_now = past_Ibar[token - start + 1]
                d_output_t = d_output[token, head]
                d_q_t = d_q[token, head]
                d_k_t = d_k[token, head]
                d_v_t = d_v[token, head]
                d_b_t = d_b[token, head]
                d_g_t = d_g[token, head]
                for i in range(size_k):
                    row0__i = math.exp(g_t[i])
                    row0_[i] = row0__i
                for i in range(size_k):
                    I_p_i = I_p_h[i]
                    Ibar_old_row = Ibar_old[i]
                    Ibar_now_row = Ibar_now[i]
                    M_old_row = M_old[i]
                    M_now_row = M_now[i]
                    d_Ibar_h_row = d_Ibar_h[i]
                    d_M_h_row = d_M_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0__i = row0_[i]
                    row1_ = q_i * scale
                    row2 = k_i_ * k_i_
                    sum0_i = zero
                    sum1_i = zero
                    sum2_i = zero
                    sum5_i = zero
                    sum6_i = zero
                    sum7_i = zero
                    for j in range(size_v):
                        Ibar_ij_ = Ibar_old_row[j]
                        Ibar_new_ij = Ibar_now_row[j]
                        M_ij_ = M_old_row[j]
                        M_new_ij = M_now_row[j]
                        d_Ibar_ij = d_Ibar_h_row[j]
                        d_M_ij = d_M_h_row[j]
                        x0 = one / (I_p_i + Ibar_new_ij)
                        x1 = d_output_t[j] * x0
                        x4 = M_new_ij * d_output_t[j] * row1_ * x0 * x0
                        x5 = d_Ibar_ij - x4
                        x2 = d_M_ij + row1_ * x1
                        x3 = row0__i * x2
                        x6 = row0__i * x5
                        sum0_i += M_new_ij * x1
                        sum1_i += b_t[j] * x5
                        sum2_i += v_t[j] * x2
                        sum3[j] += k_i_ * x2
                        sum4[j] += row2 * x5
                        sum5_i += M_ij_ * x2
                        sum6_i += Ibar_ij_ * x5
                        sum7_i += x4
                        d_M_h_row[j] = x3
                        d_Ibar_h_row[j] = x6
                    sum0[i] = sum0_i
                    sum1[i] = sum1_i
                    sum2[i] = sum2_i
                    sum5[i] = sum5_i
                    sum6[i] = sum6_i
                    sum7[i] = sum7_i
                for j in range(size_v):
                    d_v_t[j] = sum3[j]
                    d_b_t[j] = sum4[j]
                    sum3[j] = zero
                    sum4[j] = zero
                for i in range(size_k):
                    d_q_t[i] = scale * sum0[i]
                    d_k_t[i] = real(2) * k_t[i] * sum1[i] + sum2[i]
                    d_g_t[i] = row0_[i] * (sum5[i] + sum6[i])
                    d_I_p_h[i] += -sum7[i]


def _native_forward_variance_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, b, g, I_p, M, Ibar, o, variance,
    saved_M, saved_Ibar, sum0, sum1,
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
        I_p_h = I_p[head]
        M_h = M[sequence, head]
        Ibar_h = Ibar[sequence, head]
        for token in range(begin, end):
            if every and (token - begin) % every == 0:  # the backward pass restarts from here
                segment = begin // every + sequence + (token - begin) // every
                for i in range(size_k):
                    for j in range(size_v):
                        saved_M[segment, head][i, j] = M_h[i, j]
                for i in range(size_k):
                    for j in range(size_v):
                        saved_Ibar[segment, head][i, j] = Ibar_h[i, j]
            for i in range(0, size_k, 16):
                _native_fetch(q, token + 4, head, i)
                _native_fetch(k, token + 4, head, i)
                _native_fetch(g, token + 4, head, i)
            for j in range(0, size_v, 16):
                _native_fetch(v, token + 4, head, j)
                _native_fetch(b, token + 4, head, j)
                _native_fetch(o, token + 4, head, j)
                _native_fetch(variance, token + 4, head, j)
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            b_t = b[token, head]
            g_t = g[token, head]
            o_t = o[token, head]
            variance_t = variance[token, head]
            c0 = scale * scale
            for i in range(size_k):
                I_p_i = I_p_h[i]
                Ibar_h_row = Ibar_h[i]
                M_h_row = M_h[i]
                g_i = g_t[i]
                k_i = k_t[i]
                q_i = q_t[i]
                row0 = math.exp(g_i)
                row1 = k_i * k_i
                row2 = q_i * q_i
                for j in range(size_v):
                    Ibar_ij = Ibar_h_row[j]
                    M_ij = M_h_row[j]
                    M_new = M_ij * row0 + k_i * v_t[j]
                    Ibar_new = Ibar_ij * row0 + b_t[j] * row1
                    x0 = one / (I_p_i + Ibar_new)
                    sum0[j] += M_new * q_i * x0
                    sum1[j] += row2 * x0
                    M_h_row[j] = M_new
                    Ibar_h_row[j] = Ibar_new
            for j in range(size_v):
                o_t[j] = scale * sum0[j]
                variance_t[j] = c0 * sum1[j]
                sum0[j] = zero
                sum1[j] = zero


def _native_backward_variance_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, b, g, I_p, saved_M, saved_Ibar,
    d_output, d_variance, d_M, d_Ibar, d_q, d_k, d_v, d_b, d_g, d_I_p, past_M, past_Ibar, row0_, sum0, sum1,
    sum2, sum3, sum4, sum5, sum6, sum7, sum8,
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
        I_p_h = I_p[head]
        d_M_h = d_M[sequence, head]
        d_Ibar_h = d_Ibar[sequence, head]
        d_I_p_h = d_I_p[sequence, head]
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    past_M[0][i, j] = saved_M[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_Ibar[0][i, j] = saved_Ibar[segment, head][i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token + 4, head, i)
                    _native_fetch(k, token + 4, head, i)
                    _native_fetch(g, token + 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token + 4, head, j)
                    _native_fetch(b, token + 4, head, j)
                M_h = past_M[token - start]
                M_next = past_M[token - start + 1]
                Ibar_h = past_Ibar[token - start]
                Ibar_next = past_Ibar[token - start + 1]
                for i in range(size_k):
                    Ibar_h_row = Ibar_h[i]
                    M_h_row = M_h[i]
                    g_i = g_t[i]
                    k_i = k_t[i]
                    row0 = math.exp(g_i)
                    row1 = k_i * k_i
                    M_next_row = M_next[i]
                    Ibar_next_row = Ibar_next[i]
                    for j in range(size_v):
                        Ibar_ij = Ibar_h_row[j]
                        M_ij = M_h_row[j]
                        M_new = M_ij * row0 + k_i * v_t[j]
                        Ibar_new = Ibar_ij * row0 + b_t[j] * row1
                        M_next_row[j] = M_new
                        Ibar_next_row[j] = Ibar_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token - 4, head, i)
                    _native_fetch(k, token - 4, head, i)
                    _native_fetch(g, token - 4, head, i)
                    _native_fetch(d_q, token - 4, head, i)
                    _native_fetch(d_k, token - 4, head, i)
                    _native_fetch(d_g, token - 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token - 4, head, j)
                    _native_fetch(b, token - 4, head, j)
                    _native_fetch(d_output, token - 4, head, j)
                    _native_fetch(d_variance, token - 4, head, j)
                    _native_fetch(d_v, token - 4, head, j)
                    _native_fetch(d_b, token - 4, head, j)
                M_old = past_M[token - start]
                M_now = past_M[token - start + 1]
                Ibar_old = past_Ibar[token - start]
                Ibar_now = past_Ibar[token - start + 1]
                d_output_t = d_output[token, head]
                d_variance_t = d_variance[token, head]
                d_q_t = d_q[token, head]
                d_k_t = d_k[token, head]
                d_v_t = d_v[token, head]
                d_b_t = d_b[token, head]
                d_g_t = d_g[token, head]
                c0 = scale * scale
                c1 = real(2) * c0
                for i in range(size_k):
                    row0__i = math.exp(g_t[i])
                    row0_[i] = row0__i
                for i in range(size_k):
                    I_p_i = I_p_h[i]
                    Ibar_old_row = Ibar_old[i]
                    Ibar_now_row = Ibar_now[i]
                    M_old_row = M_old[i]
                    M_now_row = M_now[i]
                    d_Ibar_h_row = d_Ibar_h[i]
                    d_M_h_row = d_M_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0__i = row0_[i]
                    row1_ = q_i * scale
                    row2 = c0 * q_i * q_i
                    row3 = k_i_ * k_i_
                    sum0_i = zero
                    sum1_i = zero
                    sum2_i = zero
                    sum3_i = zero
                    sum6_i = zero
                    sum7_i = zero
                    sum8_i = zero
                    for j in range(size_v):
                        Ibar_ij_ = Ibar_old_row[j]
                        Ibar_new_ij = Ibar_now_row[j]
                        M_ij_ = M_old_row[j]
                        M_new_ij = M_now_row[j]
                        d_Ibar_ij = d_Ibar_h_row[j]
                        d_M_ij = d_M_h_row[j]
                        x0 = one / (I_p_i + Ibar_new_ij)
                        x1 = d_output_t[j] * x0
                        x4 = x0 * x0 * (-M_new_ij * d_output_t[j] * row1_ - d_variance_t[j] * row2)
                        x5 = d_Ibar_ij + x4
                        x2 = d_M_ij + row1_ * x1
                        x3 = row0__i * x2
                        x6 = row0__i * x5
                        sum0_i += M_new_ij * x1
                        sum1_i += d_variance_t[j] * x0
                        sum2_i += b_t[j] * x5
                        sum3_i += v_t[j] * x2
                        sum4[j] += k_i_ * x2
                        sum5[j] += row3 * x5
                        sum6_i += M_ij_ * x2
                        sum7_i += Ibar_ij_ * x5
                        sum8_i += x4
                        d_M_h_row[j] = x3
                        d_Ibar_h_row[j] = x6
                    sum0[i] = sum0_i
                    sum1[i] = sum1_i
                    sum2[i] = sum2_i
                    sum3[i] = sum3_i
                    sum6[i] = sum6_i
                    sum7[i] = sum7_i
                    sum8[i] = sum8_i
                for j in range(size_v):
                    d_v_t[j] = sum4[j]
                    d_b_t[j] = sum5[j]
                    sum4[j] = zero
                    sum5[j] = zero
                for i in range(size_k):
                    d_q_t[i] = c1 * q_t[i] * sum1[i] + scale * sum0[i]
                    d_k_t[i] = real(2) * k_t[i] * sum2[i] + sum3[i]
                    d_g_t[i] = row0_[i] * (sum6[i] + sum7[i])
                    d_I_p_h[i] += sum8[i]


# Loop, and the shapes of its scratch arrays, by (pass, with variance).
_NATIVE = {
    ('forward', False): (
        _native_forward_loop,
        lambda size_k, size_v, every: [(size_v,)],
    ),
    ('backward', False): (
        _native_backward_loop,
        lambda size_k, size_v, every: [(every + 1, size_k, size_v,), (every + 1, size_k, size_v,), (size_k,), (size_k,), (size_k,), (size_k,), (size_v,), (size_v,), (size_k,), (size_k,), (size_k,)],
    ),
    ('forward', True): (
        _native_forward_variance_loop,
        lambda size_k, size_v, every: [(size_v,), (size_v,)],
    ),
    ('backward', True): (
        _native_backward_variance_loop,
        lambda size_k, size_v, every: [(every + 1, size_k, size_v,), (every + 1, size_k, size_v,), (size_k,), (size_k,), (size_k,), (size_k,), (size_k,), (size_v,), (size_v,), (size_k,), (size_k,), (size_k,)],
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


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


_EXACT = "ieee" if torch.version.hip else "tf32x3"  # how float32 is multiplied: AMD GPUs do not split it so


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
    q_in, k_in, v_in, b_in, g_in, I_p_in, M_initial, Ibar_initial, o, variance, M_final, Ibar_final, M_saved,
    Ibar_saved,
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
    I_p = tl.load(I_p_in + i_h * K + r_k, mask=r_k < K, other=0.0)
    q_next = tl.load(q_in + at * K + r_k, mask=r_k < K, other=0.0)
    k_next = tl.load(k_in + at * K + r_k, mask=r_k < K, other=0.0)
    v_next = tl.load(v_in + at * V + r_v, mask=r_v < V, other=0.0)
    b_next = tl.load(b_in + at * V + r_v, mask=r_v < V, other=0.0)
    g_next = tl.load(g_in + at * K + r_k, mask=r_k < K, other=0.0)
    M = tl.load(M_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0)
    Ibar = tl.load(Ibar_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0)
    M = M.to(tl.float32)
    Ibar = Ibar.to(tl.float32)
    I_p = I_p.to(tl.float32)[:, None]
    for t in range(0, steps):
        at = (begin + t) * H + i_h
        ahead = (begin + tl.minimum(t + 1, steps - 1)) * H + i_h
        q = q_next.to(tl.float32)[:, None]
        k = k_next.to(tl.float32)[:, None]
        v = v_next.to(tl.float32)[None, :]
        b = b_next.to(tl.float32)[None, :]
        g = g_next.to(tl.float32)[:, None]
        q_next = tl.load(q_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        k_next = tl.load(k_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        v_next = tl.load(v_in + ahead * V + r_v, mask=r_v < V, other=0.0)
        b_next = tl.load(b_in + ahead * V + r_v, mask=r_v < V, other=0.0)
        g_next = tl.load(g_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        if SAVE:
            if t % EVERY == 0:
                slot = (begin // EVERY + i_n + t // EVERY) * H + i_h
                tl.store(M_saved + slot * K * V + t_kv, (M).to(M_saved.dtype.element_ty), mask=m_kv)
                tl.store(Ibar_saved + slot * K * V + t_kv, (Ibar).to(Ibar_saved.dtype.element_ty), mask=m_kv)
        row0 = tl.exp(g)
        row1 = k * k
        Ibar_new = Ibar * row0 + b * row1
        M_new = M * row0 + k * v
        if OUTPUT:
            x0 = 1.0 / (I_p + Ibar_new)
            sum0 = tl.sum(_live(M_new * q * x0, m_k, EXACT_K), axis=0)[None, :]
            tl.store(o + at * V + o_v, (scale * sum0).to(o.dtype.element_ty), mask=m_v)
        if VARIANCE:
            c0 = scale * scale
            row2 = q * q
            x0 = 1.0 / (I_p + Ibar_new)
            sum1 = tl.sum(_live(row2 * x0, m_k, EXACT_K), axis=0)[None, :]
            tl.store(variance + at * V + o_v, (c0 * sum1).to(variance.dtype.element_ty), mask=m_v)
        M_after = M_new
        Ibar_after = Ibar_new
        M = M_after
        Ibar = Ibar_after
    if OUTPUT:
        tl.store(M_final + i_nh * K * V + t_kv, (M).to(M_final.dtype.element_ty), mask=m_kv)
        tl.store(Ibar_final + i_nh * K * V + t_kv, (Ibar).to(Ibar_final.dtype.element_ty), mask=m_kv)


@_kernel(do_not_specialize=["T", "EVERY", "TOTAL"])
def _sequential_backward_kernel(
    q_in_, k_in_, v_in_, b_in_, g_in_, I_p_in_, M_saved_, Ibar_saved_, M_past, Ibar_past, d_output_in,
    d_M_final, d_Ibar_final, d_q_out, d_k_out, d_v_out, d_b_out, d_g_out, d_I_p_out, d_M_initial,
    d_Ibar_initial,
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
    I_p = tl.load(I_p_in_ + i_h * K + r_k, mask=r_k < K, other=0.0)
    I_p = I_p.to(tl.float32)[:, None]
    d_M = tl.load(d_M_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    d_Ibar = tl.load(d_Ibar_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    sum_I_p = zero_k
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (begin // EVERY + i_n + segment) * H + i_h
        M = tl.load(M_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        Ibar = tl.load(Ibar_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        # The states of this segment once more.
        at = first * H + i_h
        k_next_ = tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next_ = tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        b_next_ = tl.load(b_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next_ = tl.load(g_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        for t in range(0, count):
            at = (first + t) * H + i_h
            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            tl.store(M_past + place * BK * BV + t_past, M)
            tl.store(Ibar_past + place * BK * BV + t_past, Ibar)
            k = k_next_.to(tl.float32)[:, None]
            v = v_next_.to(tl.float32)[None, :]
            b = b_next_.to(tl.float32)[None, :]
            g = g_next_.to(tl.float32)[:, None]
            k_next_ = tl.load(k_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next_ = tl.load(v_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            b_next_ = tl.load(b_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next_ = tl.load(g_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            row0_ = tl.exp(g)
            row1_ = k * k
            Ibar_new_ = Ibar * row0_ + b * row1_
            M_new_ = M * row0_ + k * v
            M_after_ = M_new_
            Ibar_after_ = Ibar_new_
            M = M_after_
            Ibar = Ibar_after_
        tl.debug_barrier()  # other threads of this program read what these wrote
        # Cotangents, last token first.
        at = (first + count - 1) * H + i_h
        q_next_ = tl.load(q_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        k_next__ = tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next__ = tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        b_next__ = tl.load(b_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next__ = tl.load(g_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        d_output_next = tl.load(d_output_in + at * V + r_v, mask=r_v < V, other=0.0)
        for back_t in range(0, count):
            t = count - 1 - back_t
            at = (first + t) * H + i_h
            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            M_old = tl.load(M_past + place * BK * BV + t_past)
            Ibar_old = tl.load(Ibar_past + place * BK * BV + t_past)
            q = q_next_.to(tl.float32)[:, None]
            k = k_next__.to(tl.float32)[:, None]
            v = v_next__.to(tl.float32)[None, :]
            b = b_next__.to(tl.float32)[None, :]
            g = g_next__.to(tl.float32)[:, None]
            q_next_ = tl.load(q_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            k_next__ = tl.load(k_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next__ = tl.load(v_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            b_next__ = tl.load(b_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next__ = tl.load(g_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            d_output = d_output_next.to(tl.float32)[None, :]
            d_output_next = tl.load(d_output_in + ahead * V + r_v, mask=r_v < V, other=0.0)
            row0__ = tl.exp(g)
            x0_ = 1.0 / (I_p + Ibar)
            x1 = d_output * x0_
            sum0_ = tl.sum(_live(M * x1, m_v, EXACT_V), axis=1)[:, None]
            row1__ = q * scale
            x4 = M * d_output * row1__ * x0_ * x0_
            x5 = d_Ibar - x4
            sum1_ = tl.sum(_live(b * x5, m_v, EXACT_V), axis=1)[:, None]
            x2 = d_M + row1__ * x1
            sum2 = tl.sum(_live(v * x2, m_v, EXACT_V), axis=1)[:, None]
            sum3 = tl.sum(_live(k * x2, m_k, EXACT_K), axis=0)[None, :]
            row2_ = k * k
            sum4 = tl.sum(_live(row2_ * x5, m_k, EXACT_K), axis=0)[None, :]
            sum5 = tl.sum(_live(M_old * x2, m_v, EXACT_V), axis=1)[:, None]
            sum6 = tl.sum(_live(Ibar_old * x5, m_v, EXACT_V), axis=1)[:, None]
            sum7 = tl.sum(_live(x4, m_v, EXACT_V), axis=1)[:, None]
            x3 = row0__ * x2
            x6 = row0__ * x5
            tl.store(d_q_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (scale * sum0_).to(d_q_out.dtype.element_ty), mask=m_k)
            tl.store(d_k_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * k * sum1_ + sum2).to(d_k_out.dtype.element_ty), mask=m_k)
            tl.store(d_v_out + at * V + o_v, (sum3).to(d_v_out.dtype.element_ty), mask=m_v)
            tl.store(d_b_out + at * V + o_v, (sum4).to(d_b_out.dtype.element_ty), mask=m_v)
            tl.store(d_g_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (row0__ * (sum5 + sum6)).to(d_g_out.dtype.element_ty), mask=m_k)
            sum_I_p += -1.0 * sum7
            d_M_after = x3
            d_Ibar_after = x6
            d_M = d_M_after
            d_Ibar = d_Ibar_after
            M = M_old
            Ibar = Ibar_old
        tl.debug_barrier()
    tl.store(d_I_p_out + shared * K + o_k, (sum_I_p).to(d_I_p_out.dtype.element_ty), mask=m_k)
    tl.store(d_M_initial + i_nh * K * V + t_kv, (d_M).to(d_M_initial.dtype.element_ty), mask=m_kv)
    tl.store(d_Ibar_initial + i_nh * K * V + t_kv, (d_Ibar).to(d_Ibar_initial.dtype.element_ty), mask=m_kv)


@_kernel(do_not_specialize=["T", "EVERY", "TOTAL"])
def _sequential_backward_variance_kernel(
    q_in__, k_in__, v_in__, b_in__, g_in__, I_p_in__, M_saved__, Ibar_saved__, M_past_, Ibar_past_,
    d_output_in_, d_variance_in, d_M_final_, d_Ibar_final_, d_q_out_, d_k_out_, d_v_out_, d_b_out_, d_g_out_,
    d_I_p_out_, d_M_initial_, d_Ibar_initial_,
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
    I_p = tl.load(I_p_in__ + i_h * K + r_k, mask=r_k < K, other=0.0)
    I_p = I_p.to(tl.float32)[:, None]
    d_M_ = tl.load(d_M_final_ + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    d_Ibar_ = tl.load(d_Ibar_final_ + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    sum_I_p_ = zero_k
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (begin // EVERY + i_n + segment) * H + i_h
        M = tl.load(M_saved__ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        Ibar = tl.load(Ibar_saved__ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        # The states of this segment once more.
        at = first * H + i_h
        k_next___ = tl.load(k_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next___ = tl.load(v_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        b_next___ = tl.load(b_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next___ = tl.load(g_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        for t in range(0, count):
            at = (first + t) * H + i_h
            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            tl.store(M_past_ + place * BK * BV + t_past, M)
            tl.store(Ibar_past_ + place * BK * BV + t_past, Ibar)
            k = k_next___.to(tl.float32)[:, None]
            v = v_next___.to(tl.float32)[None, :]
            b = b_next___.to(tl.float32)[None, :]
            g = g_next___.to(tl.float32)[:, None]
            k_next___ = tl.load(k_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next___ = tl.load(v_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            b_next___ = tl.load(b_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next___ = tl.load(g_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            row0___ = tl.exp(g)
            row1___ = k * k
            Ibar_new__ = Ibar * row0___ + b * row1___
            M_new__ = M * row0___ + k * v
            M_after__ = M_new__
            Ibar_after__ = Ibar_new__
            M = M_after__
            Ibar = Ibar_after__
        tl.debug_barrier()  # other threads of this program read what these wrote
        # Cotangents, last token first.
        at = (first + count - 1) * H + i_h
        q_next__ = tl.load(q_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        k_next____ = tl.load(k_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next____ = tl.load(v_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        b_next____ = tl.load(b_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next____ = tl.load(g_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        d_output__next = tl.load(d_output_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        d_variance_next = tl.load(d_variance_in + at * V + r_v, mask=r_v < V, other=0.0)
        for back_t in range(0, count):
            t = count - 1 - back_t
            at = (first + t) * H + i_h
            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            M_old_ = tl.load(M_past_ + place * BK * BV + t_past)
            Ibar_old_ = tl.load(Ibar_past_ + place * BK * BV + t_past)
            q = q_next__.to(tl.float32)[:, None]
            k = k_next____.to(tl.float32)[:, None]
            v = v_next____.to(tl.float32)[None, :]
            b = b_next____.to(tl.float32)[None, :]
            g = g_next____.to(tl.float32)[:, None]
            q_next__ = tl.load(q_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            k_next____ = tl.load(k_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next____ = tl.load(v_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            b_next____ = tl.load(b_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next____ = tl.load(g_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            d_output_ = d_output__next.to(tl.float32)[None, :]
            d_output__next = tl.load(d_output_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            d_variance = d_variance_next.to(tl.float32)[None, :]
            d_variance_next = tl.load(d_variance_in + ahead * V + r_v, mask=r_v < V, other=0.0)
            c0_ = scale * scale
            c1 = 2.0 * c0_
            row0____ = tl.exp(g)
            x0__ = 1.0 / (I_p + Ibar)
            x1_ = d_output_ * x0__
            sum0__ = tl.sum(_live(M * x1_, m_v, EXACT_V), axis=1)[:, None]
            sum1__ = tl.sum(_live(d_variance * x0__, m_v, EXACT_V), axis=1)[:, None]
            row1____ = q * scale
            row2__ = c0_ * q * q
            x4_ = x0__ * x0__ * (-1.0 * M * d_output_ * row1____ - d_variance * row2__)
            x5_ = d_Ibar_ + x4_
            sum2_ = tl.sum(_live(b * x5_, m_v, EXACT_V), axis=1)[:, None]
            x2_ = d_M_ + row1____ * x1_
            sum3_ = tl.sum(_live(v * x2_, m_v, EXACT_V), axis=1)[:, None]
            sum4_ = tl.sum(_live(k * x2_, m_k, EXACT_K), axis=0)[None, :]
            row3 = k * k
            sum5_ = tl.sum(_live(row3 * x5_, m_k, EXACT_K), axis=0)[None, :]
            sum6_ = tl.sum(_live(M_old_ * x2_, m_v, EXACT_V), axis=1)[:, None]
            sum7_ = tl.sum(_live(Ibar_old_ * x5_, m_v, EXACT_V), axis=1)[:, None]
            sum8 = tl.sum(_live(x4_, m_v, EXACT_V), axis=1)[:, None]
            x3_ = row0____ * x2_
            x6_ = row0____ * x5_
            tl.store(d_q_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (c1 * q * sum1__ + scale * sum0__).to(d_q_out_.dtype.element_ty), mask=m_k)
            tl.store(d_k_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * k * sum2_ + sum3_).to(d_k_out_.dtype.element_ty), mask=m_k)
            tl.store(d_v_out_ + at * V + o_v, (sum4_).to(d_v_out_.dtype.element_ty), mask=m_v)
            tl.store(d_b_out_ + at * V + o_v, (sum5_).to(d_b_out_.dtype.element_ty), mask=m_v)
            tl.store(d_g_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (row0____ * (sum6_ + sum7_)).to(d_g_out_.dtype.element_ty), mask=m_k)
            sum_I_p_ += sum8
            d_M__after = x3_
            d_Ibar__after = x6_
            d_M_ = d_M__after
            d_Ibar_ = d_Ibar__after
            M = M_old_
            Ibar = Ibar_old_
        tl.debug_barrier()
    tl.store(d_I_p_out_ + shared * K + o_k, (sum_I_p_).to(d_I_p_out_.dtype.element_ty), mask=m_k)
    tl.store(d_M_initial_ + i_nh * K * V + t_kv, (d_M_).to(d_M_initial_.dtype.element_ty), mask=m_kv)
    tl.store(d_Ibar_initial_ + i_nh * K * V + t_kv, (d_Ibar_).to(d_Ibar_initial_.dtype.element_ty), mask=m_kv)


@_kernel
def _channels(i_k, o_v, m_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Key channels of tile ``i_k``: as a vector, as a column, which there are; elements of a state, and which there are."""
    r_k = i_k * BK + tl.arange(0, BK)
    o_k = r_k[:, None]
    m_k = o_k < K
    return r_k, o_k, m_k, o_k * V + o_v, m_k & m_v


@_kernel
def _steps(log_decay, live):
    """Log decays; exp(-40) is nothing beside 1, and a longer step would only cost the sums their digits. NaN stays."""
    log_decay = tl.where(log_decay < -40.0, -40.0, log_decay)
    return tl.where(live, tl.where(log_decay > 0.0, 0.0, log_decay), 0.0)


@_kernel(do_not_specialize=["T"])
def _ends_kernel(
    q_in, k_in, v_in, b_in, g_in, I_p_in, M_end, Ibar_end, product_0_end,
    offsets, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """States at the end of every chunk that starts from zeros, by matmuls over 32 tokens; products of its decays."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = pid // NV % NK
    i_n = (pid // (NV * NK) // H).to(tl.int64)
    i_h = pid // (NV * NK) % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    o_k = i_k * BK + tl.arange(0, BK)[None, :]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    m_k, m_v = o_k < K, o_v < V
    t_kv = (i_k * BK + tl.arange(0, BK))[:, None] * V + o_v
    m_kv = ((i_k * BK + tl.arange(0, BK))[:, None] < K) & m_v
    M = tl.zeros([BK, BV], tl.float32)
    Ibar = tl.zeros([BK, BV], tl.float32)
    behind_0 = tl.zeros([1, BK], tl.float32)
    for back in range(0, tl.cdiv(steps, 32)):
        place = steps - 1 - back * 32 - tl.arange(0, 32)[:, None]  # the last token first
        live = place >= 0
        at = (begin + tl.maximum(place, 0)) * H + i_h
        k = tl.load(k_in + at * K + o_k, mask=live & m_k, other=0.0).to(tl.float32)
        v = tl.load(v_in + at * V + o_v, mask=live & m_v, other=0.0).to(tl.float32)
        b = tl.load(b_in + at * V + o_v, mask=live & m_v, other=0.0).to(tl.float32)
        g = tl.load(g_in + at * K + o_k, mask=live & m_k, other=0.0).to(tl.float32)
        step = _steps(g, live)
        total = tl.cumsum(step, axis=0)
        kept_0 = tl.exp(behind_0 + (total - step))
        behind_0 += tl.sum(step, axis=0)[None, :]
        key = tl.where(live, (k) * kept_0, 0.0)
        value = tl.where(live, (v), 0.0)
        M = tl.dot(tl.trans(key), value, M, input_precision=PRECISION)
        key = tl.where(live, (k * k) * kept_0, 0.0)
        value = tl.where(live, (b), 0.0)
        Ibar = tl.dot(tl.trans(key), value, Ibar, input_precision=PRECISION)
    tl.store(M_end + i_nh * K * V + t_kv, M, mask=m_kv)
    tl.store(Ibar_end + i_nh * K * V + t_kv, Ibar, mask=m_kv)
    if i_v == 0:
        tl.store(product_0_end + i_nh * K + o_k, tl.exp(behind_0), mask=m_k)


@_kernel(do_not_specialize=["H"])
def _links_kernel(
    ends, products, initial, final, firsts, H,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, DECAYS: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):
    """In place of what each chunk makes of zeros, what it starts from: S' = product S + end.

    A state has SIZE numbers a head, its decay DECAYS, of which number i takes the one of i / STRIDE. REVERSE: from the last
    chunk, cotangents at its end in place of those that its own tokens leave at its start.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    first = tl.load(firsts + i_nh // H)
    count = (tl.load(firsts + i_nh // H + 1) - first).to(tl.int32)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = o < SIZE
    o_d = o // STRIDE % DECAYS
    if initial is None:
        S = tl.zeros([BLOCK], tl.float32)
    else:
        S = tl.load(initial + i_nh * SIZE + o, mask=live, other=0.0).to(tl.float32)
    for i in range(0, count):
        if REVERSE:
            chunk = first + count - 1 - i
        else:
            chunk = first + i
        row = chunk * H + i_nh % H
        end = tl.load(ends + row * SIZE + o, mask=live, other=0.0)
        tl.store(ends + row * SIZE + o, S, mask=live)
        if products is not None:
            S = S * tl.load(products + row * DECAYS + o_d, mask=live, other=0.0)
        S += end
    if final is not None:
        tl.store(final + i_nh * SIZE + o, S, mask=live)


@_kernel(do_not_specialize=["T", "SUB"])
def _segment_kernel(
    q_in, k_in, v_in, b_in, g_in, I_p_in, M_initial, Ibar_initial, o, variance, M_saved, Ibar_saved,
    offsets, scale, T, SUB, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, EVERY: tl.constexpr,
    OUTPUT: tl.constexpr, VARIANCE: tl.constexpr, SAVE: tl.constexpr,
):
    """Tokens of a chunk forward from its start; SAVE keeps the states before every EVERY-th of them."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K % BK == 0
    EXACT_V: tl.constexpr = V % BV == 0
    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    r_v = i_v * BV + tl.arange(0, BV)
    o_v = r_v[None, :]
    m_v = o_v < V
    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)
    I_p_tiles = ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        I_p_tiles = I_p_tiles + (tl.load(I_p_in + i_h * K + r_k, mask=r_k < K, other=0.0),)
    I_p_given, I_p_tiles = I_p_tiles, ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        I_p_tiles = I_p_tiles + (I_p_given[i_k].to(tl.float32)[:, None],)
    M_tiles = ()
    Ibar_tiles = ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        M_tiles = M_tiles + (tl.load(M_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
        Ibar_tiles = Ibar_tiles + (tl.load(Ibar_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
    for segment in range(0, tl.cdiv(steps, EVERY)):
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        if SAVE:
            slot = (i_n * SUB + segment) * H + i_h
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                tl.store(M_saved + slot * K * V + t_kv, (M_tiles[i_k]).to(M_saved.dtype.element_ty), mask=m_kv)
                tl.store(Ibar_saved + slot * K * V + t_kv, (Ibar_tiles[i_k]).to(Ibar_saved.dtype.element_ty), mask=m_kv)
        q_rows = ()
        k_rows = ()
        v_rows = ()
        b_rows = ()
        g_rows = ()
        for i_t in tl.static_range(EVERY):  # everything is loaded before it is used
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            v_rows = v_rows + (tl.load(v_in + at * V + r_v, mask=r_v < V, other=0.0),)
            b_rows = b_rows + (tl.load(b_in + at * V + r_v, mask=r_v < V, other=0.0),)
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                q_rows = q_rows + (tl.load(q_in + at * K + r_k, mask=r_k < K, other=0.0),)
                k_rows = k_rows + (tl.load(k_in + at * K + r_k, mask=r_k < K, other=0.0),)
                g_rows = g_rows + (tl.load(g_in + at * K + r_k, mask=r_k < K, other=0.0),)
        for i_t in tl.static_range(EVERY):
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            live = count > i_t
            v = v_rows[i_t].to(tl.float32)[None, :]
            b = b_rows[i_t].to(tl.float32)[None, :]
            Ibar_new_tiles = ()
            M_new_tiles = ()
            M_tiles_after = ()
            Ibar_tiles_after = ()
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                g = g_rows[i_t * NK + i_k].to(tl.float32)[:, None]
                row0 = tl.exp(g)
                k = k_rows[i_t * NK + i_k].to(tl.float32)[:, None]
                row1 = k * k
                Ibar = Ibar_tiles[i_k]
                Ibar_new = Ibar * row0 + b * row1
                M = M_tiles[i_k]
                M_new = M * row0 + k * v
                Ibar_new_tiles = Ibar_new_tiles + (Ibar_new,)
                M_new_tiles = M_new_tiles + (M_new,)
                M_tiles_after = M_tiles_after + (M_new,)
                Ibar_tiles_after = Ibar_tiles_after + (Ibar_new,)
            if OUTPUT:
                for i_k in tl.static_range(NK):
                    r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                    I_p = I_p_tiles[i_k]
                    Ibar_new = Ibar_new_tiles[i_k]
                    x0 = 1.0 / (I_p + Ibar_new)
                    M_new = M_new_tiles[i_k]
                    q = q_rows[i_t * NK + i_k].to(tl.float32)[:, None]
                    part = _live(M_new * q * x0, m_k, EXACT_K)
                    sum0 = part if i_k == 0 else sum0 + part
                sum0 = tl.sum(sum0, axis=0)[None, :]
                tl.store(o + at * V + o_v, (scale * sum0).to(o.dtype.element_ty), mask=(m_v & live) != 0)
            if VARIANCE:
                c0 = scale * scale
                for i_k in tl.static_range(NK):
                    r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                    q = q_rows[i_t * NK + i_k].to(tl.float32)[:, None]
                    row2 = q * q
                    I_p = I_p_tiles[i_k]
                    Ibar_new = Ibar_new_tiles[i_k]
                    x0 = 1.0 / (I_p + Ibar_new)
                    part = _live(row2 * x0, m_k, EXACT_K)
                    sum1 = part if i_k == 0 else sum1 + part
                sum1 = tl.sum(sum1, axis=0)[None, :]
                tl.store(variance + at * V + o_v, (c0 * sum1).to(variance.dtype.element_ty), mask=(m_v & live) != 0)
            M_tiles = M_tiles_after
            Ibar_tiles = Ibar_tiles_after


@_kernel(do_not_specialize=["T", "TOTAL", "SUB"])
def _segment_backward_kernel(
    q_in_, k_in_, v_in_, b_in_, g_in_, I_p_in_, M_saved_, Ibar_saved_, d_output_in, d_M_final, d_Ibar_final,
    d_q_out, d_k_out, d_v_out, d_b_out, d_g_out, d_I_p_out, d_M_initial, d_Ibar_initial,
    offsets, scale, T, TOTAL, SUB, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, EVERY: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Cotangents of a chunk's inputs with INPUTS, of parameters then, and of its start where that is not None."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K % BK == 0
    EXACT_V: tl.constexpr = V % BV == 0
    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    r_v = i_v * BV + tl.arange(0, BV)
    o_v = r_v[None, :]
    m_v = o_v < V
    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)
    NH = tl.num_programs(0) // NV
    shared = i_v * NH + i_nh  # row of what value blocks share
    I_p_tiles = ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        I_p_tiles = I_p_tiles + (tl.load(I_p_in_ + i_h * K + r_k, mask=r_k < K, other=0.0),)
    I_p_given_, I_p_tiles = I_p_tiles, ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        I_p_tiles = I_p_tiles + (I_p_given_[i_k].to(tl.float32)[:, None],)
    if d_M_final is None:
        d_M_tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_M_tiles = d_M_tiles + (zero_kv,)
    else:
        d_M_tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_M_tiles = d_M_tiles + (tl.load(d_M_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
    if d_Ibar_final is None:
        d_Ibar_tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_Ibar_tiles = d_Ibar_tiles + (zero_kv,)
    else:
        d_Ibar_tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_Ibar_tiles = d_Ibar_tiles + (tl.load(d_Ibar_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
    sum_I_p = ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        sum_I_p = sum_I_p + (zero_k,)
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (i_n * SUB + segment) * H + i_h
        M_past = ()
        Ibar_past = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            M_past = M_past + (tl.load(M_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
            Ibar_past = Ibar_past + (tl.load(Ibar_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
        q_rows_ = ()
        k_rows_ = ()
        v_rows_ = ()
        b_rows_ = ()
        g_rows_ = ()
        d_output_rows = ()
        for i_t in tl.static_range(EVERY):  # everything is loaded before it is used
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            v_rows_ = v_rows_ + (tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0),)
            b_rows_ = b_rows_ + (tl.load(b_in_ + at * V + r_v, mask=r_v < V, other=0.0),)
            d_output_rows = d_output_rows + (tl.load(d_output_in + at * V + r_v, mask=r_v < V, other=0.0),)
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                q_rows_ = q_rows_ + (tl.load(q_in_ + at * K + r_k, mask=r_k < K, other=0.0),)
                k_rows_ = k_rows_ + (tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0),)
                g_rows_ = g_rows_ + (tl.load(g_in_ + at * K + r_k, mask=r_k < K, other=0.0),)
        for i_t in tl.static_range(EVERY):
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            v = v_rows_[i_t].to(tl.float32)[None, :]
            b = b_rows_[i_t].to(tl.float32)[None, :]
            M_past_after = ()
            Ibar_past_after = ()
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                g = g_rows_[i_t * NK + i_k].to(tl.float32)[:, None]
                row0_ = tl.exp(g)
                k = k_rows_[i_t * NK + i_k].to(tl.float32)[:, None]
                row1_ = k * k
                Ibar = Ibar_past[i_t * NK + i_k]
                Ibar_new_ = Ibar * row0_ + b * row1_
                M = M_past[i_t * NK + i_k]
                M_new_ = M * row0_ + k * v
                M_past_after = M_past_after + (M_new_,)
                Ibar_past_after = Ibar_past_after + (Ibar_new_,)
            M_past = M_past + M_past_after
            Ibar_past = Ibar_past + Ibar_past_after
        for i_t in tl.static_range(EVERY - 1, -1, -1):
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            live = count > i_t
            v = v_rows_[i_t].to(tl.float32)[None, :]
            b = b_rows_[i_t].to(tl.float32)[None, :]
            d_output = d_output_rows[i_t].to(tl.float32)[None, :]
            d_M_tiles_after = ()
            d_Ibar_tiles_after = ()
            sum_I_p_after = ()
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                g = g_rows_[i_t * NK + i_k].to(tl.float32)[:, None]
                row0__ = tl.exp(g)
                I_p = I_p_tiles[i_k]
                Ibar = Ibar_past[(i_t + 1) * NK + i_k]
                x0_ = 1.0 / (I_p + Ibar)
                x1 = d_output * x0_
                M = M_past[(i_t + 1) * NK + i_k]
                sum0_ = tl.sum(_live(M * x1, m_v, EXACT_V), axis=1)[:, None]
                q = q_rows_[i_t * NK + i_k].to(tl.float32)[:, None]
                row1__ = q * scale
                x4 = M * d_output * row1__ * x0_ * x0_
                d_Ibar = d_Ibar_tiles[i_k]
                x5 = d_Ibar - x4
                sum1_ = tl.sum(_live(b * x5, m_v, EXACT_V), axis=1)[:, None]
                d_M = d_M_tiles[i_k]
                x2 = d_M + row1__ * x1
                sum2 = tl.sum(_live(v * x2, m_v, EXACT_V), axis=1)[:, None]
                k = k_rows_[i_t * NK + i_k].to(tl.float32)[:, None]
                part = _live(k * x2, m_k, EXACT_K)
                sum3 = part if i_k == 0 else sum3 + part
                row2_ = k * k
                part = _live(row2_ * x5, m_k, EXACT_K)
                sum4 = part if i_k == 0 else sum4 + part
                M_old = M_past[i_t * NK + i_k]
                sum5 = tl.sum(_live(M_old * x2, m_v, EXACT_V), axis=1)[:, None]
                Ibar_old = Ibar_past[i_t * NK + i_k]
                sum6 = tl.sum(_live(Ibar_old * x5, m_v, EXACT_V), axis=1)[:, None]
                sum7 = tl.sum(_live(x4, m_v, EXACT_V), axis=1)[:, None]
                x3 = row0__ * x2
                x6 = row0__ * x5
                d_M_tiles_after = d_M_tiles_after + (tl.where(live, x3, d_M_tiles[i_k]),)
                d_Ibar_tiles_after = d_Ibar_tiles_after + (tl.where(live, x6, d_Ibar_tiles[i_k]),)
                if INPUTS:
                    tl.store(d_q_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (scale * sum0_).to(d_q_out.dtype.element_ty), mask=(m_k & live) != 0)
                    tl.store(d_k_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * k * sum1_ + sum2).to(d_k_out.dtype.element_ty), mask=(m_k & live) != 0)
                    tl.store(d_g_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (row0__ * (sum5 + sum6)).to(d_g_out.dtype.element_ty), mask=(m_k & live) != 0)
                sum_I_p_after = sum_I_p_after + (sum_I_p[i_k] + tl.where(live, -1.0 * sum7, 0.0) if INPUTS else sum_I_p[i_k],)
            sum3 = tl.sum(sum3, axis=0)[None, :]
            sum4 = tl.sum(sum4, axis=0)[None, :]
            if INPUTS:
                tl.store(d_v_out + at * V + o_v, (sum3).to(d_v_out.dtype.element_ty), mask=(m_v & live) != 0)
                tl.store(d_b_out + at * V + o_v, (sum4).to(d_b_out.dtype.element_ty), mask=(m_v & live) != 0)
            d_M_tiles = d_M_tiles_after
            d_Ibar_tiles = d_Ibar_tiles_after
            sum_I_p = sum_I_p_after
    if INPUTS:
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            tl.store(d_I_p_out + shared * K + o_k, (sum_I_p[i_k]).to(d_I_p_out.dtype.element_ty), mask=m_k)
    if d_M_initial is not None:
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            tl.store(d_M_initial + i_nh * K * V + t_kv, (d_M_tiles[i_k]).to(d_M_initial.dtype.element_ty), mask=m_kv)
    if d_Ibar_initial is not None:
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            tl.store(d_Ibar_initial + i_nh * K * V + t_kv, (d_Ibar_tiles[i_k]).to(d_Ibar_initial.dtype.element_ty), mask=m_kv)


@_kernel(do_not_specialize=["T", "TOTAL", "SUB"])
def _segment_backward_variance_kernel(
    q_in__, k_in__, v_in__, b_in__, g_in__, I_p_in__, M_saved__, Ibar_saved__, d_output_in_, d_variance_in,
    d_M_final_, d_Ibar_final_, d_q_out_, d_k_out_, d_v_out_, d_b_out_, d_g_out_, d_I_p_out_, d_M_initial_,
    d_Ibar_initial_,
    offsets, scale, T, TOTAL, SUB, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, EVERY: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Cotangents of a chunk's inputs with INPUTS, of parameters then, and of its start where that is not None."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    EXACT_K: tl.constexpr = K % BK == 0
    EXACT_V: tl.constexpr = V % BV == 0
    pid = tl.program_id(0)
    i_v = pid % NV
    i_n = (pid // NV // H).to(tl.int64)
    i_h = pid // NV % H
    i_nh = i_n * H + i_h
    begin, steps, rows = _bounds(offsets, i_n, T, PACKED)
    r_v = i_v * BV + tl.arange(0, BV)
    o_v = r_v[None, :]
    m_v = o_v < V
    count_k = tl.full((), K, tl.float32)
    count_v = tl.minimum(V - i_v * BV, BV).to(tl.float32)
    zero_ = tl.full((), 0.0, tl.float32)
    zero_k = tl.zeros([BK, 1], tl.float32)
    zero_v = tl.zeros([1, BV], tl.float32)
    zero_kv = tl.zeros([BK, BV], tl.float32)
    NH = tl.num_programs(0) // NV
    shared = i_v * NH + i_nh  # row of what value blocks share
    I_p_tiles = ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        I_p_tiles = I_p_tiles + (tl.load(I_p_in__ + i_h * K + r_k, mask=r_k < K, other=0.0),)
    I_p_given__, I_p_tiles = I_p_tiles, ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        I_p_tiles = I_p_tiles + (I_p_given__[i_k].to(tl.float32)[:, None],)
    if d_M_final_ is None:
        d_M__tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_M__tiles = d_M__tiles + (zero_kv,)
    else:
        d_M__tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_M__tiles = d_M__tiles + (tl.load(d_M_final_ + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
    if d_Ibar_final_ is None:
        d_Ibar__tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_Ibar__tiles = d_Ibar__tiles + (zero_kv,)
    else:
        d_Ibar__tiles = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            d_Ibar__tiles = d_Ibar__tiles + (tl.load(d_Ibar_final_ + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
    sum_I_p_ = ()
    for i_k in tl.static_range(NK):
        r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
        sum_I_p_ = sum_I_p_ + (zero_k,)
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (i_n * SUB + segment) * H + i_h
        M_past_ = ()
        Ibar_past_ = ()
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            M_past_ = M_past_ + (tl.load(M_saved__ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
            Ibar_past_ = Ibar_past_ + (tl.load(Ibar_saved__ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32),)
        q_rows__ = ()
        k_rows__ = ()
        v_rows__ = ()
        b_rows__ = ()
        g_rows__ = ()
        d_output__rows = ()
        d_variance_rows = ()
        for i_t in tl.static_range(EVERY):  # everything is loaded before it is used
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            v_rows__ = v_rows__ + (tl.load(v_in__ + at * V + r_v, mask=r_v < V, other=0.0),)
            b_rows__ = b_rows__ + (tl.load(b_in__ + at * V + r_v, mask=r_v < V, other=0.0),)
            d_output__rows = d_output__rows + (tl.load(d_output_in_ + at * V + r_v, mask=r_v < V, other=0.0),)
            d_variance_rows = d_variance_rows + (tl.load(d_variance_in + at * V + r_v, mask=r_v < V, other=0.0),)
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                q_rows__ = q_rows__ + (tl.load(q_in__ + at * K + r_k, mask=r_k < K, other=0.0),)
                k_rows__ = k_rows__ + (tl.load(k_in__ + at * K + r_k, mask=r_k < K, other=0.0),)
                g_rows__ = g_rows__ + (tl.load(g_in__ + at * K + r_k, mask=r_k < K, other=0.0),)
        for i_t in tl.static_range(EVERY):
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            v = v_rows__[i_t].to(tl.float32)[None, :]
            b = b_rows__[i_t].to(tl.float32)[None, :]
            M_past__after = ()
            Ibar_past__after = ()
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                g = g_rows__[i_t * NK + i_k].to(tl.float32)[:, None]
                row0___ = tl.exp(g)
                k = k_rows__[i_t * NK + i_k].to(tl.float32)[:, None]
                row1___ = k * k
                Ibar = Ibar_past_[i_t * NK + i_k]
                Ibar_new__ = Ibar * row0___ + b * row1___
                M = M_past_[i_t * NK + i_k]
                M_new__ = M * row0___ + k * v
                M_past__after = M_past__after + (M_new__,)
                Ibar_past__after = Ibar_past__after + (Ibar_new__,)
            M_past_ = M_past_ + M_past__after
            Ibar_past_ = Ibar_past_ + Ibar_past__after
        for i_t in tl.static_range(EVERY - 1, -1, -1):
            at = (first + tl.minimum(count - 1, i_t)) * H + i_h
            live = count > i_t
            v = v_rows__[i_t].to(tl.float32)[None, :]
            b = b_rows__[i_t].to(tl.float32)[None, :]
            d_output_ = d_output__rows[i_t].to(tl.float32)[None, :]
            d_variance = d_variance_rows[i_t].to(tl.float32)[None, :]
            c0_ = scale * scale
            c1 = 2.0 * c0_
            d_M__tiles_after = ()
            d_Ibar__tiles_after = ()
            sum_I_p__after = ()
            for i_k in tl.static_range(NK):
                r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
                g = g_rows__[i_t * NK + i_k].to(tl.float32)[:, None]
                row0____ = tl.exp(g)
                I_p = I_p_tiles[i_k]
                Ibar = Ibar_past_[(i_t + 1) * NK + i_k]
                x0__ = 1.0 / (I_p + Ibar)
                x1_ = d_output_ * x0__
                M = M_past_[(i_t + 1) * NK + i_k]
                sum0__ = tl.sum(_live(M * x1_, m_v, EXACT_V), axis=1)[:, None]
                sum1__ = tl.sum(_live(d_variance * x0__, m_v, EXACT_V), axis=1)[:, None]
                q = q_rows__[i_t * NK + i_k].to(tl.float32)[:, None]
                row1____ = q * scale
                row2__ = c0_ * q * q
                x4_ = x0__ * x0__ * (-1.0 * M * d_output_ * row1____ - d_variance * row2__)
                d_Ibar_ = d_Ibar__tiles[i_k]
                x5_ = d_Ibar_ + x4_
                sum2_ = tl.sum(_live(b * x5_, m_v, EXACT_V), axis=1)[:, None]
                d_M_ = d_M__tiles[i_k]
                x2_ = d_M_ + row1____ * x1_
                sum3_ = tl.sum(_live(v * x2_, m_v, EXACT_V), axis=1)[:, None]
                k = k_rows__[i_t * NK + i_k].to(tl.float32)[:, None]
                part = _live(k * x2_, m_k, EXACT_K)
                sum4_ = part if i_k == 0 else sum4_ + part
                row3 = k * k
                part = _live(row3 * x5_, m_k, EXACT_K)
                sum5_ = part if i_k == 0 else sum5_ + part
                M_old_ = M_past_[i_t * NK + i_k]
                sum6_ = tl.sum(_live(M_old_ * x2_, m_v, EXACT_V), axis=1)[:, None]
                Ibar_old_ = Ibar_past_[i_t * NK + i_k]
                sum7_ = tl.sum(_live(Ibar_old_ * x5_, m_v, EXACT_V), axis=1)[:, None]
                sum8 = tl.sum(_live(x4_, m_v, EXACT_V), axis=1)[:, None]
                x3_ = row0____ * x2_
                x6_ = row0____ * x5_
                d_M__tiles_after = d_M__tiles_after + (tl.where(live, x3_, d_M__tiles[i_k]),)
                d_Ibar__tiles_after = d_Ibar__tiles_after + (tl.where(live, x6_, d_Ibar__tiles[i_k]),)
                if INPUTS:
                    tl.store(d_q_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (c1 * q * sum1__ + scale * sum0__).to(d_q_out_.dtype.element_ty), mask=(m_k & live) != 0)
                    tl.store(d_k_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * k * sum2_ + sum3_).to(d_k_out_.dtype.element_ty), mask=(m_k & live) != 0)
                    tl.store(d_g_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (row0____ * (sum6_ + sum7_)).to(d_g_out_.dtype.element_ty), mask=(m_k & live) != 0)
                sum_I_p__after = sum_I_p__after + (sum_I_p_[i_k] + tl.where(live, sum8, 0.0) if INPUTS else sum_I_p_[i_k],)
            sum4_ = tl.sum(sum4_, axis=0)[None, :]
            sum5_ = tl.sum(sum5_, axis=0)[None, :]
            if INPUTS:
                tl.store(d_v_out_ + at * V + o_v, (sum4_).to(d_v_out_.dtype.element_ty), mask=(m_v & live) != 0)
                tl.store(d_b_out_ + at * V + o_v, (sum5_).to(d_b_out_.dtype.element_ty), mask=(m_v & live) != 0)
            d_M__tiles = d_M__tiles_after
            d_Ibar__tiles = d_Ibar__tiles_after
            sum_I_p_ = sum_I_p__after
    if INPUTS:
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            tl.store(d_I_p_out_ + shared * K + o_k, (sum_I_p_[i_k]).to(d_I_p_out_.dtype.element_ty), mask=m_k)
    if d_M_initial_ is not None:
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            tl.store(d_M_initial_ + i_nh * K * V + t_kv, (d_M__tiles[i_k]).to(d_M_initial_.dtype.element_ty), mask=m_kv)
    if d_Ibar_initial_ is not None:
        for i_k in tl.static_range(NK):
            r_k, o_k, m_k, t_kv, m_kv = _channels(i_k, o_v, m_v, K, V, BK)
            tl.store(d_Ibar_initial_ + i_nh * K * V + t_kv, (d_Ibar__tiles[i_k]).to(d_Ibar_initial_.dtype.element_ty), mask=m_kv)


_SEQUENTIAL_SPLITS = True  # whether value channels may run as separate blocks
_SEQUENTIAL_COUNTS = (5, 1, 2)  # inputs, parameters, states
_SEQUENTIAL_TILES = 2  # states on kv: what the registers hold


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
        (_sequential_backward_variance_kernel if want_variance else _sequential_backward_kernel), (blocks * N * H, 1, 1), pointers, (scale, T, every, B * T * H), (H,),
        K=K, V=V, BK=BK, BV=BV, PACKED=offsets is not None, num_warps=warps,
    )
    return tuple([_summed(d, x) for d, x in zip(d_leaves, (*inputs, *parameters, *states))])


_sequential_op = torch.library.custom_op(
    f"{_OPS}::sequential",
    lambda *arguments: _sequential_forward(*arguments),
    mutates_args=(),
    schema="(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5, Tensor x6, Tensor x7, Tensor? offsets, float scale, bool want_variance) -> (Tensor, Tensor, Tensor, Tensor)",
)
_sequential_backward_op = torch.library.custom_op(
    f"{_OPS}::sequential_backward",
    lambda *arguments: _sequential_backward(*arguments),
    mutates_args=(),
    schema="(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5, Tensor x6, Tensor x7, Tensor d0, Tensor d1, Tensor d2, Tensor d3, Tensor? offsets, float scale, bool want_variance)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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


def _exact_tile(K):
    """Tile of k that leaves the fewest lanes without a channel, of 16 and more, at most four of them; the widest such."""
    full = 1 << (K - 1).bit_length()
    widths = [w for w in (16, 32, 64, 128) if w < full <= 4 * w]
    return min([full, *widths[::-1]], key=lambda w: -(-K // w) * w)


_SEGMENT = 32  # least tokens of a chunk, which has a multiple of them
_SEGMENT_MEMORY = 2**29  # bytes: states within chunks that the backward pass keeps at a time
_SEGMENT_PRODUCTS = ('k',)  # axes of the products of decays
_SEGMENT_FORGETS = ((0, 1), (0, 1))  # which of them each state has, and how many of its numbers in turn have the same; or None


def _segment_numbers(K, BK, BV):
    """Of states, for each thread if a program had one warp."""
    return -(-K // BK) * BK * BV * _SEQUENTIAL_TILES // 32


def _segment_proposals(K, V):
    """Backward: tile of k, tile of v, warps, tokens whose states the registers hold at a time."""
    BK, full = _exact_tile(K), 1 << (V - 1).bit_length()
    found = []
    most = 24 if BK < K else 16  # of several tiles, a thread needs less beside their numbers
    for width, share in ((16, most), (32, most), (16, 32), (32, 32)):
        BV = min(full, width) if _SEQUENTIAL_SPLITS else full
        numbers = max(1, _segment_numbers(K, BK, BV))
        warps = 1 << (max(1, numbers // share) - 1).bit_length()
        warps = min(warps, 8 if numbers <= 8 * 64 else 16)  # with 16, a thread has half the registers
        # few channels take little memory, and half the tokens unrolled a third of the time to compile
        every = (2 if K <= 32 else 4) if numbers <= most * warps else max(1, min(4, 64 * warps // numbers))
        if (BK, BV, warps, every) not in found:
            found.append((BK, BV, warps, every))
    return found


def _segment_config(K, V):
    return _chosen(_segment_proposals, "segment " + _ID, K, V)


def _ends_tile(size):
    """Tile of channels of what chunks make of zeros; it is a matter of moving them, so lanes to spare cost nothing."""
    return max(16, min(64, 1 << (size - 1).bit_length()))


def _outputs_proposals(K, V):
    """Forward: tile of k, tile of v, warps, tokens that are loaded at a time; few warps, so that sums stay within them."""
    BK, full = _exact_tile(K), 1 << (V - 1).bit_length()
    found = []
    for width, every in ((16, 4), (8, 4), (16, 2)):
        BV = min(full, width) if _SEQUENTIAL_SPLITS else full
        warps = min(16, 1 << (max(1, -(-_segment_numbers(K, BK, BV) // 96)) - 1).bit_length())
        if (BK, BV, warps, every) not in found:
            found.append((BK, BV, warps, every))
    return found


def _outputs_config(K, V):
    return _chosen(_outputs_proposals, "segment outputs " + _ID, K, V)


def _segmented(inputs, parameters, states, offsets, most):
    """Whether all chunks at once are worth their further passes: where a sequence a program leaves a GPU idle.

    They run more instructions. With few warps, a sequence a program waits for its latencies longer than those take:
    with fewer than ``most`` a multiprocessor, 8 forward and 4 backward from measurements on an H100, and 16 where a
    sequence a program would have lanes without a channel that tiles of k do not have.
    """
    B, T, H, K, V, N, steps = _sequential_sizes(inputs, parameters, states, offsets)
    BK, BV, warps = _sequential_config(K, V, steps, True)
    most = 16 if _exact_tile(K) < K else most
    return T > 2 * _SEGMENT and N * H * -(-V // BV) * warps < most * _multiprocessors(inputs[0].device)


def _segment_tokens(tokens, H, K, V, device):
    """Tokens of a chunk: so few that the GPU has 32 warps for each multiprocessor, and no fewer, for memory's sake.

    Of the tokens, that is, whose states the backward pass keeps at a time.
    """
    _, BV, warps, every = _segment_config(K, V)
    sizes = {"": 1, "k": K, "v": V, "kv": K * V}
    tokens = min(tokens, _SEGMENT_MEMORY * every // (4 * H * sum([sizes[axes] for _, axes in _STATES])))
    warps *= -(-V // BV) * H
    return -(-max(1, tokens * warps // (32 * _multiprocessors(device))) // _SEGMENT) * _SEGMENT


def _segments(inputs, offsets, C):
    """Inputs as one sequence, bounds of chunks, first chunk of each sequence: made on the device, not waiting for it."""
    B, T = inputs[0].shape[:2]
    flat, device = [x.flatten(0, 1)[None] for x in inputs], inputs[0].device
    if offsets is None:
        NT = -(-T // C)
        firsts = torch.arange(0, B * NT + 1, NT, device=device)
        if T % C == 0:
            return flat, torch.arange(0, B * T + 1, C, device=device), firsts
        index = torch.arange(B * NT + 1, device=device)
        return flat, index // NT * T + index % NT * C, firsts
    N = offsets.shape[0] - 1
    firsts = torch.cat((offsets[:1] * 0, ((offsets[1:] - offsets[:-1] + C - 1) // C).cumsum(0)))
    index = torch.arange(T // C + N + 1, device=device)  # so many chunks at most; the spare ones are empty
    sequence = torch.searchsorted(firsts[1:], index, right=True).clamp(max=N - 1)
    begin = offsets.take(sequence) + (index - firsts.take(sequence)) * C
    return flat, torch.minimum(begin, offsets.take(sequence + 1)), firsts


def _segment_links(ends, products, initial, final, firsts, reverse):
    """The scan over chunks, of every state; ``ends`` become what chunks start from (or end at, reverse)."""
    N, H = firsts.shape[0] - 1, ends[0].shape[1]
    for i, (end, forgets) in enumerate(zip(ends, _SEGMENT_FORGETS)):
        size = math.prod(end.shape[2:])
        product, stride = None, 1
        if forgets is not None:
            product, stride = products[forgets[0]], math.prod(end.shape[end.dim() - forgets[1] :])
        BLOCK = max(64, min(256, 1 << (size - 1).bit_length()))  # a thread has numbers of its own: it writes what it read
        _launch(
            _links_kernel, (N * H, -(-size // BLOCK), 1), (end, product, initial[i], final[i], firsts), (H,), (),
            SIZE=size, STRIDE=stride, DECAYS=1 if product is None else math.prod(product.shape[2:]), BLOCK=BLOCK,
            REVERSE=reverse, num_warps=2,
        )


def _segment_starts(inputs, parameters, states, bounds, firsts, final):
    """States at the start of every chunk, and the products of its decays; ``final`` gets those behind the last chunk."""
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, states, bounds)
    sizes = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    starts = [s.new_empty(chunks, *s.shape[1:]) for s in states]
    products = [states[0].new_empty(chunks, H, *sizes[axes]) for axes in _SEGMENT_PRODUCTS]
    BK, BV = _ends_tile(K), _ends_tile(V)
    precision = _EXACT if torch.float32 in [x.dtype for x in inputs] else "tf32"
    _launch(
        _ends_kernel, (-(-K // BK) * -(-V // BV) * chunks * H, 1, 1), (*inputs, *parameters, *starts, *products, bounds),
        (1.0, T), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, PRECISION=precision, num_warps=4 if BK * BV > 1024 else 2,
    )
    _segment_links(starts, products, states, final, firsts, False)
    return starts, products


def _segment_outputs(inputs, parameters, starts, bounds, scale, config, o, variance, saved, sub):
    """Tokens forward from the start of every chunk: outputs, or the states before every few of them, ``sub`` a chunk."""
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, starts, bounds)
    BK, BV, warps, every = config
    _launch(
        _segment_kernel, (-(-V // BV) * chunks * H, 1, 1), (*inputs, *parameters, *starts, o, variance, *saved, bounds),
        (scale, T, sub), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, EVERY=every, OUTPUT=o is not None,
        VARIANCE=variance is not None, SAVE=o is None, num_warps=warps,
    )


def _segment_reverse(inputs, parameters, starts, bounds, C, scale, given, saved, d_ends, d_inputs):
    """Chunks backward, as many at a time as ``saved`` has room for; returns cotangents of states or of parameters.

    Without ``d_ends``, the cotangents of the states at the end of each chunk, those are zeros, and the result is the
    cotangents at its start. With them it is those of the parameters, and ``d_inputs`` get those of inputs.
    """
    _, T, H, K, V, chunks, _ = _sequential_sizes(inputs, parameters, starts, bounds)
    BK, BV, warps, every = config = _segment_config(K, V)
    blocks, sub, none = -(-V // BV), -(-C // every), [None] * len(starts)
    window, want_variance = saved[0].shape[0] // sub, len(given) == 2
    found = []
    for first in range(0, chunks, window):
        part = slice(first, min(first + window, chunks))
        count, inside = part.stop - first, bounds[first : part.stop + 1]
        own = [s[part] for s in starts]
        if d_ends is None or count < chunks:  # else they are there, from the call before
            _segment_outputs(inputs, parameters, own, inside, scale, config, None, None, saved, sub)
        d_states = d_parameters = None
        if d_ends is None:
            d_states = [_of_blocks(s, axes, blocks) for s, (_, axes) in zip(own, _STATES)]
        else:
            d_parameters = [_of_blocks(p, axes, blocks, count) for p, (_, axes) in zip(parameters, _PARAMETERS)]
        _launch(
            (_segment_backward_variance_kernel if want_variance else _segment_backward_kernel), (blocks * count * H, 1, 1),
            (
                *inputs, *parameters, *saved, *given, *(none if d_ends is None else [d[part] for d in d_ends]),
                *(d_inputs or [None] * len(inputs)), *(d_parameters or [None] * len(parameters)), *(d_states or none), inside,
            ),
            (scale, T, T * H, sub), (H,), K=K, V=V, BK=BK, BV=BV, PACKED=True, EVERY=every,
            INPUTS=d_ends is not None, num_warps=warps,
        )
        likes = own if d_ends is None else parameters
        found.append([_summed(d, like) for d, like in zip(d_states or d_parameters or [], likes)])
    if len(found) == 1:
        return found[0]
    return [torch.cat(parts) if d_ends is None else torch.stack(parts).sum(0) for parts in zip(*found)]


@_repeated
def _chunks_forward(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    o = inputs[0].new_empty(B, T, H, V)
    variance = torch.empty_like(o) if want_variance else None
    final = [torch.empty_like(s) for s in states]
    inputs, bounds, firsts = _segments(inputs, offsets, _segment_tokens(B * T, H, K, V, o.device))
    starts, _ = _segment_starts(inputs, parameters, states, bounds, firsts, final)
    none = [None] * len(states)
    _segment_outputs(inputs, parameters, starts, bounds, scale, _outputs_config(K, V), o, variance, none, 0)
    return (o, variance if want_variance else o.new_empty(0), *final)


@_repeated
def _chunks_backward(*arguments):
    inputs, parameters, states, (d_o, d_variance, *d_final, offsets, scale, want_variance) = _sequential_split(arguments)
    B, T, H, K, V, N, _ = _sequential_sizes(inputs, parameters, states, offsets)
    C = _segment_tokens(B * T, H, K, V, d_o.device)
    _, BV, _, every = _segment_config(K, V)
    d_inputs = _of_inputs(inputs, -(-V // BV))
    given = [d_o, d_variance] if want_variance else [d_o]
    flat, bounds, firsts = _segments(inputs, offsets, C)
    starts, products = _segment_starts(flat, parameters, states, bounds, firsts, [None] * len(states))
    sub, chunks = -(-C // every), starts[0].shape[0]
    of_chunk = 4 * H * sub * sum([math.prod(s.shape[2:]) for s in states])
    window = min(chunks, max(1, _SEGMENT_MEMORY // of_chunk // 4) * 4)  # times 4, so that what begins there is aligned
    saved = [s.new_empty(window * sub, *s.shape[1:]) for s in states]
    common = flat, parameters, starts, bounds, C, scale, given, saved
    d_ends = _segment_reverse(*common, None, None)
    d_states = [torch.empty_like(s) for s in states]
    _segment_links(d_ends, products, d_final, d_states, firsts, True)
    d_parameters = _segment_reverse(*common, d_ends, d_inputs)
    return (*[_summed(d, x) for d, x in zip(d_inputs, inputs)], *d_parameters, *d_states)


def _segment_forward(*arguments):
    inputs, parameters, states, (offsets, *_) = _sequential_split(arguments)
    return (_chunks_forward if _segmented(inputs, parameters, states, offsets, 8) else _sequential_forward)(*arguments)


def _segment_backward(*arguments):
    inputs, parameters, states, (*_, offsets, _, _) = _sequential_split(arguments)
    return (_chunks_backward if _segmented(inputs, parameters, states, offsets, 4) else _sequential_backward)(*arguments)


_segment_op = torch.library.custom_op(
    f"{_OPS}::segment",
    lambda *arguments: _segment_forward(*arguments),
    mutates_args=(),
    schema="(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5, Tensor x6, Tensor x7, Tensor? offsets, float scale, bool want_variance) -> (Tensor, Tensor, Tensor, Tensor)",
)
_segment_backward_op = torch.library.custom_op(
    f"{_OPS}::segment_backward",
    lambda *arguments: _segment_backward(*arguments),
    mutates_args=(),
    schema="(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5, Tensor x6, Tensor x7, Tensor d0, Tensor d1, Tensor d2, Tensor d3, Tensor? offsets, float scale, bool want_variance)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_segment_op.register_fake
def _segment_fake(*arguments):
    inputs, parameters, states, (offsets, scale, want_variance) = _sequential_split(arguments)
    o = inputs[0].new_empty(*inputs[0].shape[:3], _sizes(*inputs, *parameters, *states)[1])
    return (o, torch.empty_like(o) if want_variance else o.new_empty(0), *(s.new_empty(s.shape) for s in states))


@_segment_backward_op.register_fake
def _segment_backward_fake(*arguments):
    return tuple(t.new_empty(t.shape) for t in arguments[: sum(_SEQUENTIAL_COUNTS)])


def _segment_save(ctx, inputs, output):
    *tensors, offsets, ctx.scale, ctx.want_variance = inputs
    ctx.save_for_backward(*tensors, offsets)


def _segment_gradient(ctx, *cotangents):
    *tensors, offsets = ctx.saved_tensors
    cotangents = [t.contiguous() for t in cotangents]
    return (*_segment_backward_op(*tensors, *cotangents, offsets, ctx.scale, ctx.want_variance), None, None, None)


_segment_op.register_autograd(_segment_gradient, setup_context=_segment_save)


class _segment_eager(torch.autograd.Function):
    """The same without the operator's dispatch, which costs more time on the host than a token takes."""

    @staticmethod
    def forward(ctx, *arguments):
        _segment_save(ctx, arguments, None)
        return _segment_forward(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        *tensors, offsets = ctx.saved_tensors
        cotangents = [t.contiguous() for t in cotangents]
        return (*_segment_backward(*tensors, *cotangents, offsets, ctx.scale, ctx.want_variance), None, None, None)


def _chunk_triton_core(*arguments):
    """All chunks at once, token by token; where that gives the GPU no more to do, sequence by sequence."""
    *tensors, scale, offsets, want_variance = arguments
    if triton is None or tensors[0].dtype == torch.float64:
        return _reference_core(*arguments)
    tensors = [t.contiguous() for t in tensors]
    if torch.compiler.is_compiling():
        run = _segment_op
    elif torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        run = _segment_eager.apply
    else:
        run = _segment_forward
    o, variance, *final = run(*tensors, offsets, scale, want_variance)
    return (o, variance if want_variance else None, *final)


_CORES = {
    ('cpu', 'chunk'): _native_core,
    ('cpu', 'recurrent'): _native_core,
    ('cuda', 'chunk'): _chunk_triton_core,
    ('cuda', 'recurrent'): _recurrent_triton_core,
}


def chunk_metaplastic_gla(
    q,
    k,
    v,
    b,
    g,
    I_p,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    output_variance=False,
    cu_seqlens=None,
):
    """The fastest form for whole sequences: training and prefill.

    Args:
        q: ``[B, T, H, K]``.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        b: ``[B, T, H, V]``, nonnegative. importance gain of this write
        g: ``[B, T, H, K]``, nonpositive. log retention of each key channel
        I_p: ``[HV, K]``, positive. prior precision of each key channel
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: a tuple: M ``[N, HV, K, V]``, Ibar ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too.
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "chunk", (q, k, v, b, g,), (I_p,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )


def recurrent_metaplastic_gla(
    q,
    k,
    v,
    b,
    g,
    I_p,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    output_variance=False,
    cu_seqlens=None,
):
    """Token by token in a compiled loop, with its own backward: decoding, and a check of the other forms.

    Args:
        q: ``[B, T, H, K]``.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        b: ``[B, T, H, V]``, nonnegative. importance gain of this write
        g: ``[B, T, H, K]``, nonpositive. log retention of each key channel
        I_p: ``[HV, K]``, positive. prior precision of each key channel
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: a tuple: M ``[N, HV, K, V]``, Ibar ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too.
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "recurrent", (q, k, v, b, g,), (I_p,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )


def reference_metaplastic_gla(
    q,
    k,
    v,
    b,
    g,
    I_p,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    output_variance=False,
    cu_seqlens=None,
):
    """Plain PyTorch, any dtype, differentiable any number of times: slow and simple.

    Args:
        q: ``[B, T, H, K]``.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        b: ``[B, T, H, V]``, nonnegative. importance gain of this write
        g: ``[B, T, H, K]``, nonpositive. log retention of each key channel
        I_p: ``[HV, K]``, positive. prior precision of each key channel
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: a tuple: M ``[N, HV, K, V]``, Ibar ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too.
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "reference", (q, k, v, b, g,), (I_p,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )

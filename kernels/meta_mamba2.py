"""MetaMamba2: Mamba-2 with Bayesian metaplasticity

References: arXiv:2405.21060

One token, per head (k: key channel, v: value channel):

    S[k,v] <- S*exp(g) + k*v    (decayed sum of dt x B^T)
              starts at 0
    S_importance[k,v] <- S_importance*exp(g) + b*k**2    (importance of S beyond the prior)
                         starts at 0
    output[v] = SumK(S*q/(I_p + S_importance))    (read after the update)
    variance[v] = SumK(q**2/(I_p + S_importance))

Class c: ratio: nonlinear readout of affine states.
every state is affine, but the readout divides one by another inside the sum over k, and the divisor varies along
    both axes: it can fold neither into the query nor into the output

Generated from the spec 'meta_mamba2', hash 2147f93753615335, by emitter 4.
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


SPEC = {'name': 'meta_mamba2',
 'title': 'MetaMamba2: Mamba-2 with Bayesian metaplasticity',
 'references': ['arXiv:2405.21060'],
 'hash': '2147f937536153357361d0f4f643f07c862b7f2f501878b20737d39573350f6a',
 'class': 'c',
 'class_name': 'ratio: nonlinear readout of affine states',
 'reason': 'every state is affine, but the readout divides one by another inside the sum over k, and the divisor '
           'varies along both axes: it can fold neither into the query nor into the output',
 'inputs': [{'name': 'q', 'axes': 'k', 'domain': 'real', 'doc': 'C'},
            {'name': 'k', 'axes': 'k', 'domain': 'real', 'doc': 'B'},
            {'name': 'v', 'axes': 'v', 'domain': 'real', 'doc': 'dt x'},
            {'name': 'g', 'axes': '', 'domain': 'nonpositive', 'doc': '-dt A, the log retention'},
            {'name': 'b', 'axes': 'v', 'domain': 'nonnegative', 'doc': 'importance gain of this write'}],
 'parameters': [{'name': 'I_p', 'axes': '', 'domain': 'positive', 'doc': 'prior precision', 'init': 1.0}],
 'states': [{'name': 'S', 'axes': 'kv', 'domain': 'real', 'doc': 'decayed sum of dt x B^T', 'init': '0'},
            {'name': 'S_importance',
             'axes': 'kv',
             'domain': 'nonnegative',
             'doc': 'importance of S beyond the prior',
             'init': '0'}],
 'variance': True,
 'read': 'after',
 'forms': {'cpu/chunk': '_native_core',
           'cpu/recurrent': '_native_core',
           'cuda/chunk': '_chunk_triton_core',
           'cuda/recurrent': '_recurrent_triton_core'},
 'double_backward': ['reference'],
 'layer': {'dt': 'softplus(linear + dt_bias)',
           'q': 'silu(conv(linear))',
           'k': 'silu(conv(linear))',
           'v': 'dt * silu(conv(linear))',
           'g': '-dt * exp(A_log)',
           'b': 'dt * sigmoid(low_rank) * softplus(head_scale)'},
 'versions': {'emitter': '4'}}
_ID = 'dspace_meta_mamba2_2147f937'  # by which its operators and tuned configurations are known


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


_NAME = 'meta_mamba2'
_INPUTS = (('q', 'k'), ('k', 'k'), ('v', 'v'), ('g', ''), ('b', 'v'))
_PARAMETERS = (('I_p', ''),)
_STATES = (('S', 'kv'), ('S_importance', 'kv'))
_HAS_VARIANCE = True
_STARTS_AT_ZERO = True


def _initial_states(I_p, sequences, heads, size_k, size_v, dtype, device):
    """States before the first token, ``[N, HV, *axes]``."""
    return (
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # S = 0
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # S_importance = 0
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


def _reference_core(q, k, v, g, b, I_p, S, S_importance, scale, offsets, want_variance):
    """Token by token, as the formulas of the header stand: slow, simple, the measure of the rest."""
    if offsets is not None:  # packed: one sequence after the other
        bounds = offsets.tolist()
        parts = [
            _reference_core(
                q[:, begin:end],
                k[:, begin:end],
                v[:, begin:end],
                g[:, begin:end],
                b[:, begin:end],
                I_p,
                S[count : count + 1],
                S_importance[count : count + 1],
                scale, None, want_variance,
            )
            for count, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:]))
        ]
        output = torch.cat([rows[0] for rows in parts], 1)
        variance = torch.cat([rows[1] for rows in parts], 1) if want_variance else None
        return (output, variance, *(torch.cat([rows[2 + i] for rows in parts]) for i in range(2)))
    dtype = S.dtype
    like = q
    size_k, size_v = _sizes(q, k, v, g, b, I_p, S, S_importance)
    # Every tensor is aligned to [sequence, head, K, V], with size 1 where it has no such axis.
    q_all = q.to(dtype)[..., :, None]
    k_all = k.to(dtype)[..., :, None]
    v_all = v.to(dtype)[..., None, :]
    g_all = g.to(dtype)[..., None, None]
    b_all = b.to(dtype)[..., None, :]
    I_p = I_p[..., None, None]
    outputs, variances = [], []
    for token in range(like.shape[1]):
        q = q_all[:, token]
        k = k_all[:, token]
        v = v_all[:, token]
        g = g_all[:, token]
        b = b_all[:, token]
        S, S_importance = (
            S * torch.exp(g) + k * v,
            S_importance * torch.exp(g) + b * k ** 2,
        )
        outputs.append(((S * q / (I_p + S_importance)).sum(-2, keepdim=True)).expand(like.shape[0], like.shape[2], 1, size_v))
        if want_variance:
            variances.append(((q ** 2 / (I_p + S_importance)).sum(-2, keepdim=True)).expand(like.shape[0], like.shape[2], 1, size_v))
    empty = like.new_zeros(like.shape[0], 0, like.shape[2], size_v)
    output = torch.stack(outputs, 1)[:, :, :, 0].to(like.dtype) if outputs else empty
    variance = None
    if want_variance:
        variance = torch.stack(variances, 1)[:, :, :, 0].to(like.dtype) if variances else empty
    return output, variance, S, S_importance


def _native_forward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, g, b, I_p, S, S_importance, o, saved_S,
    saved_S_importance, sum0,
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
        S_h = S[sequence, head]
        S_importance_h = S_importance[sequence, head]
        for token in range(begin, end):
            if every and (token - begin) % every == 0:  # the backward pass restarts from here
                segment = begin // every + sequence + (token - begin) // every
                for i in range(size_k):
                    for j in range(size_v):
                        saved_S[segment, head][i, j] = S_h[i, j]
                for i in range(size_k):
                    for j in range(size_v):
                        saved_S_importance[segment, head][i, j] = S_importance_h[i, j]
            for i in range(0, size_k, 16):
                _native_fetch(q, token + 4, head, i)
                _native_fetch(k, token + 4, head, i)
            for j in range(0, size_v, 16):
                _native_fetch(v, token + 4, head, j)
                _native_fetch(b, token + 4, head, j)
                _native_fetch(o, token + 4, head, j)
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            g_t = g[token, head]
            b_t = b[token, head]
            o_t = o[token, head]
            c0 = math.exp(g_t)
            for i in range(size_k):
                S_h_row = S_h[i]
                S_importance_h_row = S_importance_h[i]
                k_i = k_t[i]
                q_i = q_t[i]
                row0 = k_i * k_i
                for j in range(size_v):
                    S_ij = S_h_row[j]
                    S_importance_ij = S_importance_h_row[j]
                    S_importance_new = S_importance_ij * c0 + b_t[j] * row0
                    S_new = S_ij * c0 + k_i * v_t[j]
                    sum0[j] += S_new * q_i * one / (I_p_h + S_importance_new)
                    S_h_row[j] = S_new
                    S_importance_h_row[j] = S_importance_new
            for j in range(size_v):
                o_t[j] = sum0[j]
                sum0[j] = zero


def _native_backward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, g, b, I_p, saved_S, saved_S_importance,
    d_output, d_S, d_S_importance, d_q, d_k, d_v, d_g, d_b, d_I_p, past_S, past_S_importance, sum0, sum1, sum2,
    sum3, sum4, sum6, sum7,
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
        d_S_h = d_S[sequence, head]
        d_S_importance_h = d_S_importance[sequence, head]
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    past_S[0][i, j] = saved_S[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_S_importance[0][i, j] = saved_S_importance[segment, head][i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                g_t = g[token, head]
                b_t = b[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token + 4, head, i)
                    _native_fetch(k, token + 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token + 4, head, j)
                    _native_fetch(b, token + 4, head, j)
                S_h = past_S[token - start]
                S_next = past_S[token - start + 1]
                S_importance_h = past_S_importance[token - start]
                S_importance_next = past_S_importance[token - start + 1]
                c0 = math.exp(g_t)
                for i in range(size_k):
                    S_h_row = S_h[i]
                    S_importance_h_row = S_importance_h[i]
                    k_i = k_t[i]
                    row0 = k_i * k_i
                    S_next_row = S_next[i]
                    S_importance_next_row = S_importance_next[i]
                    for j in range(size_v):
                        S_ij = S_h_row[j]
                        S_importance_ij = S_importance_h_row[j]
                        S_new = S_ij * c0 + k_i * v_t[j]
                        S_importance_new = S_importance_ij * c0 + b_t[j] * row0
                        S_next_row[j] = S_new
                        S_importance_next_row[j] = S_importance_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                g_t = g[token, head]
                b_t = b[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token - 4, head, i)
                    _native_fetch(k, token - 4, head, i)
                    _native_fetch(d_q, token - 4, head, i)
                    _native_fetch(d_k, token - 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token - 4, head, j)
                    _native_fetch(b, token - 4, head, j)
                    _native_fetch(d_output, token - 4, head, j)
                    _native_fetch(d_v, token - 4, head, j)
                    _native_fetch(d_b, token - 4, head, j)
                S_old = past_S[token - start]
                S_now = past_S[token - start + 1]
                S_importance_old = past_S_importance[token - start]
                S_importance_now = past_S_importance[token - start + 1]
                d_output_t = d_output[token, head]
                d_q_t = d_q[token, head]
                d_k_t = d_k[token, head]
                d_v_t = d_v[token, head]
                d_b_t = d_b[token, head]
                c0_ = math.exp(g_t)
                for i in range(size_k):
                    S_old_row = S_old[i]
                    S_importance_old_row = S_importance_old[i]
                    S_importance_now_row = S_importance_now[i]
                    S_now_row = S_now[i]
                    d_S_h_row = d_S_h[i]
                    d_S_importance_h_row = d_S_importance_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0_ = k_i_ * k_i_
                    sum0_i = zero
                    sum1_i = zero
                    sum2_i = zero
                    for j in range(size_v):
                        S_ij_ = S_old_row[j]
                        S_importance_ij_ = S_importance_old_row[j]
                        S_importance_new_ij = S_importance_now_row[j]
                        S_new_ij = S_now_row[j]
                        d_S_ij = d_S_h_row[j]
                        d_S_importance_ij = d_S_importance_h_row[j]
                        x0 = one / (I_p_h + S_importance_new_ij)
                        x1 = d_output_t[j] * x0
                        x4 = S_new_ij * d_output_t[j] * q_i * x0 * x0
                        x5 = d_S_importance_ij - x4
                        x2 = d_S_ij + q_i * x1
                        x3 = c0_ * x2
                        x6 = c0_ * x5
                        sum0_i += S_new_ij * x1
                        sum1_i += b_t[j] * x5
                        sum2_i += v_t[j] * x2
                        sum3[j] += k_i_ * x2
                        sum4[j] += S_ij_ * x2 + S_importance_ij_ * x5
                        sum6[j] += row0_ * x5
                        sum7[j] += x4
                        d_S_h_row[j] = x3
                        d_S_importance_h_row[j] = x6
                    sum0[i] = sum0_i
                    sum1[i] = sum1_i
                    sum2[i] = sum2_i
                sum5 = zero
                sum8 = zero
                for j in range(size_v):
                    sum5 += sum4[j]
                    sum8 += sum7[j]
                    d_v_t[j] = sum3[j]
                    d_b_t[j] = sum6[j]
                    sum3[j] = zero
                    sum4[j] = zero
                    sum6[j] = zero
                    sum7[j] = zero
                for i in range(size_k):
                    d_q_t[i] = sum0[i]
                    d_k_t[i] = real(2) * k_t[i] * sum1[i] + sum2[i]
                d_g[token, head] = c0_ * sum5
                d_I_p[sequence, head] += -sum8


def _native_forward_variance_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, g, b, I_p, S, S_importance, o,
    variance, saved_S, saved_S_importance, sum0, sum1,
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
        S_h = S[sequence, head]
        S_importance_h = S_importance[sequence, head]
        for token in range(begin, end):
            if every and (token - begin) % every == 0:  # the backward pass restarts from here
                segment = begin // every + sequence + (token - begin) // every
                for i in range(size_k):
                    for j in range(size_v):
                        saved_S[segment, head][i, j] = S_h[i, j]
                for i in range(size_k):
                    for j in range(size_v):
                        saved_S_importance[segment, head][i, j] = S_importance_h[i, j]
            for i in range(0, size_k, 16):
                _native_fetch(q, token + 4, head, i)
                _native_fetch(k, token + 4, head, i)
            for j in range(0, size_v, 16):
                _native_fetch(v, token + 4, head, j)
                _native_fetch(b, token + 4, head, j)
                _native_fetch(o, token + 4, head, j)
                _native_fetch(variance, token + 4, head, j)
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            g_t = g[token, head]
            b_t = b[token, head]
            o_t = o[token, head]
            variance_t = variance[token, head]
            c0 = math.exp(g_t)
            for i in range(size_k):
                S_h_row = S_h[i]
                S_importance_h_row = S_importance_h[i]
                k_i = k_t[i]
                q_i = q_t[i]
                row0 = k_i * k_i
                row1 = q_i * q_i
                for j in range(size_v):
                    S_ij = S_h_row[j]
                    S_importance_ij = S_importance_h_row[j]
                    S_new = S_ij * c0 + k_i * v_t[j]
                    S_importance_new = S_importance_ij * c0 + b_t[j] * row0
                    x0 = one / (I_p_h + S_importance_new)
                    sum0[j] += S_new * q_i * x0
                    sum1[j] += row1 * x0
                    S_h_row[j] = S_new
                    S_importance_h_row[j] = S_importance_new
            for j in range(size_v):
                o_t[j] = sum0[j]
                variance_t[j] = sum1[j]
                sum0[j] = zero
                sum1[j] = zero


def _native_backward_variance_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, g, b, I_p, saved_S, saved_S_importance,
    d_output, d_variance, d_S, d_S_importance, d_q, d_k, d_v, d_g, d_b, d_I_p, past_S, past_S_importance, sum0,
    sum1, sum2, sum3, sum4, sum5, sum7, sum8,
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
        d_S_h = d_S[sequence, head]
        d_S_importance_h = d_S_importance[sequence, head]
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    past_S[0][i, j] = saved_S[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_S_importance[0][i, j] = saved_S_importance[segment, head][i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                g_t = g[token, head]
                b_t = b[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token + 4, head, i)
                    _native_fetch(k, token + 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token + 4, head, j)
                    _native_fetch(b, token + 4, head, j)
                S_h = past_S[token - start]
                S_next = past_S[token - start + 1]
                S_importance_h = past_S_importance[token - start]
                S_importance_next = past_S_importance[token - start + 1]
                c0 = math.exp(g_t)
                for i in range(size_k):
                    S_h_row = S_h[i]
                    S_importance_h_row = S_importance_h[i]
                    k_i = k_t[i]
                    row0 = k_i * k_i
                    S_next_row = S_next[i]
                    S_importance_next_row = S_importance_next[i]
                    for j in range(size_v):
                        S_ij = S_h_row[j]
                        S_importance_ij = S_importance_h_row[j]
                        S_new = S_ij * c0 + k_i * v_t[j]
                        S_importance_new = S_importance_ij * c0 + b_t[j] * row0
                        S_next_row[j] = S_new
                        S_importance_next_row[j] = S_importance_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                g_t = g[token, head]
                b_t = b[token, head]
                for i in range(0, size_k, 16):
                    _native_fetch(q, token - 4, head, i)
                    _native_fetch(k, token - 4, head, i)
                    _native_fetch(d_q, token - 4, head, i)
                    _native_fetch(d_k, token - 4, head, i)
                for j in range(0, size_v, 16):
                    _native_fetch(v, token - 4, head, j)
                    _native_fetch(b, token - 4, head, j)
                    _native_fetch(d_output, token - 4, head, j)
                    _native_fetch(d_variance, token - 4, head, j)
                    _native_fetch(d_v, token - 4, head, j)
                    _native_fetch(d_b, token - 4, head, j)
                S_old = past_S[token - start]
                S_now = past_S[token - start + 1]
                S_importance_old = past_S_importance[token - start]
                S_importance_now = past_S_importance[token - start + 1]
                d_output_t = d_output[token, head]
                d_variance_t = d_variance[token, head]
                d_q_t = d_q[token, head]
                d_k_t = d_k[token, head]
                d_v_t = d_v[token, head]
                d_b_t = d_b[token, head]
                c0_ = math.exp(g_t)
                for i in range(size_k):
                    S_old_row = S_old[i]
                    S_importance_old_row = S_importance_old[i]
                    S_importance_now_row = S_importance_now[i]
                    S_now_row = S_now[i]
                    d_S_h_row = d_S_h[i]
                    d_S_importance_h_row = d_S_importance_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0_ = q_i * q_i
                    row1 = k_i_ * k_i_
                    sum0_i = zero
                    sum1_i = zero
                    sum2_i = zero
                    sum3_i = zero
                    for j in range(size_v):
                        S_ij_ = S_old_row[j]
                        S_importance_ij_ = S_importance_old_row[j]
                        S_importance_new_ij = S_importance_now_row[j]
                        S_new_ij = S_now_row[j]
                        d_S_ij = d_S_h_row[j]
                        d_S_importance_ij = d_S_importance_h_row[j]
                        x0 = one / (I_p_h + S_importance_new_ij)
                        x1 = d_output_t[j] * q_i
                        x4 = x0 * x0 * (-S_new_ij * x1 - d_variance_t[j] * row0_)
                        x5 = d_S_importance_ij + x4
                        x2 = d_S_ij + x0 * x1
                        x3 = c0_ * x2
                        x6 = c0_ * x5
                        sum0_i += d_variance_t[j] * x0
                        sum1_i += S_new_ij * d_output_t[j] * x0
                        sum2_i += b_t[j] * x5
                        sum3_i += v_t[j] * x2
                        sum4[j] += k_i_ * x2
                        sum5[j] += S_ij_ * x2 + S_importance_ij_ * x5
                        sum7[j] += row1 * x5
                        sum8[j] += x4
                        d_S_h_row[j] = x3
                        d_S_importance_h_row[j] = x6
                    sum0[i] = sum0_i
                    sum1[i] = sum1_i
                    sum2[i] = sum2_i
                    sum3[i] = sum3_i
                sum6 = zero
                sum9 = zero
                for j in range(size_v):
                    sum6 += sum5[j]
                    sum9 += sum8[j]
                    d_v_t[j] = sum4[j]
                    d_b_t[j] = sum7[j]
                    sum4[j] = zero
                    sum5[j] = zero
                    sum7[j] = zero
                    sum8[j] = zero
                for i in range(size_k):
                    d_q_t[i] = real(2) * q_t[i] * sum0[i] + sum1[i]
                    d_k_t[i] = real(2) * k_t[i] * sum2[i] + sum3[i]
                d_g[token, head] = c0_ * sum6
                d_I_p[sequence, head] += sum9


# Loop, and the shapes of its scratch arrays, by (pass, with variance).
_NATIVE = {
    ('forward', False): (
        _native_forward_loop,
        lambda size_k, size_v, every: [(size_v,)],
    ),
    ('backward', False): (
        _native_backward_loop,
        lambda size_k, size_v, every: [(every + 1, size_k, size_v,), (every + 1, size_k, size_v,), (size_k,), (size_k,), (size_k,), (size_v,), (size_v,), (size_v,), (size_v,)],
    ),
    ('forward', True): (
        _native_forward_variance_loop,
        lambda size_k, size_v, every: [(size_v,), (size_v,)],
    ),
    ('backward', True): (
        _native_backward_variance_loop,
        lambda size_k, size_v, every: [(every + 1, size_k, size_v,), (every + 1, size_k, size_v,), (size_k,), (size_k,), (size_k,), (size_k,), (size_v,), (size_v,), (size_v,), (size_v,)],
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


def _fast(tensor):
    """Whether kernels on this device may use instructions of NVIDIA GPUs."""
    return tensor.is_cuda and torch.version.hip is None


@_kernel
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x; FAST takes the reciprocal of the special function unit (relative error 1e-7, denormals are zero)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


# Tiles: lane 4 g + c of a warp holds row 8 h + g and columns 8 n + 2 c + e of a 16 x 16 matrix, as [I, n, h, e, lane].


@_kernel
def _tile_rows():
    lane = tl.arange(0, 32)[None, None, None, None, :]
    return 8 * tl.arange(0, 2)[None, None, :, None, None] + lane // 4


@_kernel
def _tile_columns():
    """Column half and column within the half."""
    lane = tl.arange(0, 32)[None, None, None, None, :]
    return tl.arange(0, 2)[None, :, None, None, None], 2 * (lane % 4) + tl.arange(0, 2)[None, None, None, :, None]


@_kernel
def _get(at, mask):
    """Load through one dimension, whose only layout is lane after lane."""
    N: tl.constexpr = at.numel
    mask = tl.reshape(tl.broadcast_to(mask, at.shape), [N])
    return tl.reshape(tl.load(tl.reshape(at, [N]), mask=mask, other=0.0), at.shape)


@_kernel
def _put(at, x, mask):
    N: tl.constexpr = at.numel
    x = tl.reshape(tl.broadcast_to(x, at.shape), [N]).to(at.dtype.element_ty)
    tl.store(tl.reshape(at, [N]), x, mask=tl.reshape(tl.broadcast_to(mask, at.shape), [N]))


@_kernel
def _matrix(x):
    """Tiles below each other as a matrix."""
    x = tl.permute(tl.reshape(x, [x.shape[0], 2, 2, 2, 8, 4]), [0, 2, 4, 1, 5, 3])
    return tl.reshape(x, [x.shape[0] * 16, 16])


@_kernel
def _mma(x, y, z, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """z + x y' for each tile; x or y may be one tile for all of the other's."""
    if FAST:
        x, y = tl.broadcast(x, y)
        x, z = tl.broadcast(x, z)
        y, z = tl.broadcast(y, z)
        if x.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $14}, {$16, $17, $18, $19};
                mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$13, $15}, {$20, $21, $22, $23};
                """,
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=8,
            )
        elif PRECISION == "tf32x3":
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 a<8>;
                .reg .b32 b<8>;
                .reg .b32 la<8>;
                .reg .b32 lb<8>;
                .reg .f32 t;
                mov.f32 $0, $24;
                mov.f32 $1, $25;
                mov.f32 $2, $26;
                mov.f32 $3, $27;
                mov.f32 $4, $28;
                mov.f32 $5, $29;
                mov.f32 $6, $30;
                mov.f32 $7, $31;
                cvt.rna.tf32.f32 a0, $8;
                sub.f32 t, $8, a0;
                cvt.rna.tf32.f32 la0, t;
                cvt.rna.tf32.f32 b0, $16;
                sub.f32 t, $16, b0;
                cvt.rna.tf32.f32 lb0, t;
                cvt.rna.tf32.f32 a1, $9;
                sub.f32 t, $9, a1;
                cvt.rna.tf32.f32 la1, t;
                cvt.rna.tf32.f32 b1, $17;
                sub.f32 t, $17, b1;
                cvt.rna.tf32.f32 lb1, t;
                cvt.rna.tf32.f32 a2, $10;
                sub.f32 t, $10, a2;
                cvt.rna.tf32.f32 la2, t;
                cvt.rna.tf32.f32 b2, $18;
                sub.f32 t, $18, b2;
                cvt.rna.tf32.f32 lb2, t;
                cvt.rna.tf32.f32 a3, $11;
                sub.f32 t, $11, a3;
                cvt.rna.tf32.f32 la3, t;
                cvt.rna.tf32.f32 b3, $19;
                sub.f32 t, $19, b3;
                cvt.rna.tf32.f32 lb3, t;
                cvt.rna.tf32.f32 a4, $12;
                sub.f32 t, $12, a4;
                cvt.rna.tf32.f32 la4, t;
                cvt.rna.tf32.f32 b4, $20;
                sub.f32 t, $20, b4;
                cvt.rna.tf32.f32 lb4, t;
                cvt.rna.tf32.f32 a5, $13;
                sub.f32 t, $13, a5;
                cvt.rna.tf32.f32 la5, t;
                cvt.rna.tf32.f32 b5, $21;
                sub.f32 t, $21, b5;
                cvt.rna.tf32.f32 lb5, t;
                cvt.rna.tf32.f32 a6, $14;
                sub.f32 t, $14, a6;
                cvt.rna.tf32.f32 la6, t;
                cvt.rna.tf32.f32 b6, $22;
                sub.f32 t, $22, b6;
                cvt.rna.tf32.f32 lb6, t;
                cvt.rna.tf32.f32 a7, $15;
                sub.f32 t, $15, a7;
                cvt.rna.tf32.f32 la7, t;
                cvt.rna.tf32.f32 b7, $23;
                sub.f32 t, $23, b7;
                cvt.rna.tf32.f32 lb7, t;
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {la0, la2, la1, la3}, {b0, b1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {la0, la2, la1, la3}, {b2, b3}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a0, a2, a1, a3}, {lb0, lb1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a0, a2, a1, a3}, {lb2, lb3}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {la4, la6, la5, la7}, {b4, b5}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {la4, la6, la5, la7}, {b6, b7}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a4, a6, a5, a7}, {lb4, lb5}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a4, a6, a5, a7}, {lb6, lb7}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a0, a2, a1, a3}, {b0, b1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a0, a2, a1, a3}, {b2, b3}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a4, a6, a5, a7}, {b4, b5}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a4, a6, a5, a7}, {b6, b7}, {$4, $5, $6, $7};
                }""",
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=8,
            )
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 a<8>;
                .reg .b32 b<8>;
                mov.f32 $0, $24;
                mov.f32 $1, $25;
                mov.f32 $2, $26;
                mov.f32 $3, $27;
                mov.f32 $4, $28;
                mov.f32 $5, $29;
                mov.f32 $6, $30;
                mov.f32 $7, $31;
                cvt.rna.tf32.f32 a0, $8;
                cvt.rna.tf32.f32 b0, $16;
                cvt.rna.tf32.f32 a1, $9;
                cvt.rna.tf32.f32 b1, $17;
                cvt.rna.tf32.f32 a2, $10;
                cvt.rna.tf32.f32 b2, $18;
                cvt.rna.tf32.f32 a3, $11;
                cvt.rna.tf32.f32 b3, $19;
                cvt.rna.tf32.f32 a4, $12;
                cvt.rna.tf32.f32 b4, $20;
                cvt.rna.tf32.f32 a5, $13;
                cvt.rna.tf32.f32 b5, $21;
                cvt.rna.tf32.f32 a6, $14;
                cvt.rna.tf32.f32 b6, $22;
                cvt.rna.tf32.f32 a7, $15;
                cvt.rna.tf32.f32 b7, $23;
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a0, a2, a1, a3}, {b0, b1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a0, a2, a1, a3}, {b2, b3}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a4, a6, a5, a7}, {b4, b5}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a4, a6, a5, a7}, {b6, b7}, {$4, $5, $6, $7};
                }""",
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=8,
            )
    else:
        product = tl.dot(_matrix(x), tl.trans(_matrix(y)), input_precision=PRECISION)
        if y.shape[0] > 1:
            product = tl.permute(tl.reshape(product, [2, 8, y.shape[0], 2, 4, 2]), [2, 3, 0, 5, 1, 4])
            return z + tl.reshape(product, [y.shape[0], 2, 2, 2, 32])
        else:
            product = tl.permute(tl.reshape(product, [x.shape[0], 2, 8, 2, 4, 2]), [0, 3, 1, 5, 2, 4])
            return z + tl.reshape(product, [x.shape[0], 2, 2, 2, 32])


@_kernel
def _half(x, i_n):
    """Column half i_n of float32 tiles."""
    half = tl.arange(0, 2)[None, :, None, None, None]
    chosen = tl.where(half == i_n, x.to(tl.int32, bitcast=True), 0)  # of integers, so that the sum costs nothing
    return tl.sum(chosen, 1, keep_dims=True).to(tl.float32, bitcast=True)


@_kernel
def _mma_8(x, y, z, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """z + x y' where x and y are column halves. z may be one half, for both; x or y one tile for all of the other's."""
    z = tl.broadcast_to(z, [z.shape[0], 2, 2, 2, 32])
    if FAST:
        x, y = tl.broadcast(x, y)
        x, z = tl.broadcast(x, z)
        y, z = tl.broadcast(y, z)
        # said to be impure, or Triton would let it compute on halves and broadcast what comes out
        if x.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$8, $9}, {$12}, {$16, $17, $18, $19};
                mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$4, $5, $6, $7}, {$8, $9}, {$13}, {$20, $21, $22, $23};
                """,
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=False, pack=8,
            )
        elif PRECISION == "tf32x3":
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 a<8>;
                .reg .b32 b<8>;
                .reg .b32 la<8>;
                .reg .b32 lb<8>;
                .reg .f32 t;
                mov.f32 $0, $24;
                mov.f32 $1, $25;
                mov.f32 $2, $26;
                mov.f32 $3, $27;
                mov.f32 $4, $28;
                mov.f32 $5, $29;
                mov.f32 $6, $30;
                mov.f32 $7, $31;
                cvt.rna.tf32.f32 a0, $8;
                sub.f32 t, $8, a0;
                cvt.rna.tf32.f32 la0, t;
                cvt.rna.tf32.f32 b0, $16;
                sub.f32 t, $16, b0;
                cvt.rna.tf32.f32 lb0, t;
                cvt.rna.tf32.f32 a1, $9;
                sub.f32 t, $9, a1;
                cvt.rna.tf32.f32 la1, t;
                cvt.rna.tf32.f32 b1, $17;
                sub.f32 t, $17, b1;
                cvt.rna.tf32.f32 lb1, t;
                cvt.rna.tf32.f32 a2, $10;
                sub.f32 t, $10, a2;
                cvt.rna.tf32.f32 la2, t;
                cvt.rna.tf32.f32 b2, $18;
                sub.f32 t, $18, b2;
                cvt.rna.tf32.f32 lb2, t;
                cvt.rna.tf32.f32 a3, $11;
                sub.f32 t, $11, a3;
                cvt.rna.tf32.f32 la3, t;
                cvt.rna.tf32.f32 b3, $19;
                sub.f32 t, $19, b3;
                cvt.rna.tf32.f32 lb3, t;
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {la0, la2, la1, la3}, {b0, b1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {la0, la2, la1, la3}, {b2, b3}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a0, a2, a1, a3}, {lb0, lb1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a0, a2, a1, a3}, {lb2, lb3}, {$4, $5, $6, $7};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a0, a2, a1, a3}, {b0, b1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a0, a2, a1, a3}, {b2, b3}, {$4, $5, $6, $7};
                }""",
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=False, pack=8,
            )
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 a<8>;
                .reg .b32 b<8>;
                mov.f32 $0, $24;
                mov.f32 $1, $25;
                mov.f32 $2, $26;
                mov.f32 $3, $27;
                mov.f32 $4, $28;
                mov.f32 $5, $29;
                mov.f32 $6, $30;
                mov.f32 $7, $31;
                cvt.rna.tf32.f32 a0, $8;
                cvt.rna.tf32.f32 b0, $16;
                cvt.rna.tf32.f32 a1, $9;
                cvt.rna.tf32.f32 b1, $17;
                cvt.rna.tf32.f32 a2, $10;
                cvt.rna.tf32.f32 b2, $18;
                cvt.rna.tf32.f32 a3, $11;
                cvt.rna.tf32.f32 b3, $19;
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {a0, a2, a1, a3}, {b0, b1}, {$0, $1, $2, $3};
                mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$4, $5, $6, $7}, {a0, a2, a1, a3}, {b2, b3}, {$4, $5, $6, $7};
                }""",
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=False, pack=8,
            )
    else:
        first = tl.arange(0, 2)[None, :, None, None, None] == 0
        x, y = tl.where(first, x, 0.0).to(x.dtype), tl.where(first, y, 0.0).to(y.dtype)
        return _mma(x, y, z, PRECISION, FAST)


@_kernel
def _held(x, unequal, FAST: tl.constexpr):
    """x (finite) in a column half, to start sums of products from: each element in a register of its own.

    ``unequal`` are numbers that the compiler cannot know to be equal: of equal ones it would keep one register, and
    copy it before each product.
    """
    if FAST:
        return x + 0.0 * unequal
    else:
        return x + tl.zeros([1, 1, 2, 2, 32], tl.float32)


@_kernel
def _picked(x, i_g):
    x, source = tl.broadcast(x, 4 * i_g + tl.arange(0, 32)[None, None, None, None, :] % 4)
    if x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r,r", [x, source], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, source], dtype=tl.float32, is_pure=True, pack=1
        )


@_kernel
def _pick(x, i_g, FAST: tl.constexpr):
    """What the lanes of row i_g hold, in the lanes of every row, float32. Numbers of 16 bits travel in pairs."""
    if FAST:
        return _picked(x, i_g).to(tl.float32)
    else:
        lane = tl.arange(0, 32)[None, None, None, None, :]
        return _sum_rows(tl.where(lane // 4 == i_g, x.to(tl.float32), 0.0), FAST)


@_kernel
def _sum_rows(x, FAST: tl.constexpr):
    """Sum over the tiles, row halves and lanes that share a column; every lane gets it."""
    x = tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)
    if FAST:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t;
            shfl.sync.bfly.b32 t, $1, 4, 31, 0xffffffff; add.f32 $0, $1, t;
            shfl.sync.bfly.b32 t, $0, 8, 31, 0xffffffff; add.f32 $0, $0, t;
            shfl.sync.bfly.b32 t, $0, 16, 31, 0xffffffff; add.f32 $0, $0, t; }""",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        x = tl.sum(tl.reshape(x, [1, 2, 1, 2, 8, 4]), 4, keep_dims=True)
        return tl.reshape(tl.broadcast_to(x, [1, 2, 1, 2, 8, 4]), [1, 2, 1, 2, 32])


@_kernel
def _sum_rows_rounded(x, OT: tl.constexpr, FAST: tl.constexpr):
    """As _sum_rows. Operands of 16 bits are good enough for the last 8 rows: transposed, a product with ones sums them."""
    if FAST and OT == tl.bfloat16:
        x = tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p, one;
            .reg .f32 zero, t<2>;
            mov.b32 one, 0x3f803f80;
            mov.f32 zero, 0f00000000;
            cvt.rn.bf16x2.f32 p, $5, $4;
            movmatrix.sync.aligned.m8n8.trans.b16 p, p;
            mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, t0, t1}, {one, one}, {p}, {zero, zero, zero, zero};
            cvt.rn.bf16x2.f32 p, $7, $6;
            movmatrix.sync.aligned.m8n8.trans.b16 p, p;
            mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$2, $3, t0, t1}, {one, one}, {p}, {zero, zero, zero, zero};
            }""",
            "=&f,=&f,=&f,=&f,f,f,f,f", [x], dtype=tl.float32, is_pure=True, pack=4,
        )
    else:
        return _sum_rows(x, FAST)


@_kernel
def _sum_columns(x, FAST: tl.constexpr):
    """Sum over the tiles, column halves, low bits and lanes that share a row; every lane gets it."""
    x = tl.sum(tl.sum(tl.sum(x, 3, keep_dims=True), 1, keep_dims=True), 0, keep_dims=True)
    if FAST:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t;
            shfl.sync.bfly.b32 t, $1, 1, 31, 0xffffffff; add.f32 $0, $1, t;
            shfl.sync.bfly.b32 t, $0, 2, 31, 0xffffffff; add.f32 $0, $0, t; }""",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        x = tl.sum(tl.reshape(x, [1, 1, 2, 1, 8, 4]), 5, keep_dims=True)
        return tl.reshape(tl.broadcast_to(x, [1, 1, 2, 1, 8, 4]), [1, 1, 2, 1, 32])


@_kernel
def _sum_columns_into(z, x, i_g, OT: tl.constexpr, FAST: tl.constexpr):
    """z, a column half, with the sums over the tiles and columns of x added in column i_g."""
    lane = tl.arange(0, 32)[None, None, None, None, :]
    if FAST and OT == tl.bfloat16:  # operands of 16 bits are good enough: a product with a column of ones sums them
        ones = tl.where(lane // 4 == i_g, 0x3F803F80, 0)
        x, ones = tl.broadcast(tl.sum(x, 0, keep_dims=True), ones)
        x, z = tl.broadcast(x, z)
        both = tl.inline_asm_elementwise(
            """{
            .reg .b32 a<4>;
            cvt.rn.bf16x2.f32 a0, $17, $16;
            cvt.rn.bf16x2.f32 a1, $19, $18;
            cvt.rn.bf16x2.f32 a2, $21, $20;
            cvt.rn.bf16x2.f32 a3, $23, $22;
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {a0, a1, a2, a3}, {$24, $24}, {$8, $9, $10, $11};
            mov.f32 $4, 0f00000000;
            mov.f32 $5, 0f00000000;
            mov.f32 $6, 0f00000000;
            mov.f32 $7, 0f00000000;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r", [z, x, ones], dtype=tl.float32, is_pure=True, pack=8,
        )
        return _half(both, 0)
    else:
        half, column_8 = _tile_columns()
        return tl.where(column_8 == i_g, z + _sum_columns(x, FAST), z)


@_kernel
def _rows(within, rounded, x, i_g, FAST: tl.constexpr):
    """within times what the lanes of row i_g of x hold, as an operand; of 16 bits, pairs of rounded are multiplied."""
    if FAST and rounded.dtype == tl.bfloat16 and x.dtype == tl.bfloat16:
        rounded, x = tl.broadcast(rounded, _picked(x, i_g))
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }", "=r,r,r", [rounded, x],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )
    else:
        return (within * _pick(x, i_g, FAST)).to(rounded.dtype)


@_kernel
def _lead(since, i_u, ODD: tl.constexpr, OT: tl.constexpr, FAST: tl.constexpr):
    """A column half of an operand with since in column 2 i_u + ODD and zeros elsewhere."""
    lane = tl.arange(0, 32)[None, None, None, None, :]
    if FAST and OT == tl.bfloat16:
        pair = tl.where(tl.arange(0, 2)[None, None, None, :, None] == ODD, since, 0.0).to(OT)
        pair, place = tl.broadcast(pair, lane % 4)
        pair, own = tl.broadcast(pair, i_u + 0 * place)
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.s32 p, $2, $4; selp.b32 $0, $1, 0, p; }", "=r,r,r,r,r,r", [pair, place, own],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )
    else:
        half, column_8 = _tile_columns()
        return tl.where(column_8 == 2 * i_u + ODD, since, 0.0).to(OT)


@_kernel
def _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED: tl.constexpr):
    """First token, end token and first chunk of what sequence ``i_n`` has in the window."""
    if PACKED:
        begin = tl.load(offsets + i_n).to(tl.int64)
        end = tl.load(offsets + i_n + 1).to(tl.int64)
        base = tl.load(bases + i_n).to(tl.int64)
    else:
        begin = i_n.to(tl.int64) * T + LOW
        end = i_n.to(tl.int64) * T + HIGH
        base = i_n.to(tl.int64) * NT
    return begin, end, base


@_kernel
def _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED: tl.constexpr):
    """First and end token of chunk ``i_c`` of the window; empty for the spare chunks of a packed batch."""
    if PACKED:
        begin = tl.load(spans + 2 * i_c).to(tl.int64)
        end = tl.load(spans + 2 * i_c + 1).to(tl.int64)
    else:
        sequence = (i_c // NT).to(tl.int64)
        begin = sequence * T + LOW + (i_c % NT).to(tl.int64) * 16
        end = tl.minimum(begin + 16, sequence * T + HIGH)
    return begin, end


@_kernel
def _place(H, NT, LATEST: tl.constexpr, PACKED: tl.constexpr):
    """Chunk and head of this program: heads of a chunk first. LATEST: the chunks that were written last come first.

    The kernel of the states passes over all sequences at once, so those are the last chunks of all of them.
    """
    pid = tl.program_id(0)
    i_c = pid // H
    if LATEST and not PACKED:
        sequences = tl.num_programs(0) // (H * NT)
        i_c = (i_c % sequences) * NT + NT - 1 - i_c // sequences
    return i_c, pid % H


@_kernel
def _step(at, mask):
    """Log decays; exp(-40) is nothing beside 1, and a longer step would only cost the sums their digits."""
    return tl.minimum(tl.maximum(tl.load(at, mask=mask, other=0.0).to(tl.float32), -40.0), 0.0)


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _sums_kernel(decay, sums, spans, T, LOW, HIGH, NT, H, BH: tl.constexpr, PACKED: tl.constexpr):
    """Sums of log decays from the start of each token's chunk, float32."""
    begin, end = _chunk(spans, tl.program_id(0), T, LOW, HIGH, NT, PACKED)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    token = begin + tl.arange(0, 16)
    here = (token < end)[:, None] & (o_h < H)[None, :]
    at = token[:, None] * H + o_h[None, :]
    tl.store(sums + at, tl.cumsum(_step(decay + at, here), axis=0), mask=here)


@_kernel
def _tile_step(at, mask):
    return tl.minimum(tl.maximum(_get(at, mask).to(tl.float32), -40.0), 0.0)


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _states_kernel(
    k_in, v_in, b_in, sums_0, S_start, S_importance_start, chunks, S_end, S_importance_end, offsets, bases,
    T, LOW, HIGH, NT, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STORE: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """S at the start of every chunk of 16 tokens, kept as [chunk, head, state, V, K] in the operand type."""
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    i_n = tl.program_id(2) // H
    i_h = tl.program_id(2) % H
    begin, end, base = _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED)
    o_c = tl.arange(0, 16)
    m_v, m_k = o_v < V, o_k < K
    m_tile = m_v[:, None] & m_k[None, :]
    user = (i_n.to(tl.int64) * H + i_h) * K * V + o_k[None, :] * V + o_v[:, None]
    tile = o_v[:, None] * K + o_k[None, :]
    if S_start is None:  # zero
        S = tl.zeros([BV, BK], tl.float32)
    else:
        S = tl.load(S_start + user, mask=m_tile, other=0.0).to(tl.float32)
    if S_importance_start is None:  # zero
        S_importance = tl.zeros([BV, BK], tl.float32)
    else:
        S_importance = tl.load(S_importance_start + user, mask=m_tile, other=0.0).to(tl.float32)
    next_0 = tl.load(sums_0 + (tl.minimum(begin + 0 * 16 + 16, end) - 1) * H + i_h, mask=begin < end, other=0.0)
    for i_c in range(0, tl.cdiv(end - begin, 16)):
        slot = chunks + ((base + i_c) * H + i_h) * 2 * V * K + tile
        if STORE:
            tl.store(slot + 0 * V * K, S.to(chunks.dtype.element_ty), mask=m_tile)
            tl.store(slot + 1 * V * K, S_importance.to(chunks.dtype.element_ty), mask=m_tile)
        token = begin + i_c * 16 + o_c
        live = token < end
        at = token * H + i_h
        whole_0 = next_0
        next_0 = tl.load(sums_0 + (tl.minimum(begin + (i_c + 1) * 16 + 16, end) - 1) * H + i_h)  # of the next turn; behind the end, the last
        part = tl.load(sums_0 + at, mask=live, other=0.0)
        until_0 = tl.where(live, tl.exp(tl.minimum(whole_0 - part, 0.0)), 0.0)
        raw_k = tl.load(k_in + at[:, None] * K + o_k[None, :], mask=live[:, None] & m_k[None, :], other=0.0)
        k = raw_k.to(tl.float32)
        raw_v = tl.load(v_in + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
        v = raw_v.to(tl.float32)
        raw_b = tl.load(b_in + at[:, None] * V + o_v[None, :], mask=live[:, None] & m_v[None, :], other=0.0)
        b = raw_b.to(tl.float32)
        key_0 = raw_k.to(OT)
        key_1 = (k * k).to(OT)
        S = S * tl.exp(whole_0)
        S = tl.dot(tl.trans(((v) * until_0[:, None]).to(OT)), key_0, S, input_precision=PRECISION)
        S_importance = S_importance * tl.exp(whole_0)
        S_importance = tl.dot(tl.trans(((b) * until_0[:, None]).to(OT)), key_1, S_importance, input_precision=PRECISION)
    if S_end is not None:
        tl.store(S_end + user, S, mask=m_tile)
    if S_importance_end is not None:
        tl.store(S_importance_end + user, S_importance, mask=m_tile)


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _reads_kernel(
    k_in, q_in, v_in, b_in, decay_0_in, I_p_in, chunks, read_0_out, read_1_out, spans,
    scale, T, LOW, HIGH, NT, H,
    K: tl.constexpr, V: tl.constexpr, I: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr, AHEAD: tl.constexpr,
    FAST: tl.constexpr, VARIANCE: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """read_0 = sum_k S*q/(I_p + S_importance); read_1 = sum_k q**2/(I_p + S_importance).

    Tiles: rows are tokens t, columns key channels, N times I of them (a slab) at once.
    """
    NK: tl.constexpr = (K + 16 * I * N - 1) // (16 * I * N)
    i_c, i_h = _place(H, NT, True, PACKED)
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    row = _tile_rows()
    half, column_8 = _tile_columns()
    column = 8 * half + column_8
    lane_row = tl.arange(0, 32)[None, None, None, None, :] // 4
    # offsets in a chunk are 32 bit wide, from starts that are 64
    start = begin * H + i_h
    live_row, live_column = begin + row < end, begin + column < end
    slot = i_c.to(tl.int64) * H + i_h
    step_row = _tile_step(decay_0_in + start + row * H, live_row)
    step_column = _tile_step(decay_0_in + start + column * H, live_column)
    sum_row = _sum_columns(tl.where(column <= row, step_column, 0.0), FAST)
    sum_column = _sum_rows(tl.where(row <= column, step_row, 0.0), FAST)
    seen_row = sum_row  # by the read of the row's token
    within_0 = tl.where(row >= column, tl.exp(tl.minimum(seen_row - sum_column, 0.0)), 0.0)
    rounded_0 = within_0.to(OT)
    since_0 = tl.exp(seen_row)
    I_p = tl.load(I_p_in + i_h).to(tl.float32)
    zero = tl.zeros([I, 2, 2, 2, 32], tl.float32)
    held_S_importance = _held(I_p, _half(within_0, 0), FAST)
    o_k = 16 * tl.arange(0, I)[:, None, None, None, None]
    if NK == 1:
        first_k = 0
        q = ()
        key_0 = ()
        key_1 = ()
        for i_s in tl.static_range(N):
            channel = first_k + i_s * 16 * I + o_k + row
            raw_k = _get(k_in + start * K + column * H * K + channel, live_column & (channel < K))
            key_0 = key_0 + ((raw_k).to(OT),)
            key_1 = key_1 + ((raw_k.to(tl.float32) * raw_k.to(tl.float32)).to(OT),)
            channel_t = first_k + i_s * 16 * I + o_k + column
            q = q + (_get(q_in + start * K + row * H * K + channel_t, live_row & (channel_t < K)).to(tl.float32),)
    if NK == 1 and AHEAD >= 1:
        next_v_8 = _get(v_in + start * V + column * H * V + 0 + lane_row, live_column & (0 + lane_row < V))
        next_b_8 = _get(b_in + start * V + column * H * V + 0 + lane_row, live_column & (0 + lane_row < V))
    if NK == 1 and AHEAD >= 2:
        next_S_0 = ()
        next_S_importance_0 = ()
        for i_s in tl.static_range(N):
            channel = first_k + i_s * 16 * I + o_k + row
            at_tile = (0 + column_8) * K + channel
            next_S_0 = next_S_0 + (_get(chunks + (slot * 2 + 0) * V * K + at_tile, (0 + column_8 < V) & (channel < K)).to(OT),)
            next_S_importance_0 = next_S_importance_0 + (_get(chunks + (slot * 2 + 1) * V * K + at_tile, (0 + column_8 < V) & (channel < K)).to(OT),)
    for i_v in range((V + 7) // 8):
        first_g = i_v * 8
        sum_read_0 = tl.zeros([1, 1, 2, 2, 32], tl.float32)  # columns: value channels
        sum_read_1 = tl.zeros([1, 1, 2, 2, 32], tl.float32)  # columns: value channels
        for i_k in range(NK):
            if NK > 1:
                first_k = i_k * 16 * I * N
                q = ()
                key_0 = ()
                key_1 = ()
                for i_s in tl.static_range(N):
                    channel = first_k + i_s * 16 * I + o_k + row
                    raw_k = _get(k_in + start * K + column * H * K + channel, live_column & (channel < K))
                    key_0 = key_0 + ((raw_k).to(OT),)
                    key_1 = key_1 + ((raw_k.to(tl.float32) * raw_k.to(tl.float32)).to(OT),)
                    channel_t = first_k + i_s * 16 * I + o_k + column
                    q = q + (_get(q_in + start * K + row * H * K + channel_t, live_row & (channel_t < K)).to(tl.float32),)
            if NK == 1 and AHEAD >= 2:  # loads are under way while others are at work
                S_0 = next_S_0
                S_importance_0 = next_S_importance_0
                next_S_0 = ()
                next_S_importance_0 = ()
                for i_s in tl.static_range(N):
                    channel = first_k + i_s * 16 * I + o_k + row
                    at_tile = ((first_g + 8) + column_8) * K + channel
                    next_S_0 = next_S_0 + (_get(chunks + (slot * 2 + 0) * V * K + at_tile, ((first_g + 8) + column_8 < V) & (channel < K)).to(OT),)
                    next_S_importance_0 = next_S_importance_0 + (_get(chunks + (slot * 2 + 1) * V * K + at_tile, ((first_g + 8) + column_8 < V) & (channel < K)).to(OT),)
            else:
                S_0 = ()
                S_importance_0 = ()
                for i_s in tl.static_range(N):
                    channel = first_k + i_s * 16 * I + o_k + row
                    at_tile = (first_g + column_8) * K + channel
                    S_0 = S_0 + (_get(chunks + (slot * 2 + 0) * V * K + at_tile, (first_g + column_8 < V) & (channel < K)).to(OT),)
                    S_importance_0 = S_importance_0 + (_get(chunks + (slot * 2 + 1) * V * K + at_tile, (first_g + column_8 < V) & (channel < K)).to(OT),)
            if NK == 1 and AHEAD >= 1:
                v_8 = next_v_8
                b_8 = next_b_8
                next_v_8 = _get(v_in + start * V + column * H * V + (first_g + 8) + lane_row, live_column & ((first_g + 8) + lane_row < V))
                next_b_8 = _get(b_in + start * V + column * H * V + (first_g + 8) + lane_row, live_column & ((first_g + 8) + lane_row < V))
            else:
                v_8 = _get(v_in + start * V + column * H * V + first_g + lane_row, live_column & (first_g + lane_row < V))
                b_8 = _get(b_in + start * V + column * H * V + first_g + lane_row, live_column & (first_g + lane_row < V))
            for i_u in range(0, tl.minimum(8 // UNROLL, tl.cdiv(V - first_g, UNROLL))):
                for i_j in tl.static_range(UNROLL):
                    i_g = UNROLL * i_u + i_j
                    lead_0 = _lead(since_0, UNROLL // 2 * i_u + i_j // 2, i_j % 2, OT, FAST)
                    rows_0_0 = _rows(within_0, rounded_0, v_8, i_g, FAST)
                    rows_1_0 = _rows(within_0, rounded_0, b_8, i_g, FAST)
                    for i_s in tl.static_range(N):
                        S = _mma_8(lead_0, S_0[i_s], zero, PRECISION, FAST)
                        S = _mma(rows_0_0, key_0[i_s], S, PRECISION, FAST)
                        S_importance = _mma_8(lead_0, S_importance_0[i_s], held_S_importance, PRECISION, FAST)
                        S_importance = _mma(rows_1_0, key_1[i_s], S_importance, PRECISION, FAST)
                        y_read_0 = S * q[i_s] * _reciprocal(S_importance, FAST)
                        if K % (16 * I) != 0:
                            y_read_0 = tl.where(first_k + i_s * 16 * I + o_k + column < K, y_read_0, 0.0)
                        if V % UNROLL != 0:  # what is not finite beyond the last channel would spread in the sums
                            y_read_0 = tl.where(first_g + i_g < V, y_read_0, 0.0)
                        total_read_0 = y_read_0 if i_s == 0 else total_read_0 + y_read_0
                        if VARIANCE:
                            y_read_1 = q[i_s] * q[i_s] * _reciprocal(S_importance, FAST)
                            if K % (16 * I) != 0:
                                y_read_1 = tl.where(first_k + i_s * 16 * I + o_k + column < K, y_read_1, 0.0)
                            if V % UNROLL != 0:  # what is not finite beyond the last channel would spread in the sums
                                y_read_1 = tl.where(first_g + i_g < V, y_read_1, 0.0)
                            total_read_1 = y_read_1 if i_s == 0 else total_read_1 + y_read_1
                    sum_read_0 = _sum_columns_into(sum_read_0, total_read_0, i_g, OT, FAST)
                    if VARIANCE:
                        sum_read_1 = _sum_columns_into(sum_read_1, total_read_1, i_g, OT, FAST)
        at_v = start * V + row * H * V + first_g + column_8
        m_out = live_row & (first_g + column_8 < V)
        _put(read_0_out + at_v, sum_read_0, m_out)
        if VARIANCE:
            _put(read_1_out + at_v, sum_read_1, m_out)


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _local_kernel(
    k_in, q_in, v_in, b_in, decay_0_in, I_p_in, chunks, d_read_0_in, d_read_1_in, d_k_part, d_q_out, d_value_0_0_part, d_value_1_0_part, direct_0_part, d_I_p_part, adjoints, spans,
    scale, T, LOW, HIGH, NT, H,
    K: tl.constexpr, V: tl.constexpr, I: tl.constexpr, N: tl.constexpr,
    FAST: tl.constexpr, VARIANCE: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """Adjoints inside a chunk: one slab of N times I tiles of key channels of one head, all value channels.

    Tiles: rows are key channels, columns tokens t (states, their adjoints) or s (of what wrote).
    """
    i_c, i_h = _place(H, NT, False, PACKED)
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    row = _tile_rows()
    half, column_8 = _tile_columns()
    column = 8 * half + column_8
    lane_row = tl.arange(0, 32)[None, None, None, None, :] // 4
    # offsets in a chunk are 32 bit wide, from starts that are 64
    start = begin * H + i_h
    live_row, live_column = begin + row < end, begin + column < end
    slot = tl.program_id(0).to(tl.int64)
    step_row = _tile_step(decay_0_in + start + row * H, live_row)
    step_column = _tile_step(decay_0_in + start + column * H, live_column)
    sum_row = _sum_columns(tl.where(column <= row, step_column, 0.0), FAST)
    sum_column = _sum_rows(tl.where(row <= column, step_row, 0.0), FAST)
    seen_row = sum_row  # by the read of the row's token
    within_0 = tl.where(row >= column, tl.exp(tl.minimum(seen_row - sum_column, 0.0)), 0.0)
    rounded_0 = within_0.to(OT)
    since_0 = tl.exp(seen_row)
    seen_column = sum_column
    back_0 = tl.where(column >= row, tl.exp(tl.minimum(seen_column - sum_row, 0.0)), 0.0).to(OT)
    first_0 = tl.exp(_step(decay_0_in + start, begin < end))
    I_p = tl.load(I_p_in + i_h).to(tl.float32)
    zero = tl.zeros([I, 2, 2, 2, 32], tl.float32)
    held_S_importance = _held(I_p, _half(back_0.to(tl.float32), 1), FAST)
    first_k = tl.program_id(1) * 16 * I * N
    o_k = 16 * tl.arange(0, I)[:, None, None, None, None]
    q = ()
    full_k = ()
    key_0 = ()
    key_1 = ()
    d_q = ()
    d_key_0 = ()
    d_key_1 = ()
    for i_s in tl.static_range(N):
        channel = first_k + i_s * 16 * I + o_k + row
        raw_k = _get(k_in + start * K + column * H * K + channel, live_column & (channel < K))
        full_k = full_k + (raw_k.to(tl.float32),)
        key_0 = key_0 + ((raw_k).to(OT),)
        key_1 = key_1 + ((raw_k.to(tl.float32) * raw_k.to(tl.float32)).to(OT),)
        q = q + (_get(q_in + start * K + column * H * K + channel, live_column & (channel < K)).to(tl.float32),)
        d_q = d_q + (zero,)
        d_key_0 = d_key_0 + (zero,)
        d_key_1 = d_key_1 + (zero,)
    sum_0 = tl.zeros([1, 2, 1, 2, 32], tl.float32)
    sum_1 = tl.zeros([1, 2, 1, 2, 32], tl.float32)
    for i_v in range((V + 7) // 8):
        first_g = i_v * 8
        S_0 = ()
        S_importance_0 = ()
        for i_s in tl.static_range(N):
            channel = first_k + i_s * 16 * I + o_k + row
            at_tile = (first_g + column_8) * K + channel
            S_0 = S_0 + (_get(chunks + (slot * 2 + 0) * V * K + at_tile, (first_g + column_8 < V) & (channel < K)).to(OT),)
            S_importance_0 = S_importance_0 + (_get(chunks + (slot * 2 + 1) * V * K + at_tile, (first_g + column_8 < V) & (channel < K)).to(OT),)
        v_8 = _get(v_in + start * V + column * H * V + first_g + lane_row, live_column & (first_g + lane_row < V))
        b_8 = _get(b_in + start * V + column * H * V + first_g + lane_row, live_column & (first_g + lane_row < V))
        d_read_0_8 = _get(d_read_0_in + start * V + column * H * V + first_g + lane_row, live_column & (first_g + lane_row < V))
        if VARIANCE:
            d_read_1_8 = _get(d_read_1_in + start * V + column * H * V + first_g + lane_row, live_column & (first_g + lane_row < V))
        all_d_value_0_0 = tl.zeros([1, 2, 1, 2, 32], tl.float32)  # lane rows: value channels
        all_d_value_1_0 = tl.zeros([1, 2, 1, 2, 32], tl.float32)  # lane rows: value channels
        for i_g in range(0, tl.minimum(8, V - first_g)):
            d_read_0 = _pick(d_read_0_8, i_g, FAST)
            if VARIANCE:
                d_read_1 = _pick(d_read_1_8, i_g, FAST)
            v = _pick(v_8, i_g, FAST)
            b = _pick(b_8, i_g, FAST)
            value_0 = v
            value_1 = b
            lead_0 = tl.where(column_8 == i_g, since_0, 0.0).to(OT)
            rows_0_0 = _rows(within_0, rounded_0, v_8, i_g, FAST)
            rows_1_0 = _rows(within_0, rounded_0, b_8, i_g, FAST)
            new_d_q = ()
            new_d_key_0 = ()
            new_d_key_1 = ()
            for i_s in tl.static_range(N):
                channel = first_k + i_s * 16 * I + o_k + row
                S = _mma_8(S_0[i_s], lead_0, zero, PRECISION, FAST)
                S = _mma(key_0[i_s], rows_0_0, S, PRECISION, FAST)
                S_importance = _mma_8(S_importance_0[i_s], lead_0, held_S_importance, PRECISION, FAST)
                S_importance = _mma(key_1[i_s], rows_1_0, S_importance, PRECISION, FAST)
                if not VARIANCE:
                    c0 = _reciprocal(S_importance, FAST)
                    p0 = c0 * d_read_0
                    p1 = p0 * q[i_s]
                    d_S = p1
                    d_S_importance = -1.0 * S * c0 * p1
                    d_q_tile = S * p0
                    if K % (16 * I) != 0:
                        d_S = tl.where(channel < K, d_S, 0.0)
                        d_S_importance = tl.where(channel < K, d_S_importance, 0.0)
                        d_q_tile = tl.where(channel < K, d_q_tile, 0.0)
                    sum_0 += tl.sum(tl.sum(d_S_importance, 2, keep_dims=True), 0, keep_dims=True)
                if VARIANCE:
                    c0 = _reciprocal(S_importance, FAST)
                    p0 = c0 * q[i_s]
                    d_S = d_read_0 * p0
                    c2 = d_read_1 * q[i_s]
                    p1 = c0 * p0
                    c1 = S * d_read_0
                    p2 = c1
                    d_S_importance = -1.0 * c2 * p1 - p1 * p2
                    d_q_tile = c0 * p2 + 2.0 * d_read_1 * p0
                    sum_1_tile = p1 * (S_importance * c1 + (S_importance - I_p) * (-1.0 * c1 - c2))
                    if K % (16 * I) != 0:
                        d_S = tl.where(channel < K, d_S, 0.0)
                        d_S_importance = tl.where(channel < K, d_S_importance, 0.0)
                        d_q_tile = tl.where(channel < K, d_q_tile, 0.0)
                        sum_1_tile = tl.where(channel < K, sum_1_tile, 0.0)
                    sum_0 += tl.sum(tl.sum(d_S_importance, 2, keep_dims=True), 0, keep_dims=True)
                    sum_1 += tl.sum(tl.sum(sum_1_tile, 2, keep_dims=True), 0, keep_dims=True)
                back_S = _mma(d_S.to(OT), back_0, zero, PRECISION, FAST)
                at_handed = (slot * 2 + 0) * V * K + (first_g + i_g) * K + channel + 0 * column
                _put(adjoints + at_handed, back_S * first_0, (column == 0) & (channel < K))
                back_S_importance = _mma(d_S_importance.to(OT), back_0, zero, PRECISION, FAST)
                at_handed = (slot * 2 + 1) * V * K + (first_g + i_g) * K + channel + 0 * column
                _put(adjoints + at_handed, back_S_importance * first_0, (column == 0) & (channel < K))
                new_d_q = new_d_q + (d_q[i_s] + d_q_tile,)
                new_d_key_0 = new_d_key_0 + (d_key_0[i_s] + value_0 * back_S,)
                new_d_key_1 = new_d_key_1 + (d_key_1[i_s] + value_1 * back_S_importance,)
                side = (full_k[i_s]) * back_S
                of_d_value_0_0 = side if i_s == 0 else of_d_value_0_0 + side
                side = (full_k[i_s] * full_k[i_s]) * back_S_importance
                of_d_value_1_0 = side if i_s == 0 else of_d_value_1_0 + side
            d_q = new_d_q
            d_key_0 = new_d_key_0
            d_key_1 = new_d_key_1
            all_d_value_0_0 = tl.where(lane_row == i_g, _sum_rows_rounded(of_d_value_0_0, OT, FAST), all_d_value_0_0)
            all_d_value_1_0 = tl.where(lane_row == i_g, _sum_rows_rounded(of_d_value_1_0, OT, FAST), all_d_value_1_0)
        own = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        at_part = (own * V + first_g + lane_row) * 16 + column
        _put(d_value_0_0_part + at_part, all_d_value_0_0, first_g + lane_row < V)
        _put(d_value_1_0_part + at_part, all_d_value_1_0, first_g + lane_row < V)
    for i_s in tl.static_range(N):
        channel = first_k + i_s * 16 * I + o_k + row
        at_k = slot * 16 * K + column * K + channel
        raw_k = _get(k_in + start * K + column * H * K + channel, live_column & (channel < K)).to(tl.float32)
        _put(d_k_part + at_k, d_key_0[i_s] + d_key_1[i_s] * (2.0 * raw_k), channel < K)
        _put(d_q_out + start * K + column * H * K + channel, d_q[i_s], live_column & (channel < K))
    total_0 = _sum_rows(sum_0, FAST)
    total_1 = _sum_rows(sum_1, FAST)
    own = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if not VARIANCE:
        _put(direct_0_part + own * 16 + column + 0 * lane_row, (-1.0 * I_p) * total_0, lane_row == 0)
        d_I_p = tl.sum(tl.reshape(tl.where(lane_row == 0, (1.0) * total_0, 0.0), [128]), 0)
    if VARIANCE:
        _put(direct_0_part + own * 16 + column + 0 * lane_row, (1.0) * total_1, lane_row == 0)
        d_I_p = tl.sum(tl.reshape(tl.where(lane_row == 0, (1.0) * total_0, 0.0), [128]), 0)
    tl.store(d_I_p_part + own, tl.where(begin < end, d_I_p, 0.0))


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT", "ROWS"])
def _carry_kernel(
    chunks, adjoints, sums_0, d_S_end, d_S_importance_end, d_S_start, d_S_importance_start, products, d_I_p_part, d_I_p, offsets, bases,
    T, LOW, HIGH, NT, ROWS, H,
    K: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, PACKED: tl.constexpr,
):
    """What each chunk hands over becomes, in place, the adjoint at the chunk's end; products: <start state, adjoint>."""
    i_e = tl.program_id(0)
    i_n = tl.program_id(1) // H
    i_h = tl.program_id(1) % H
    begin, end, base = _sequence(offsets, bases, i_n, T, LOW, HIGH, NT, PACKED)
    many = tl.cdiv(end - begin, 16)
    o_e = i_e * BE + tl.arange(0, BE)  # of [V, K]
    m_e = o_e < V * K
    user = (i_n.to(tl.int64) * H + i_h) * K * V + o_e % K * V + o_e // K
    if (i_e == 0) & (i_n == 0):
        sum_I_p = tl.zeros([256], tl.float32)
        for i_r in range(0, tl.cdiv(ROWS, 256)):
            o_r = i_r * 256 + tl.arange(0, 256)
            sum_I_p += tl.load(d_I_p_part + o_r * H + i_h, mask=o_r < ROWS, other=0.0)
        tl.store(d_I_p + i_h, tl.load(d_I_p + i_h, mask=HIGH < T, other=0.0) + tl.sum(sum_I_p, 0))
    if d_S_end is None:  # zero
        d_S = tl.zeros([BE], tl.float32)
    else:
        d_S = tl.load(d_S_end + user, mask=m_e, other=0.0).to(tl.float32)
    if d_S_importance_end is None:  # zero
        d_S_importance = tl.zeros([BE], tl.float32)
    else:
        d_S_importance = tl.load(d_S_importance_end + user, mask=m_e, other=0.0).to(tl.float32)
    slot = ((base + (many - 1)) * H + i_h) * 2 * V * K
    here = m_e & (o_e * 0 + (many - 1) >= 0)
    last = (tl.minimum(begin + (many - 1) * 16 + 16, end) - 1) * H + i_h
    handed_0 = tl.load(adjoints + slot + 0 * V * K + o_e, mask=here, other=0.0)
    start_0 = tl.load(chunks + slot + 0 * V * K + o_e, mask=here, other=0.0)
    handed_1 = tl.load(adjoints + slot + 1 * V * K + o_e, mask=here, other=0.0)
    start_1 = tl.load(chunks + slot + 1 * V * K + o_e, mask=here, other=0.0)
    whole_0 = tl.load(sums_0 + last, mask=(many - 1) >= 0, other=0.0)
    for i_r in range(0, many):
        i_c = many - 1 - i_r
        # of the next turn, so that its latency hides behind this one
        slot = ((base + (i_c - 1)) * H + i_h) * 2 * V * K
        here = m_e & (o_e * 0 + (i_c - 1) >= 0)
        last = (tl.minimum(begin + (i_c - 1) * 16 + 16, end) - 1) * H + i_h
        handed_0_next = tl.load(adjoints + slot + 0 * V * K + o_e, mask=here, other=0.0)
        start_0_next = tl.load(chunks + slot + 0 * V * K + o_e, mask=here, other=0.0)
        handed_1_next = tl.load(adjoints + slot + 1 * V * K + o_e, mask=here, other=0.0)
        start_1_next = tl.load(chunks + slot + 1 * V * K + o_e, mask=here, other=0.0)
        whole_0_next = tl.load(sums_0 + last, mask=(i_c - 1) >= 0, other=0.0)
        slot = ((base + i_c) * H + i_h) * 2 * V * K
        tl.store(adjoints + slot + 0 * V * K + o_e, d_S.to(adjoints.dtype.element_ty), mask=m_e)
        d_S = handed_0.to(tl.float32) + tl.exp(whole_0) * d_S
        tl.store(adjoints + slot + 1 * V * K + o_e, d_S_importance.to(adjoints.dtype.element_ty), mask=m_e)
        d_S_importance = handed_1.to(tl.float32) + tl.exp(whole_0) * d_S_importance
        tl.store(products + (((base + i_c) * H + i_h) * 1 + 0) * tl.num_programs(0) + i_e, tl.sum(start_0.to(tl.float32) * d_S + start_1.to(tl.float32) * d_S_importance, 0))
        handed_0 = handed_0_next
        start_0 = start_0_next
        handed_1 = handed_1_next
        start_1 = start_1_next
        whole_0 = whole_0_next
    if d_S_start is not None:
        tl.store(d_S_start + user, d_S, mask=m_e)
    if d_S_importance_start is not None:
        tl.store(d_S_importance_start + user, d_S_importance, mask=m_e)


@_kernel(do_not_specialize=["T", "LOW", "HIGH", "NT"])
def _settle_kernel(
    k_in, v_in, b_in, sums_0, adjoints, products, d_value_0_0_part, d_value_1_0_part, direct_0_part, d_k_part, d_k_out, d_v_out, d_b_out, d_decay_0, spans,
    T, LOW, HIGH, NT, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLABS: tl.constexpr,
    PARTS: tl.constexpr, BP: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):
    """Final gradients of one chunk of one head; BK covers all key channels."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_c, i_h = _place(H, NT, False, PACKED)
    begin, end = _chunk(spans, i_c, T, LOW, HIGH, NT, PACKED)
    o_c = tl.arange(0, 16)
    o_p = tl.arange(0, BP)
    o_k = tl.arange(0, BK)
    start = begin * H + i_h
    slot = tl.program_id(0).to(tl.int64)
    slots = tl.num_programs(0).to(tl.int64)
    at = o_c * H
    live = begin + o_c < end
    m_k = o_k < K
    m_ck = live[:, None] & m_k[None, :]
    at_k = at[:, None] * K + o_k[None, :]
    whole = tl.load(sums_0 + (end - 1) * H + i_h, mask=begin < end, other=0.0)
    part_0 = tl.load(sums_0 + start + at, mask=live, other=0.0)
    until_0 = tl.where(live, tl.exp(tl.minimum(whole - part_0, 0.0)), 0.0)
    wrote_0 = tl.zeros([16], tl.float32)
    direct_0 = tl.zeros([16], tl.float32)
    raw_k = tl.load(k_in + start * K + at_k, mask=m_ck, other=0.0)
    k = raw_k.to(tl.float32)
    key_0 = raw_k.to(OT)
    key_1 = (k * k).to(OT)
    d_key_0 = tl.zeros([16, BK], tl.float32)
    d_key_1 = tl.zeros([16, BK], tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        m_cv = live[:, None] & m_v[None, :]
        at_v = at[:, None] * V + o_v[None, :]
        at_part = slot * V * 16 + o_v[None, :] * 16 + o_c[:, None]
        tile = o_v[:, None] * K + o_k[None, :]
        m_tile = m_v[:, None] & m_k[None, :]
        v = tl.load(v_in + start * V + at_v, mask=m_cv, other=0.0).to(tl.float32)
        b = tl.load(b_in + start * V + at_v, mask=m_cv, other=0.0).to(tl.float32)
        value_0 = v
        value_1 = b
        weighted_0_0 = (value_0 * until_0[:, None]).to(OT)
        weighted_1_0 = (value_1 * until_0[:, None]).to(OT)
        d_S = tl.load(adjoints + (slot * 2 + 0) * V * K + tile, mask=m_tile, other=0.0).to(OT)
        d_value_0_0 = tl.dot(key_0, tl.trans(d_S), input_precision=PRECISION) * until_0[:, None]
        d_key_0 = tl.dot(weighted_0_0, d_S, d_key_0, input_precision=PRECISION)
        d_S_importance = tl.load(adjoints + (slot * 2 + 1) * V * K + tile, mask=m_tile, other=0.0).to(OT)
        d_value_1_0 = tl.dot(key_1, tl.trans(d_S_importance), input_precision=PRECISION) * until_0[:, None]
        d_key_1 = tl.dot(weighted_1_0, d_S_importance, d_key_1, input_precision=PRECISION)
        for i_s in tl.static_range(SLABS):
            d_value_0_0 += tl.load(d_value_0_0_part + i_s * slots * V * 16 + at_part, mask=m_cv, other=0.0)
            d_value_1_0 += tl.load(d_value_1_0_part + i_s * slots * V * 16 + at_part, mask=m_cv, other=0.0)
        wrote_0 += tl.sum(d_value_0_0 * value_0, 1)
        wrote_0 += tl.sum(d_value_1_0 * value_1, 1)
        d_value_0 = d_value_0_0
        d_value_1 = d_value_1_0
        tl.store(d_v_out + start * V + at_v, (d_value_0).to(d_v_out.dtype.element_ty), mask=m_cv)
        tl.store(d_b_out + start * V + at_v, (d_value_1).to(d_b_out.dtype.element_ty), mask=m_cv)
    tl.store(d_k_out + start * K + at_k, (tl.load(d_k_part + slot * 16 * K + o_c[:, None] * K + o_k[None, :], mask=m_ck, other=0.0) + d_key_0 + d_key_1 * (2.0 * k)).to(d_k_out.dtype.element_ty), mask=m_ck)
    for i_s in range(SLABS):
        direct_0 += tl.load(direct_0_part + (i_s * slots + slot) * 16 + o_c, mask=live, other=0.0)
    along = direct_0 - wrote_0
    product = tl.sum(tl.load(products + (slot * 1 + 0) * PARTS + o_p, mask=o_p < PARTS, other=0.0), 0)
    d_decay = product - tl.cumsum(along, 0) + along
    # of a decay that leaves nothing it is a difference of equal sums: nothing, to the last digit of either
    before = tl.load(sums_0 + start + at - H, mask=live & (o_c > 0), other=0.0)
    d_decay = tl.where(part_0 - before < -16.0, 0.0, d_decay)
    tl.store(d_decay_0 + start + at, d_decay, mask=live)


def _registers(tensor, count):
    """Compile option: fewer registers a thread, for more blocks on a multiprocessor."""
    return {"maxnreg": count} if _fast(tensor) and count else {}


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


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def _windows(T, bytes_a_token, share, warps_a_chunk, device):
    """Bounds of the windows of time; forward, ``share`` is 6 instead of 2: gradients do not yet take memory then.

    A window's warps fill the GPU, 8 to a multiprocessor, a whole number of times: else its last turn would idle.
    """
    size = max(256, share * 109051904 // 2 // max(1, bytes_a_token))
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


@_repeated
def _ratio_forward(k, v, b, q, decay_0, I_p, S, S_importance, scale, offsets, variance, want_final=True, keep=False):
    """Reads of every token, final states; with ``keep``, if it is small, what spares the backward pass work.

    Initial states may be None: zero. Final states and the reads of the variance are None unless wanted.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    dtype, device = k.dtype, k.device
    OT, precision = _operands(dtype)
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    common = {'OT': OT, 'PRECISION': precision, 'PACKED': offsets is not None}
    bytes_a_token = 2 * B * H * K * V * kept.itemsize // 16
    bounds = _windows(T, bytes_a_token, 6, N * H, device)
    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:]))
    most = N * -(-longest // 16) if offsets is None else longest // 16 + N  # chunks of a window
    read_0 = torch.empty((B, T, H, V), dtype=dtype, device=device)
    read_1 = torch.empty((B, T, H, V), dtype=dtype, device=device) if variance else None
    S_end = S
    S_importance_end = S_importance
    border = torch.empty(most * H * 2 * V * K, dtype=kept, device=device)
    sums_0 = torch.empty((B, T, H), dtype=torch.float32, device=device)
    for low, high in zip(bounds[:-1], bounds[1:]):
        S_start, S_end = S_end, None
        S_importance_start, S_importance_end = S_importance_end, None
        if want_final or high < T:
            S_end = torch.empty((N, H, K, V), dtype=torch.float32, device=device)
            S_importance_end = torch.empty((N, H, K, V), dtype=torch.float32, device=device)
        inside, spans, bases, NT, chunks = _window(T, low, high, offsets, N)
        place = (T, low, high, NT)
        _sums(decay_0, sums_0, spans, T, low, high, NT, chunks)
        BK, BV, warps = _chosen(_states_proposals, 'ratio_states', K, V, dtype)
        pointers = (k, v, b, sums_0, S_start, S_importance_start, border, S_end, S_importance_end, inside, bases)
        _launch(
            _states_kernel, (_cdiv(V, BV), _cdiv(K, BK), N * H), pointers, place, (H,),
            K=K, V=V, BK=BK, BV=BV, STORE=True, num_warps=warps, num_stages=3, **common,
        )
        I, slabs, unroll, registers, ahead = _chosen(_reads_proposals, 'ratio_reads', K, V, dtype)
        pointers = (k, q, v, b, decay_0, I_p, border, read_0, read_1, spans)
        _launch(
            _reads_kernel, (chunks * H, 1, 1), pointers, (scale, *place), (H,),
            K=K, V=V, I=I, N=slabs, UNROLL=unroll, AHEAD=ahead, FAST=_fast(border), VARIANCE=variance,
            num_warps=1, num_stages=1, **_registers(border, registers), **common,
        )
    keep = keep and len(bounds) == 2 and border.numel() <= k.numel() + v.numel() + b.numel() + q.numel()
    kept = (border, sums_0) if keep else ()
    return read_0, read_1, S_end, S_importance_end, *kept


@_repeated
def _ratio_backward(k, v, b, q, decay_0, I_p, S, S_importance, d_read_0, d_read_1, d_S_end, d_S_importance_end, scale, offsets, variance, *given):
    """Gradients of tensors, log decays, parameters and initial states; ``given`` is what the forward pass kept."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if offsets is None else offsets.shape[0] - 1
    dtype, device = k.dtype, k.device
    OT, precision = _operands(dtype)
    I_local, N_local, registers = _chosen(_local_proposals, 'ratio_local', K, V, dtype)
    slabs_here = _cdiv(K, 16 * I_local * N_local)
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    common = {'OT': OT, 'PRECISION': precision, 'PACKED': offsets is not None}
    bytes_a_token = 4 * B * H * K * V * kept.itemsize // 16
    bounds = _windows(T, bytes_a_token, 2, slabs_here * N * H, device)
    if given:
        bounds = [0, T]
    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:]))
    most = N * -(-longest // 16) if offsets is None else longest // 16 + N  # chunks of a window
    if d_read_0 is None:
        d_read_0 = torch.zeros((B, T, H, V), dtype=dtype, device=device)
    variance = variance and not (d_read_1 is None)
    d_k_out = torch.empty_like(k)
    d_q_out = torch.empty_like(q)
    d_v_out = torch.empty_like(v)
    d_b_out = torch.empty_like(b)
    BE = 256 if K * V >= 256 else 32  # elements of a state that one warp scans
    parts = _cdiv(K * V, BE)
    d_decay_0 = torch.empty_like(decay_0)
    d_I_p = torch.empty((H,), dtype=torch.float32, device=device)
    if given:
        border, sums_0 = given
    else:
        border = torch.empty(most * H * 2 * V * K, dtype=kept, device=device)
        sums_0 = torch.empty((B, T, H), dtype=torch.float32, device=device)
    d_value_0_0_part, d_value_1_0_part, adjoints = _shares(
        kept, device, slabs_here * most * 16 * H * V, slabs_here * most * 16 * H * V, border.numel()
    )
    d_k_part, direct_0_part, products = _shares(
        torch.float32, device, most * 16 * H * K, slabs_here * most * 16 * H, most * H * 1 * parts
    )
    # states at the start of every window
    S_end, S_starts = S, []
    S_importance_end, S_importance_starts = S_importance, []
    for low, high in zip(bounds[:-1], bounds[1:]):
        S_starts.append(S_end if low == 0 else S_end.to(kept))
        S_importance_starts.append(S_importance_end if low == 0 else S_importance_end.to(kept))
        if high == T:
            break
        S_start, S_end = S_end, torch.empty((N, H, K, V), dtype=torch.float32, device=device)
        S_importance_start, S_importance_end = S_importance_end, torch.empty((N, H, K, V), dtype=torch.float32, device=device)
        inside, spans, bases, NT, chunks = _window(T, low, high, offsets, N)
        place = (T, low, high, NT)
        _sums(decay_0, sums_0, spans, T, low, high, NT, chunks)
        BK, BV, warps = _chosen(_states_proposals, 'ratio_states', K, V, dtype)
        pointers = (k, v, b, sums_0, S_start, S_importance_start, border, S_end, S_importance_end, inside, bases)
        _launch(
            _states_kernel, (_cdiv(V, BV), _cdiv(K, BK), N * H), pointers, place, (H,),
            K=K, V=V, BK=BK, BV=BV, STORE=False, num_warps=warps, num_stages=3, **common,
        )
    for low, high in zip(bounds[-2::-1], bounds[:0:-1]):
        S_start, S_end = S_starts.pop(), None
        S_importance_start, S_importance_end = S_importance_starts.pop(), None
        inside, spans, bases, NT, chunks = _window(T, low, high, offsets, N)
        place = (T, low, high, NT)
        if not given:
            _sums(decay_0, sums_0, spans, T, low, high, NT, chunks)
            BK, BV, warps = _chosen(_states_proposals, 'ratio_states', K, V, dtype)
            pointers = (k, v, b, sums_0, S_start, S_importance_start, border, S_end, S_importance_end, inside, bases)
            _launch(
                _states_kernel, (_cdiv(V, BV), _cdiv(K, BK), N * H), pointers, place, (H,),
                K=K, V=V, BK=BK, BV=BV, STORE=True, num_warps=warps, num_stages=3, **common,
            )
        d_I_p_part = torch.empty((slabs_here * chunks, H), dtype=torch.float32, device=device)
        pointers = (k, q, v, b, decay_0, I_p, border, d_read_0, d_read_1, d_k_part, d_q_out, d_value_0_0_part, d_value_1_0_part, direct_0_part, d_I_p_part, adjoints, spans)
        _launch(
            _local_kernel, (chunks * H, slabs_here, 1), pointers, (scale, *place), (H,),
            K=K, V=V, I=I_local, N=N_local, FAST=_fast(border), VARIANCE=variance,
            num_warps=1, num_stages=1, **_registers(border, registers), **common,
        )
        d_S_start = None if low == 0 and S is None else torch.empty((N, H, K, V), dtype=torch.float32, device=device)
        d_S_importance_start = None if low == 0 and S_importance is None else torch.empty((N, H, K, V), dtype=torch.float32, device=device)
        pointers = (border, adjoints, sums_0, d_S_end, d_S_importance_end,
                    d_S_start, d_S_importance_start, products, d_I_p_part, d_I_p, inside, bases)
        _launch(
            _carry_kernel, (parts, N * H, 1), pointers, (*place, slabs_here * chunks), (H,),
            K=K, V=V, BE=BE, PACKED=offsets is not None, num_warps=1,
        )
        BK, BV, warps = _settle_tiles(K, V)
        pointers = (k, v, b, sums_0, adjoints, products, d_value_0_0_part, d_value_1_0_part, direct_0_part, d_k_part, d_k_out, d_v_out, d_b_out, d_decay_0, spans)
        _launch(
            _settle_kernel, (chunks * H, 1, 1), pointers, place, (H,),
            K=K, V=V, BK=BK, BV=BV, SLABS=slabs_here, PARTS=parts, BP=triton.next_power_of_2(parts),
            num_warps=warps, num_stages=2, **common,
        )
        d_S_end = d_S_start
        d_S_importance_end = d_S_importance_start
    return d_k_out, d_v_out, d_b_out, d_q_out, d_decay_0, _typed(d_I_p, I_p.dtype), d_S_start, d_S_importance_start


def _ratio_whole(*arguments):
    """As an operator, which returns tensors: the reads of the variance are empty unless wanted."""
    like = arguments[0]
    return tuple([like.new_empty(0) if r is None else r for r in _ratio_forward(*arguments)])


_ratio_op = torch.library.custom_op(
    f"{_OPS}::ratio", lambda *arguments: _ratio_whole(*arguments), mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor b, Tensor q, Tensor decay_0, Tensor I_p, Tensor S, Tensor S_importance, float scale, Tensor? offsets, bool variance) -> (Tensor, Tensor, Tensor, Tensor)",
)
_ratio_backward_op = torch.library.custom_op(
    f"{_OPS}::ratio_backward", lambda *arguments: _ratio_backward(*arguments), mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor b, Tensor q, Tensor decay_0, Tensor I_p, Tensor S, Tensor S_importance, Tensor d_read_0, Tensor d_read_1, Tensor d_S_end, Tensor d_S_importance_end, float scale, Tensor? offsets, bool variance)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_ratio_op.register_fake
def _ratio_fake(*arguments):
    *tensors, scale, offsets, variance = arguments
    like = tensors[1].new_empty(tensors[1].shape, dtype=tensors[0].dtype)
    return like.new_empty(like.shape, dtype=like.dtype), like.new_empty(like.shape if variance else (0,), dtype=like.dtype), *(torch.empty_like(t) for t in tensors[6:])


@_ratio_backward_op.register_fake
def _ratio_backward_fake(*arguments):
    return tuple(torch.empty_like(t) for t in arguments[:8])


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
        ctx.save_for_backward(*tensors, offsets, *results[4:])
        return results[:4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        tensors, offsets, kept = saved[:8], saved[8], saved[9:]
        given = [None if g is None else g.contiguous() for g in grads]
        return (*_ratio_backward(*tensors, *given, ctx.scale, offsets, ctx.variance, *kept), None, None, None, None)


def _ratio(*arguments):
    """Reads of every token and, if the last argument asks for them, final states, differentiable."""
    if torch.compiler.is_compiling():
        return _ratio_op(*arguments[:-1])
    if torch.is_grad_enabled() and any([isinstance(t, torch.Tensor) and t.requires_grad for t in arguments]):
        return _ratio_eager.apply(*arguments)
    return _ratio_forward(*arguments)


def _chunk_triton_core(q, k, v, g, b, I_p, S, S_importance, scale, offsets, want_variance, want_final=True):
    """States by matmuls over chunks of 16 tokens, reads element by element; all chunks in parallel."""
    if q.dtype == torch.float64:  # no tensor cores for it
        return _reference_core(q, k, v, g, b, I_p, S, S_importance, scale, offsets, want_variance)
    dtype = _common(k.dtype, v.dtype, b.dtype, q.dtype)  # operands of the matmuls
    read_0, read_1, S_end, S_importance_end = _ratio(
        _typed(k, dtype).contiguous(), _typed(v, dtype).contiguous(), _typed(b, dtype).contiguous(), _typed(q, dtype).contiguous(), g.contiguous(), I_p.contiguous(), *(s if s is None else s.contiguous() for s in (S, S_importance,)), scale, offsets, want_variance, want_final,
    )
    output = _typed(read_0, q.dtype)
    variance = None
    if want_variance:
        variance = _typed(read_1, q.dtype)
    return output, variance, S_end, S_importance_end


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
    q_in, k_in, v_in, g_in, b_in, I_p_in, S_initial, S_importance_initial, o, variance, S_final,
    S_importance_final, S_saved, S_importance_saved,
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
    I_p = tl.load(I_p_in + i_h)
    q_next = tl.load(q_in + at * K + r_k, mask=r_k < K, other=0.0)
    k_next = tl.load(k_in + at * K + r_k, mask=r_k < K, other=0.0)
    v_next = tl.load(v_in + at * V + r_v, mask=r_v < V, other=0.0)
    g_next = tl.load(g_in + at)
    b_next = tl.load(b_in + at * V + r_v, mask=r_v < V, other=0.0)
    S = tl.load(S_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0)
    S_importance = tl.load(S_importance_initial + i_nh * K * V + t_kv, mask=m_kv, other=0.0)
    S = S.to(tl.float32)
    S_importance = S_importance.to(tl.float32)
    I_p = I_p.to(tl.float32)
    for t in range(0, steps):
        at = (begin + t) * H + i_h
        ahead = (begin + tl.minimum(t + 1, steps - 1)) * H + i_h
        q = q_next.to(tl.float32)[:, None]
        k = k_next.to(tl.float32)[:, None]
        v = v_next.to(tl.float32)[None, :]
        g = g_next.to(tl.float32)
        b = b_next.to(tl.float32)[None, :]
        q_next = tl.load(q_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        k_next = tl.load(k_in + ahead * K + r_k, mask=r_k < K, other=0.0)
        v_next = tl.load(v_in + ahead * V + r_v, mask=r_v < V, other=0.0)
        g_next = tl.load(g_in + ahead)
        b_next = tl.load(b_in + ahead * V + r_v, mask=r_v < V, other=0.0)
        if SAVE:
            if t % EVERY == 0:
                slot = (begin // EVERY + i_n + t // EVERY) * H + i_h
                tl.store(S_saved + slot * K * V + t_kv, (S).to(S_saved.dtype.element_ty), mask=m_kv)
                tl.store(S_importance_saved + slot * K * V + t_kv, (S_importance).to(S_importance_saved.dtype.element_ty), mask=m_kv)
        c0 = tl.exp(g)
        row0 = k * k
        S_importance_new = S_importance * c0 + b * row0
        S_new = S * c0 + k * v
        if OUTPUT:
            x0 = 1.0 / (I_p + S_importance_new)
            sum0 = tl.sum(_live(S_new * q * x0, m_k, EXACT_K), axis=0)[None, :]
            tl.store(o + at * V + o_v, (sum0).to(o.dtype.element_ty), mask=m_v)
        if VARIANCE:
            row1 = q * q
            x0 = 1.0 / (I_p + S_importance_new)
            sum1 = tl.sum(_live(row1 * x0, m_k, EXACT_K), axis=0)[None, :]
            tl.store(variance + at * V + o_v, (sum1).to(variance.dtype.element_ty), mask=m_v)
        S_after = S_new
        S_importance_after = S_importance_new
        S = S_after
        S_importance = S_importance_after
    if OUTPUT:
        tl.store(S_final + i_nh * K * V + t_kv, (S).to(S_final.dtype.element_ty), mask=m_kv)
        tl.store(S_importance_final + i_nh * K * V + t_kv, (S_importance).to(S_importance_final.dtype.element_ty), mask=m_kv)


@_kernel(do_not_specialize=["T", "EVERY", "TOTAL"])
def _sequential_backward_kernel(
    q_in_, k_in_, v_in_, g_in_, b_in_, I_p_in_, S_saved_, S_importance_saved_, S_past, S_importance_past,
    d_output_in, d_S_final, d_S_importance_final, d_q_out, d_k_out, d_v_out, d_g_out, d_b_out, d_I_p_out,
    d_S_initial, d_S_importance_initial,
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
    I_p = tl.load(I_p_in_ + i_h)
    I_p = I_p.to(tl.float32)
    d_S = tl.load(d_S_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    d_S_importance = tl.load(d_S_importance_final + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    sum_I_p = zero_
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (begin // EVERY + i_n + segment) * H + i_h
        S = tl.load(S_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        S_importance = tl.load(S_importance_saved_ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        # The states of this segment once more.
        at = first * H + i_h
        k_next_ = tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next_ = tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next_ = tl.load(g_in_ + at)
        b_next_ = tl.load(b_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        for t in range(0, count):
            at = (first + t) * H + i_h
            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            tl.store(S_past + place * BK * BV + t_past, S)
            tl.store(S_importance_past + place * BK * BV + t_past, S_importance)
            k = k_next_.to(tl.float32)[:, None]
            v = v_next_.to(tl.float32)[None, :]
            g = g_next_.to(tl.float32)
            b = b_next_.to(tl.float32)[None, :]
            k_next_ = tl.load(k_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next_ = tl.load(v_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next_ = tl.load(g_in_ + ahead)
            b_next_ = tl.load(b_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            c0_ = tl.exp(g)
            row0_ = k * k
            S_importance_new_ = S_importance * c0_ + b * row0_
            S_new_ = S * c0_ + k * v
            S_after_ = S_new_
            S_importance_after_ = S_importance_new_
            S = S_after_
            S_importance = S_importance_after_
        tl.debug_barrier()  # other threads of this program read what these wrote
        # Cotangents, last token first.
        at = (first + count - 1) * H + i_h
        q_next_ = tl.load(q_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        k_next__ = tl.load(k_in_ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next__ = tl.load(v_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next__ = tl.load(g_in_ + at)
        b_next__ = tl.load(b_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        d_output_next = tl.load(d_output_in + at * V + r_v, mask=r_v < V, other=0.0)
        for back_t in range(0, count):
            t = count - 1 - back_t
            at = (first + t) * H + i_h
            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            S_old = tl.load(S_past + place * BK * BV + t_past)
            S_importance_old = tl.load(S_importance_past + place * BK * BV + t_past)
            q = q_next_.to(tl.float32)[:, None]
            k = k_next__.to(tl.float32)[:, None]
            v = v_next__.to(tl.float32)[None, :]
            g = g_next__.to(tl.float32)
            b = b_next__.to(tl.float32)[None, :]
            q_next_ = tl.load(q_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            k_next__ = tl.load(k_in_ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next__ = tl.load(v_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next__ = tl.load(g_in_ + ahead)
            b_next__ = tl.load(b_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            d_output = d_output_next.to(tl.float32)[None, :]
            d_output_next = tl.load(d_output_in + ahead * V + r_v, mask=r_v < V, other=0.0)
            c0__ = tl.exp(g)
            x0_ = 1.0 / (I_p + S_importance)
            x1 = d_output * x0_
            sum0_ = tl.sum(_live(S * x1, m_v, EXACT_V), axis=1)[:, None]
            x4 = S * d_output * q * x0_ * x0_
            x5 = d_S_importance - x4
            sum1_ = tl.sum(_live(b * x5, m_v, EXACT_V), axis=1)[:, None]
            x2 = d_S + q * x1
            sum2 = tl.sum(_live(v * x2, m_v, EXACT_V), axis=1)[:, None]
            sum3 = tl.sum(_live(k * x2, m_k, EXACT_K), axis=0)[None, :]
            sum4 = tl.sum(_live(S_old * x2 + S_importance_old * x5, m_k, EXACT_K), axis=0)[None, :]
            sum5 = tl.sum(_live(sum4, m_v, EXACT_V))
            row0__ = k * k
            sum6 = tl.sum(_live(row0__ * x5, m_k, EXACT_K), axis=0)[None, :]
            sum7 = tl.sum(_live(x4, m_k, EXACT_K), axis=0)[None, :]
            sum8 = tl.sum(_live(sum7, m_v, EXACT_V))
            x3 = c0__ * x2
            x6 = c0__ * x5
            tl.store(d_q_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (sum0_).to(d_q_out.dtype.element_ty), mask=m_k)
            tl.store(d_k_out + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * k * sum1_ + sum2).to(d_k_out.dtype.element_ty), mask=m_k)
            tl.store(d_v_out + at * V + o_v, (sum3).to(d_v_out.dtype.element_ty), mask=m_v)
            tl.store(d_g_out + (i_v.to(tl.int64) * TOTAL + at), (c0__ * sum5).to(d_g_out.dtype.element_ty))
            tl.store(d_b_out + at * V + o_v, (sum6).to(d_b_out.dtype.element_ty), mask=m_v)
            sum_I_p += -1.0 * sum8
            d_S_after = x3
            d_S_importance_after = x6
            d_S = d_S_after
            d_S_importance = d_S_importance_after
            S = S_old
            S_importance = S_importance_old
        tl.debug_barrier()
    tl.store(d_I_p_out + shared, (sum_I_p).to(d_I_p_out.dtype.element_ty))
    tl.store(d_S_initial + i_nh * K * V + t_kv, (d_S).to(d_S_initial.dtype.element_ty), mask=m_kv)
    tl.store(d_S_importance_initial + i_nh * K * V + t_kv, (d_S_importance).to(d_S_importance_initial.dtype.element_ty), mask=m_kv)


@_kernel(do_not_specialize=["T", "EVERY", "TOTAL"])
def _sequential_backward_variance_kernel(
    q_in__, k_in__, v_in__, g_in__, b_in__, I_p_in__, S_saved__, S_importance_saved__, S_past_,
    S_importance_past_, d_output_in_, d_variance_in, d_S_final_, d_S_importance_final_, d_q_out_, d_k_out_,
    d_v_out_, d_g_out_, d_b_out_, d_I_p_out_, d_S_initial_, d_S_importance_initial_,
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
    I_p = tl.load(I_p_in__ + i_h)
    I_p = I_p.to(tl.float32)
    d_S_ = tl.load(d_S_final_ + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    d_S_importance_ = tl.load(d_S_importance_final_ + i_nh * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
    sum_I_p_ = zero_
    segments = tl.cdiv(steps, EVERY)
    for back in range(0, segments):
        segment = segments - 1 - back
        first = begin + segment * EVERY
        count = tl.minimum(EVERY, steps - segment * EVERY)
        slot = (begin // EVERY + i_n + segment) * H + i_h
        S = tl.load(S_saved__ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        S_importance = tl.load(S_importance_saved__ + slot * K * V + t_kv, mask=m_kv, other=0.0).to(tl.float32)
        # The states of this segment once more.
        at = first * H + i_h
        k_next___ = tl.load(k_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next___ = tl.load(v_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next___ = tl.load(g_in__ + at)
        b_next___ = tl.load(b_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        for t in range(0, count):
            at = (first + t) * H + i_h
            ahead = (first + tl.minimum(t + 1, count - 1)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            tl.store(S_past_ + place * BK * BV + t_past, S)
            tl.store(S_importance_past_ + place * BK * BV + t_past, S_importance)
            k = k_next___.to(tl.float32)[:, None]
            v = v_next___.to(tl.float32)[None, :]
            g = g_next___.to(tl.float32)
            b = b_next___.to(tl.float32)[None, :]
            k_next___ = tl.load(k_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next___ = tl.load(v_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next___ = tl.load(g_in__ + ahead)
            b_next___ = tl.load(b_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            c0___ = tl.exp(g)
            row0___ = k * k
            S_importance_new__ = S_importance * c0___ + b * row0___
            S_new__ = S * c0___ + k * v
            S_after__ = S_new__
            S_importance_after__ = S_importance_new__
            S = S_after__
            S_importance = S_importance_after__
        tl.debug_barrier()  # other threads of this program read what these wrote
        # Cotangents, last token first.
        at = (first + count - 1) * H + i_h
        q_next__ = tl.load(q_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        k_next____ = tl.load(k_in__ + at * K + r_k, mask=r_k < K, other=0.0)
        v_next____ = tl.load(v_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        g_next____ = tl.load(g_in__ + at)
        b_next____ = tl.load(b_in__ + at * V + r_v, mask=r_v < V, other=0.0)
        d_output__next = tl.load(d_output_in_ + at * V + r_v, mask=r_v < V, other=0.0)
        d_variance_next = tl.load(d_variance_in + at * V + r_v, mask=r_v < V, other=0.0)
        for back_t in range(0, count):
            t = count - 1 - back_t
            at = (first + t) * H + i_h
            ahead = (first + tl.maximum(t - 1, 0)) * H + i_h
            place = pid.to(tl.int64) * EVERY + t
            S_old_ = tl.load(S_past_ + place * BK * BV + t_past)
            S_importance_old_ = tl.load(S_importance_past_ + place * BK * BV + t_past)
            q = q_next__.to(tl.float32)[:, None]
            k = k_next____.to(tl.float32)[:, None]
            v = v_next____.to(tl.float32)[None, :]
            g = g_next____.to(tl.float32)
            b = b_next____.to(tl.float32)[None, :]
            q_next__ = tl.load(q_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            k_next____ = tl.load(k_in__ + ahead * K + r_k, mask=r_k < K, other=0.0)
            v_next____ = tl.load(v_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            g_next____ = tl.load(g_in__ + ahead)
            b_next____ = tl.load(b_in__ + ahead * V + r_v, mask=r_v < V, other=0.0)
            d_output_ = d_output__next.to(tl.float32)[None, :]
            d_output__next = tl.load(d_output_in_ + ahead * V + r_v, mask=r_v < V, other=0.0)
            d_variance = d_variance_next.to(tl.float32)[None, :]
            d_variance_next = tl.load(d_variance_in + ahead * V + r_v, mask=r_v < V, other=0.0)
            c0____ = tl.exp(g)
            x0__ = 1.0 / (I_p + S_importance)
            sum0__ = tl.sum(_live(d_variance * x0__, m_v, EXACT_V), axis=1)[:, None]
            sum1__ = tl.sum(_live(S * d_output_ * x0__, m_v, EXACT_V), axis=1)[:, None]
            row0____ = q * q
            x1_ = d_output_ * q
            x4_ = x0__ * x0__ * (-1.0 * S * x1_ - d_variance * row0____)
            x5_ = d_S_importance_ + x4_
            sum2_ = tl.sum(_live(b * x5_, m_v, EXACT_V), axis=1)[:, None]
            x2_ = d_S_ + x0__ * x1_
            sum3_ = tl.sum(_live(v * x2_, m_v, EXACT_V), axis=1)[:, None]
            sum4_ = tl.sum(_live(k * x2_, m_k, EXACT_K), axis=0)[None, :]
            sum5_ = tl.sum(_live(S_old_ * x2_ + S_importance_old_ * x5_, m_k, EXACT_K), axis=0)[None, :]
            sum6_ = tl.sum(_live(sum5_, m_v, EXACT_V))
            row1_ = k * k
            sum7_ = tl.sum(_live(row1_ * x5_, m_k, EXACT_K), axis=0)[None, :]
            sum8_ = tl.sum(_live(x4_, m_k, EXACT_K), axis=0)[None, :]
            sum9 = tl.sum(_live(sum8_, m_v, EXACT_V))
            x3_ = c0____ * x2_
            x6_ = c0____ * x5_
            tl.store(d_q_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * q * sum0__ + sum1__).to(d_q_out_.dtype.element_ty), mask=m_k)
            tl.store(d_k_out_ + (i_v.to(tl.int64) * TOTAL + at) * K + o_k, (2.0 * k * sum2_ + sum3_).to(d_k_out_.dtype.element_ty), mask=m_k)
            tl.store(d_v_out_ + at * V + o_v, (sum4_).to(d_v_out_.dtype.element_ty), mask=m_v)
            tl.store(d_g_out_ + (i_v.to(tl.int64) * TOTAL + at), (c0____ * sum6_).to(d_g_out_.dtype.element_ty))
            tl.store(d_b_out_ + at * V + o_v, (sum7_).to(d_b_out_.dtype.element_ty), mask=m_v)
            sum_I_p_ += sum9
            d_S__after = x3_
            d_S_importance__after = x6_
            d_S_ = d_S__after
            d_S_importance_ = d_S_importance__after
            S = S_old_
            S_importance = S_importance_old_
        tl.debug_barrier()
    tl.store(d_I_p_out_ + shared, (sum_I_p_).to(d_I_p_out_.dtype.element_ty))
    tl.store(d_S_initial_ + i_nh * K * V + t_kv, (d_S_).to(d_S_initial_.dtype.element_ty), mask=m_kv)
    tl.store(d_S_importance_initial_ + i_nh * K * V + t_kv, (d_S_importance_).to(d_S_importance_initial_.dtype.element_ty), mask=m_kv)


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


_CORES = {
    ('cpu', 'chunk'): _native_core,
    ('cpu', 'recurrent'): _native_core,
    ('cuda', 'chunk'): _chunk_triton_core,
    ('cuda', 'recurrent'): _recurrent_triton_core,
}


def chunk_meta_mamba2(
    q,
    k,
    v,
    g,
    b,
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
        q: ``[B, T, H, K]``. C
        k: ``[B, T, H, K]``. B
        v: ``[B, T, H, V]``. dt x
        g: ``[B, T, H]``, nonpositive. -dt A, the log retention
        b: ``[B, T, H, V]``, nonnegative. importance gain of this write
        I_p: ``[HV]``, positive. prior precision
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: a tuple: S ``[N, HV, K, V]``, S_importance ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too.
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "chunk", (q, k, v, g, b,), (I_p,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )


def recurrent_meta_mamba2(
    q,
    k,
    v,
    g,
    b,
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
        q: ``[B, T, H, K]``. C
        k: ``[B, T, H, K]``. B
        v: ``[B, T, H, V]``. dt x
        g: ``[B, T, H]``, nonpositive. -dt A, the log retention
        b: ``[B, T, H, V]``, nonnegative. importance gain of this write
        I_p: ``[HV]``, positive. prior precision
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: a tuple: S ``[N, HV, K, V]``, S_importance ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too.
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "recurrent", (q, k, v, g, b,), (I_p,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )


def reference_meta_mamba2(
    q,
    k,
    v,
    g,
    b,
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
        q: ``[B, T, H, K]``. C
        k: ``[B, T, H, K]``. B
        v: ``[B, T, H, V]``. dt x
        g: ``[B, T, H]``, nonpositive. -dt A, the log retention
        b: ``[B, T, H, V]``, nonnegative. importance gain of this write
        I_p: ``[HV]``, positive. prior precision
        scale: factor of the readout, ``K**-0.5`` unless given.
        initial_state: a tuple: S ``[N, HV, K, V]``, S_importance ``[N, HV, K, V]``, float32; the prior unless given.
        output_final_state: return the states after the last token, to carry on from.
        output_variance: return the predictive variance too.
        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.

    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.

    Returns:
        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are
        ``[B, T, HV, V]`` in the dtype of ``q``, final_state is None unless asked for.
    """
    return _call(
        "reference", (q, k, v, g, b,), (I_p,),
        scale, initial_state, output_final_state, output_variance, cu_seqlens,
    )

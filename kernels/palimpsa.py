"""Palimpsa: attention with Bayesian metaplasticity

References: arXiv:2602.09075

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

Generated from the spec 'palimpsa', hash 97a151199cdfebe1, by emitter 1.
Made by a program: change the spec and generate again rather than editing this file.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import numpy
import os
import torch


SPEC = {'name': 'palimpsa',
 'title': 'Palimpsa: attention with Bayesian metaplasticity',
 'references': ['arXiv:2602.09075'],
 'hash': '97a151199cdfebe13cf687f83a7b46a0ef64d612bb1a517b0268b3cf8b257f99',
 'class': 'c',
 'class_name': 'ratio: nonlinear readout of affine states',
 'reason': 'every state is affine, but the readout divides one by another inside the sum over k, and the divisor '
           'varies along both axes: it can fold neither into the query nor into the output',
 'inputs': [{'name': 'q', 'axes': 'k', 'domain': 'real', 'doc': ''},
            {'name': 'k', 'axes': 'k', 'domain': 'real', 'doc': ''},
            {'name': 'v', 'axes': 'v', 'domain': 'real', 'doc': ''},
            {'name': 'b', 'axes': 'v', 'domain': 'nonnegative', 'doc': 'importance gain of this write'},
            {'name': 'g', 'axes': '', 'domain': 'nonpositive', 'doc': 'log retention'}],
 'parameters': [{'name': 'I_p', 'axes': '', 'domain': 'positive', 'doc': 'prior precision', 'init': 1.0}],
 'states': [{'name': 'M', 'axes': 'kv', 'domain': 'real', 'doc': 'mean * precision', 'init': '0'},
            {'name': 'Ibar', 'axes': 'kv', 'domain': 'nonnegative', 'doc': 'precision - I_p', 'init': '0'}],
 'variance': True,
 'read': 'after',
 'forms': {'cpu/chunk': '_native_core', 'cpu/recurrent': '_native_core'},
 'double_backward': ['reference'],
 'layer': {'q': 'l2norm(silu(conv(linear)))',
           'k': 'l2norm(silu(conv(linear)))',
           'v': 'write_gate * silu(conv(linear))',
           'b': 'write_gate * sigmoid(low_rank) * softplus(head_scale)',
           'g': '-softplus(linear + dt_bias) * exp(A_log)'},
 'versions': {'emitter': '1'}}
_OPS = 'dspace_palimpsa_97a15119'  # namespace of this module's PyTorch operators


_NAME = 'palimpsa'
_INPUTS = (('q', 'k'), ('k', 'k'), ('v', 'v'), ('b', 'v'), ('g', ''))
_PARAMETERS = (('I_p', ''),)
_STATES = (('M', 'kv'), ('Ibar', 'kv'))
_HAS_VARIANCE = True


def _initial_states(I_p, sequences, heads, size_k, size_v, dtype, device):
    """States before the first token, ``[N, HV, *axes]``."""
    return (
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # M = 0
        torch.zeros(sequences, heads, size_k, size_v, dtype=dtype, device=device),  # Ibar = 0
    )


def _sizes(*tensors):
    """Number of key and value channels, read from the first tensor that has the axis (1 where none has it)."""
    size_k = size_v = 1
    for tensor, (_, axes) in zip(reversed(tensors), reversed(_INPUTS + _PARAMETERS + _STATES)):
        if "v" in axes:
            size_v = tensor.shape[-1]
        if "k" in axes:
            size_k = tensor.shape[-2 if "v" in axes else -1]
    return size_k, size_v


def _shape_text(axes, *lead):
    return "[" + ", ".join([*lead, *axes.upper()]) + "]"


def _check(inputs, parameters, states):
    """Device, kind and shape of every tensor; returns (B, T, HV, K, V)."""
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
    return batch, steps, heads, known.get("k", ("", 1))[1], known.get("v", ("", 1))[1]


def _offsets(cu_seqlens, batch, steps, device):
    """Checked int64 offsets of packed sequences."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_NAME}: cu_seqlens must be an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{_NAME}: cu_seqlens must have shape [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"{_NAME}: packed sequences (cu_seqlens) need batch size 1, got {batch}")
    if not torch.compiler.is_compiling() and not (
        cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    ):  # the values are only read where reading them costs no graph break
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != steps:
            raise ValueError(f"{_NAME}: cu_seqlens must run from 0 to T = {steps}, got {values[0]} to {values[-1]}")
        if any(a > b for a, b in zip(values[:-1], values[1:])):
            raise ValueError(f"{_NAME}: cu_seqlens must not decrease")
    return cu_seqlens.to(device=device, dtype=torch.int64)


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
    batch, steps, heads, size_k, size_v = _check(inputs, parameters, given)
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
    double = any(t.dtype == torch.float64 for t in inputs)
    work = torch.float64 if double else torch.float32
    with torch.autocast(device.type, enabled=False):  # accumulation stays in float32 under autocast
        inputs = tuple(_expand_heads(t.to(work) if double else t, 2, heads) for t in inputs)
        parameters = tuple(_expand_heads(t.to(work), 0, heads) for t in parameters)
        if given:
            states = tuple(t.to(work) for t in given)
        else:
            states = _initial_states(*parameters, sequences, heads, size_k, size_v, work, device)
        if steps == 0 or batch == 0:
            o = first.new_zeros(batch, steps, heads, size_v)
            variance, final = o, states
        else:
            core = _CORES.get((device.type, form), _reference_core)
            o, variance, *final = core(*inputs, *parameters, *states, scale, offsets, output_variance)
    state = None
    if output_final_state:
        state = final[0] if len(_STATES) == 1 else tuple(final)
    if output_variance:
        return o.to(first.dtype), variance.to(first.dtype), state
    return o.to(first.dtype), state


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
    g_all = g.to(dtype)[..., None, None]
    I_p = I_p[..., None, None]
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
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            b_t = b[token, head]
            g_t = g[token, head]
            o_t = o[token, head]
            c0 = math.exp(g_t)
            for j in range(size_v):
                sum0[j] = zero
            for i in range(size_k):
                Ibar_h_row = Ibar_h[i]
                M_h_row = M_h[i]
                k_i = k_t[i]
                q_i = q_t[i]
                row0 = k_i * k_i
                for j in range(size_v):
                    Ibar_ij = Ibar_h_row[j]
                    M_ij = M_h_row[j]
                    Ibar_new = Ibar_ij * c0 + b_t[j] * row0
                    M_new = M_ij * c0 + k_i * v_t[j]
                    sum0[j] += M_new * q_i * one / (I_p_h + Ibar_new)
                    M_h_row[j] = M_new
                    Ibar_h_row[j] = Ibar_new
            for j in range(size_v):
                o_t[j] = scale * sum0[j]


def _native_backward_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, b, g, I_p, saved_M, saved_Ibar,
    d_output, d_M, d_Ibar, d_q, d_k, d_v, d_b, d_g, d_I_p, M, past_M, Ibar, past_Ibar, sum0, sum1, sum2, sum3,
    sum4, sum5, sum7,
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
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    M[i, j] = saved_M[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_M[0][i, j] = M[i, j]
            for i in range(size_k):
                for j in range(size_v):
                    Ibar[i, j] = saved_Ibar[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_Ibar[0][i, j] = Ibar[i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                M_next = past_M[token - start + 1]
                Ibar_next = past_Ibar[token - start + 1]
                c0 = math.exp(g_t)
                for i in range(size_k):
                    Ibar_row = Ibar[i]
                    M_row = M[i]
                    k_i = k_t[i]
                    row0 = k_i * k_i
                    M_next_row = M_next[i]
                    Ibar_next_row = Ibar_next[i]
                    for j in range(size_v):
                        Ibar_ij = Ibar_row[j]
                        M_ij = M_row[j]
                        M_new = M_ij * c0 + k_i * v_t[j]
                        Ibar_new = Ibar_ij * c0 + b_t[j] * row0
                        M_row[j] = M_new
                        Ibar_row[j] = Ibar_new
                        M_next_row[j] = M_new
                        Ibar_next_row[j] = Ibar_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                M_old = past_M[token - start]
                M_now = past_M[token - start + 1]
                Ibar_old = past_Ibar[token - start]
                Ibar_now = past_Ibar[token - start + 1]
                d_output_t = d_output[token, head]
                d_q_t = d_q[token, head]
                d_k_t = d_k[token, head]
                d_v_t = d_v[token, head]
                d_b_t = d_b[token, head]
                c0_ = math.exp(g_t)
                for j in range(size_v):
                    sum3[j] = zero
                    sum4[j] = zero
                    sum5[j] = zero
                    sum7[j] = zero
                for i in range(size_k):
                    Ibar_old_row = Ibar_old[i]
                    Ibar_now_row = Ibar_now[i]
                    M_old_row = M_old[i]
                    M_now_row = M_now[i]
                    d_Ibar_h_row = d_Ibar_h[i]
                    d_M_h_row = d_M_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0_ = q_i * scale
                    row1 = k_i_ * k_i_
                    sum0_i = zero
                    sum1_i = zero
                    sum2_i = zero
                    for j in range(size_v):
                        Ibar_ij_ = Ibar_old_row[j]
                        Ibar_new_ij = Ibar_now_row[j]
                        M_ij_ = M_old_row[j]
                        M_new_ij = M_now_row[j]
                        d_Ibar_ij = d_Ibar_h_row[j]
                        d_M_ij = d_M_h_row[j]
                        x0 = one / (I_p_h + Ibar_new_ij)
                        x1 = d_output_t[j] * x0
                        x4 = M_new_ij * d_output_t[j] * row0_ * x0 * x0
                        x5 = d_Ibar_ij - x4
                        x2 = d_M_ij + row0_ * x1
                        x3 = c0_ * x2
                        x6 = c0_ * x5
                        sum0_i += M_new_ij * x1
                        sum1_i += b_t[j] * x5
                        sum2_i += v_t[j] * x2
                        sum3[j] += k_i_ * x2
                        sum4[j] += row1 * x5
                        sum5[j] += Ibar_ij_ * x5 + M_ij_ * x2
                        sum7[j] += x4
                        d_M_h_row[j] = x3
                        d_Ibar_h_row[j] = x6
                    sum0[i] = sum0_i
                    sum1[i] = sum1_i
                    sum2[i] = sum2_i
                sum6 = zero
                sum8 = zero
                for j in range(size_v):
                    sum6 += sum5[j]
                    sum8 += sum7[j]
                    d_v_t[j] = sum3[j]
                    d_b_t[j] = sum4[j]
                for i in range(size_k):
                    d_q_t[i] = scale * sum0[i]
                    d_k_t[i] = real(2) * k_t[i] * sum1[i] + sum2[i]
                d_g[token, head] = c0_ * sum6
                d_I_p[sequence, head] += -sum8


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
            q_t = q[token, head]
            k_t = k[token, head]
            v_t = v[token, head]
            b_t = b[token, head]
            g_t = g[token, head]
            o_t = o[token, head]
            variance_t = variance[token, head]
            c0 = math.exp(g_t)
            c1 = scale * scale
            for j in range(size_v):
                sum0[j] = zero
                sum1[j] = zero
            for i in range(size_k):
                Ibar_h_row = Ibar_h[i]
                M_h_row = M_h[i]
                k_i = k_t[i]
                q_i = q_t[i]
                row0 = k_i * k_i
                row1 = q_i * q_i
                for j in range(size_v):
                    Ibar_ij = Ibar_h_row[j]
                    M_ij = M_h_row[j]
                    M_new = M_ij * c0 + k_i * v_t[j]
                    Ibar_new = Ibar_ij * c0 + b_t[j] * row0
                    x0 = one / (I_p_h + Ibar_new)
                    sum0[j] += M_new * q_i * x0
                    sum1[j] += row1 * x0
                    M_h_row[j] = M_new
                    Ibar_h_row[j] = Ibar_new
            for j in range(size_v):
                o_t[j] = scale * sum0[j]
                variance_t[j] = c1 * sum1[j]


def _native_backward_variance_loop(
    first, last, heads, every, size_k, size_v, scale, offsets, q, k, v, b, g, I_p, saved_M, saved_Ibar,
    d_output, d_variance, d_M, d_Ibar, d_q, d_k, d_v, d_b, d_g, d_I_p, M, past_M, Ibar, past_Ibar, sum0, sum1,
    sum2, sum3, sum4, sum5, sum6, sum8,
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
        count = (end - begin + every - 1) // every
        for back in range(count):
            start = begin + (count - 1 - back) * every
            stop = min(start + every, end)
            segment = begin // every + sequence + (count - 1 - back)
            for i in range(size_k):
                for j in range(size_v):
                    M[i, j] = saved_M[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_M[0][i, j] = M[i, j]
            for i in range(size_k):
                for j in range(size_v):
                    Ibar[i, j] = saved_Ibar[segment, head][i, j]
            for i in range(size_k):
                for j in range(size_v):
                    past_Ibar[0][i, j] = Ibar[i, j]
            # The states of this segment once more.
            for token in range(start, stop):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
                M_next = past_M[token - start + 1]
                Ibar_next = past_Ibar[token - start + 1]
                c0 = math.exp(g_t)
                for i in range(size_k):
                    Ibar_row = Ibar[i]
                    M_row = M[i]
                    k_i = k_t[i]
                    row0 = k_i * k_i
                    M_next_row = M_next[i]
                    Ibar_next_row = Ibar_next[i]
                    for j in range(size_v):
                        Ibar_ij = Ibar_row[j]
                        M_ij = M_row[j]
                        M_new = M_ij * c0 + k_i * v_t[j]
                        Ibar_new = Ibar_ij * c0 + b_t[j] * row0
                        M_row[j] = M_new
                        Ibar_row[j] = Ibar_new
                        M_next_row[j] = M_new
                        Ibar_next_row[j] = Ibar_new
            # Cotangents, last token first.
            for token in range(stop - 1, start - 1, -1):
                q_t = q[token, head]
                k_t = k[token, head]
                v_t = v[token, head]
                b_t = b[token, head]
                g_t = g[token, head]
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
                c0_ = math.exp(g_t)
                c1 = scale * scale
                c2 = real(2) * c1
                for j in range(size_v):
                    sum4[j] = zero
                    sum5[j] = zero
                    sum6[j] = zero
                    sum8[j] = zero
                for i in range(size_k):
                    Ibar_old_row = Ibar_old[i]
                    Ibar_now_row = Ibar_now[i]
                    M_old_row = M_old[i]
                    M_now_row = M_now[i]
                    d_Ibar_h_row = d_Ibar_h[i]
                    d_M_h_row = d_M_h[i]
                    k_i_ = k_t[i]
                    q_i = q_t[i]
                    row0_ = q_i * scale
                    row1 = c1 * q_i * q_i
                    row2 = k_i_ * k_i_
                    sum0_i = zero
                    sum1_i = zero
                    sum2_i = zero
                    sum3_i = zero
                    for j in range(size_v):
                        Ibar_ij_ = Ibar_old_row[j]
                        Ibar_new_ij = Ibar_now_row[j]
                        M_ij_ = M_old_row[j]
                        M_new_ij = M_now_row[j]
                        d_Ibar_ij = d_Ibar_h_row[j]
                        d_M_ij = d_M_h_row[j]
                        x0 = one / (I_p_h + Ibar_new_ij)
                        x1 = d_output_t[j] * x0
                        x4 = x0 * x0 * (-M_new_ij * d_output_t[j] * row0_ - d_variance_t[j] * row1)
                        x5 = d_Ibar_ij + x4
                        x2 = d_M_ij + row0_ * x1
                        x3 = c0_ * x2
                        x6 = c0_ * x5
                        sum0_i += M_new_ij * x1
                        sum1_i += d_variance_t[j] * x0
                        sum2_i += b_t[j] * x5
                        sum3_i += v_t[j] * x2
                        sum4[j] += k_i_ * x2
                        sum5[j] += row2 * x5
                        sum6[j] += Ibar_ij_ * x5 + M_ij_ * x2
                        sum8[j] += x4
                        d_M_h_row[j] = x3
                        d_Ibar_h_row[j] = x6
                    sum0[i] = sum0_i
                    sum1[i] = sum1_i
                    sum2[i] = sum2_i
                    sum3[i] = sum3_i
                sum7 = zero
                sum9 = zero
                for j in range(size_v):
                    sum7 += sum6[j]
                    sum9 += sum8[j]
                    d_v_t[j] = sum4[j]
                    d_b_t[j] = sum5[j]
                for i in range(size_k):
                    d_q_t[i] = c2 * q_t[i] * sum1[i] + scale * sum0[i]
                    d_k_t[i] = real(2) * k_t[i] * sum2[i] + sum3[i]
                d_g[token, head] = c0_ * sum7
                d_I_p[sequence, head] += sum9


# Loop, and the shapes of its scratch arrays, by (pass, with variance).
_NATIVE = {
    ('forward', False): (
        _native_forward_loop,
        lambda size_k, size_v, every: [(size_v,)],
    ),
    ('backward', False): (
        _native_backward_loop,
        lambda size_k, size_v, every: [(size_k, size_v,), (every + 1, size_k, size_v,), (size_k, size_v,), (every + 1, size_k, size_v,), (size_k,), (size_k,), (size_k,), (size_v,), (size_v,), (size_v,), (size_v,)],
    ),
    ('forward', True): (
        _native_forward_variance_loop,
        lambda size_k, size_v, every: [(size_v,), (size_v,)],
    ),
    ('backward', True): (
        _native_backward_variance_loop,
        lambda size_k, size_v, every: [(size_k, size_v,), (every + 1, size_k, size_v,), (size_k, size_v,), (every + 1, size_k, size_v,), (size_k,), (size_k,), (size_k,), (size_k,), (size_v,), (size_v,), (size_v,), (size_v,)],
    ),
}


@functools.cache
def _native(loop):
    """``loop`` compiled by numba at its first call, and kept beside this file for the next process."""
    import numba
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
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # nowhere to keep the compiled code
        return numba.njit(**options)(loop)


@functools.cache
def _native_pool(process, threads):
    """Worker threads of this process (a fork has none of its parent's, hence the process in the key)."""
    return concurrent.futures.ThreadPoolExecutor(threads, "native")


def _native_run(loop, shapes, tasks, heads, every, sizes, scale, offsets, tensors):
    """Run ``loop`` over all tasks, on as many threads as PyTorch may use; every task writes its own rows only.

    Plain threads rather than numba's own: they survive a fork, and calls from several threads at once.
    """
    loop = _native(loop)
    arrays = [t.detach().numpy() for t in tensors]
    threads = max(1, min(torch.get_num_threads(), tasks))
    shares = threads if threads == 1 else min(tasks, 4 * threads)
    turn = itertools.count()  # whoever is free takes the next share

    def work():
        scratch = [numpy.empty(shape, arrays[0].dtype) for shape in shapes(*sizes, every)]
        while (i := next(turn)) < shares:
            first, last = tasks * i // shares, tasks * (i + 1) // shares
            loop(first, last, heads, every, *sizes, scale, offsets, *arrays, *scratch)

    others = [_native_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        if not other.cancel():  # not even started: all is done
            other.result()


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
    readouts = [torch.empty(batch * steps, heads, sizes[1], dtype=dtype) for _ in range(2 if want_variance else 1)]
    states = [s.to(dtype, copy=True, memory_format=torch.contiguous_format) for s in states]
    saved = [torch.empty(segments, heads, *s.shape[2:], dtype=dtype) for s in states]
    loop, shapes = _NATIVE["forward", want_variance]
    tensors = [*_native_flat(inputs, dtype), *(p.to(dtype).contiguous() for p in parameters), *states, *readouts, *saved]
    bounds = _native_offsets(offsets, batch, steps)
    _native_run(loop, shapes, sequences * heads, heads, every, sizes, scale, bounds, tensors)
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
    d_parameters = [torch.zeros(sequences, *p.shape, dtype=dtype) for p in parameters]
    loop, shapes = _NATIVE["backward", want_variance]
    tensors = [*flat, *(p.to(dtype).contiguous() for p in parameters), *saved, *given, *d_states]
    tensors += [*d_inputs, *d_parameters]
    bounds = _native_offsets(offsets, batch, steps)
    _native_run(loop, shapes, sequences * heads, heads, every, sizes, scale, bounds, tensors)
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


_native_forward_op.register_autograd(_native_gradient, setup_context=_native_save)


def _native_core(*args):
    """The sequential plan in compiled loops; the backward pass restarts from states saved every few tokens."""
    *tensors, scale, offsets, want_variance = args
    every = 0
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        every = 16 if tensors[0].shape[1] <= 1024 else 64
    o, variance, *rest = _native_forward_op(*tensors, offsets, scale, every, want_variance)
    return (o, variance if want_variance else None, *rest[: len(_STATES)])


_CORES = {
    ('cpu', 'chunk'): _native_core,
    ('cpu', 'recurrent'): _native_core,
}


def chunk_palimpsa(
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
        g: ``[B, T, H]``, nonpositive. log retention
        I_p: ``[HV]``, positive. prior precision
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


def recurrent_palimpsa(
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
        g: ``[B, T, H]``, nonpositive. log retention
        I_p: ``[HV]``, positive. prior precision
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


def reference_palimpsa(
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
        g: ``[B, T, H]``, nonpositive. log retention
        I_p: ``[HV]``, positive. prior precision
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

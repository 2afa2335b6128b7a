"""A hand-made operator in plain PyTorch with the signature of a generated module, so that layers are tested alone."""

from __future__ import annotations

import torch

from dspace.nn.operator import Operator, ParameterInfo
from dspace.nn.recipe import Declared

LAYER = {
    "q": "l2norm(silu(conv(linear)))",
    "k": "l2norm(silu(conv(linear)))",
    "v": "write_gate * silu(conv(linear))",
    "b": "write_gate * sigmoid(low_rank) * softplus(head_scale)",
    "g": "-softplus(linear + dt_bias) * exp(A_log)",
}


def metaplastic(q, k, v, b, g, I_p, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """M = e^g M + k v, I = e^g I + k^2 b, o = scale * q . (M / (I + I_p)), token by token."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        outs, finals = [], []
        for n, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            start = None if initial_state is None else tuple(s[n : n + 1] for s in initial_state)
            parts = (x[:, begin:end] for x in (q, k, v, b, g))
            o, final = metaplastic(*parts, I_p, scale=scale, initial_state=start, output_final_state=True)
            outs.append(o)
            finals.append(final)
        final = tuple(torch.cat(s) for s in zip(*finals, strict=True)) if output_final_state else None
        return torch.cat(outs, 1), final
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size = (q.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
    m, i = initial_state if initial_state is not None else (q.new_zeros(size), q.new_zeros(size))
    outs = []
    for t in range(q.shape[1]):
        keep = g[:, t].exp()[..., None, None]
        key = k[:, t, :, :, None]
        m = keep * m + key * v[:, t, :, None, :]
        i = keep * i + key**2 * b[:, t, :, None, :]
        outs.append(scale * (q[:, t, :, :, None] * m / (i + I_p[:, None, None])).sum(-2))
    o = torch.stack(outs, 1) if outs else v
    return o, (m, i) if output_final_state else None


STUB = Operator(
    name="stub",
    chunk=metaplastic,
    recurrent=metaplastic,
    inputs=(
        Declared("q", "k"),
        Declared("k", "k"),
        Declared("v", "v"),
        Declared("b", "v", "nonnegative"),
        Declared("g", "", "nonpositive"),
    ),
    parameters=(ParameterInfo("I_p", "", "positive", 1.0),),
    state_axes=("kv", "kv"),
    layer=LAYER,
)

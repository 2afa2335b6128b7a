"""Softmax attention with the interface of a Mixer: the ceiling that recurrent memories are measured against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.nn.functions import causal_conv, packed_conv
from dspace.nn.layer import MixerState


class SoftmaxAttention(nn.Module):
    """Causal multi-head attention over ``[B, T, hidden_size]``, with the short convolution of the other mixers.

    Positions are seen through the convolution only, as in the recurrent layers. The state is the cache of keys
    and values, which grows with the sequence.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        *,
        conv_size: int = 4,
    ) -> None:
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise UserError(
                f"SoftmaxAttention: hidden_size = {hidden_size} does not divide into num_heads = {num_heads}\n"
                "  cure: choose num_heads that divides it, or give head_dim"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.head_v_dim = int(self.head_dim * expand_v)
        self.widths = [num_heads * d for d in (self.head_dim, self.head_dim, self.head_v_dim)]
        self.project = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.taps = nn.Parameter(torch.empty(conv_size, sum(self.widths)).uniform_(-0.5, 0.5))
        self.output = nn.Linear(self.widths[-1], hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        output_final_state: bool = False,
        recurrent: bool = False,
    ) -> Any:
        """As :meth:`Mixer.forward`. A state and ``cu_seqlens`` do not go together."""
        if state is not None and cu_seqlens is not None:
            raise UserError("SoftmaxAttention: packed sequences start from nothing\n  cure: state=None")
        mixed = self.project(x)
        if cu_seqlens is None:
            mixed, tail = causal_conv(mixed, self.taps, None if state is None else state.conv[0])
        else:
            mixed, tail = packed_conv(mixed, self.taps, cu_seqlens)
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in mixed.split(self.widths, -1))
        if state is not None:
            k, v = torch.cat([state.op[0], k], 2), torch.cat([state.op[1], v], 2)
        o = F.scaled_dot_product_attention(q, k, v, **self._mask(x.shape[1], k.shape[2], cu_seqlens, x.device))
        y = self.output(o.transpose(1, 2).flatten(2))
        return (y, MixerState((tail,), (k, v))) if output_final_state else y

    @staticmethod
    def _mask(queries: int, keys: int, offsets: Tensor | None, device: torch.device) -> dict[str, Any]:
        if offsets is None and queries == keys:
            return {"is_causal": True}
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        if offsets is not None:
            owner = torch.bucketize(torch.arange(queries, device=device), offsets.to(device)[1:], right=True)
            mask &= owner[:, None] == owner[None, :]
        return {"attn_mask": mask}

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """Decode one token ``[B, hidden_size]`` or several ``[B, T, hidden_size]``."""
        y, state = self(x if x.ndim == 3 else x[:, None], state, output_final_state=True)
        return (y if x.ndim == 3 else y[:, 0]), state

    def state_size(self, sequence_length: int | None = None) -> int:
        """Numbers in the cache after ``sequence_length`` tokens."""
        return (sequence_length or 0) * self.num_heads * (self.head_dim + self.head_v_dim)

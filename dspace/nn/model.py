"""A small pre-norm language model around any mixer, after the one of Zoology (``zoology/model.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.nn.attention import SoftmaxAttention
from dspace.nn.functions import by_own
from dspace.nn.layer import Mixer, MixerState
from dspace.nn.loss import fused, logit_losses, tied_rows

MixerFactory = Callable[[int], nn.Module]
"""Makes the mixer of layer ``i``; it takes ``[B, T, hidden]`` and the keyword arguments of :meth:`Mixer.forward`."""


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` unless the state mixer is the identity."""

    def __init__(self, mixer: nn.Module, hidden_size: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.mlp_norm = self.mlp = None
        if mlp_ratio:
            inner = int(hidden_size * mlp_ratio)
            self.mlp_norm = nn.LayerNorm(hidden_size)
            self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))

    def forward(self, x: Tensor, state: Any = None, **options: Any) -> Any:
        mixed = self.mixer(self.mixer_norm(x), state, **options)
        final = None
        if options.get("output_final_state"):
            mixed, final = mixed
        x = x + (self.dropout(mixed) if self.dropout is not None else mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return (x, final) if options.get("output_final_state") else x


class TiedEmbedding(nn.Embedding):
    """The weights of which make logits too."""

    narrow: Tensor | None = None
    """The weights in autocast's dtype, where an optimizer keeps them so."""

    def rows(self, tokens: Tensor) -> Tensor:
        """Where the entry of each token is in the weights."""
        return tokens


class Model(nn.Module):
    """Tokens to logits over ``vocab_size`` through ``num_layers`` mixers.

    ``mixer``: the name or path of a spec, a Spec, a compiled module, ``"softmax"``, or a function of the layer
    index that returns a mixer. Further keyword arguments go to :class:`~dspace.nn.layer.Mixer` (or to
    :class:`~dspace.nn.attention.SoftmaxAttention`). The embedding is drawn from N(0, 0.02) and tied with the
    head; projections are drawn from N(0, ``init_std``), output projections from that over ``sqrt(2 *
    num_layers)``; ``init_std = None`` keeps PyTorch's scale of ``1 / sqrt(fan in)``.
    ``max_positions`` > 0 adds learned absolute positions. ``mlp_ratio = 0`` is the identity state mixer.
    ``seed`` fixes every random number of the construction and leaves the global generator alone.
    """

    def __init__(
        self,
        mixer: Any,
        *,
        vocab_size: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        mlp_ratio: float = 0.0,
        max_positions: int = 0,
        dropout: float = 0.0,
        embed_dropout: float = 0.0,
        init_std: float | None = None,
        seed: int = 0,
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        if min(vocab_size, hidden_size, num_layers, num_heads) < 1:
            raise UserError("Model: vocab_size, hidden_size, num_layers and num_heads must be at least 1")
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.trials = 1
        """Trials stacked in one batch, see :mod:`dspace.nn.stacked`."""
        make = _factory(mixer, hidden_size, num_heads, mixer_options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = TiedEmbedding(vocab_size, hidden_size)
            self.positions = nn.Embedding(max_positions, hidden_size) if max_positions else None
            self.embed_dropout = nn.Dropout(embed_dropout) if embed_dropout else None
            self.blocks = nn.ModuleList(Block(make(i), hidden_size, mlp_ratio, dropout) for i in range(num_layers))
            self.norm = nn.LayerNorm(hidden_size)
            self._initialise(init_std, num_layers)

    def _initialise(self, std: float | None, num_layers: int) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for module in block.modules():
                if isinstance(module, nn.Linear) and std is not None:
                    nn.init.normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            last = [getattr(block.mixer, "output", None), block.mlp[-1] if block.mlp is not None else None]
            for linear in last:
                if isinstance(linear, nn.Linear):
                    with torch.no_grad():
                        linear.weight.div_(math.sqrt(2 * num_layers))

    def hidden(
        self, tokens: Tensor, state: list[Any] | None = None, cu_seqlens: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, list[Any]]:
        """Normalised hidden states ``[B, T, hidden_size]`` and the layers' final states (None unless asked for)."""
        return self._mixed(self.embedding(tokens), tokens, state, cu_seqlens, **options)

    def _mixed(
        self, x: Tensor, tokens: Tensor, state: list[Any] | None, cu_seqlens: Tensor | None, **options: Any
    ) -> tuple[Tensor, list[Any]]:
        if self.positions is not None:
            if state is not None:
                raise UserError("Model: absolute positions and a carried state do not go together")
            x = x + self.positions(_places(tokens, cu_seqlens))
        if self.embed_dropout is not None:
            x = self.embed_dropout(x)
        finals = []
        for i, block in enumerate(self.blocks):
            x = block(x, None if state is None else state[i], cu_seqlens=cu_seqlens, **options)
            final = None
            if options.get("output_final_state"):
                x, final = x
            finals.append(final)
        return self.norm(x), finals

    def forward(self, tokens: Tensor, positions: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocab_size]``, or ``[B, D, vocab_size]`` at ``positions`` ``[B, D]`` only."""
        x, _ = self.hidden(tokens, cu_seqlens=cu_seqlens)
        if positions is not None:
            x = _at(x, positions)
        if self.trials > 1:  # each trial's rows by its own embedding
            own = by_own(x.reshape(self.trials, -1, x.shape[-1]), self.embedding.weight)
            return own.view(*x.shape[:-1], self.vocab_size)
        return F.linear(x, self.embedding.weight)

    def losses(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies, float32 ``[S, rows]``, of ``targets`` ``[B, D]`` (int64) at ``positions``, trial by trial."""
        weight, targets = self.embedding.weight, targets.view(self.trials, -1)
        if not fused(weight):
            logits = self(tokens, positions).float().flatten(0, -2)
            return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
        x, weight = tied_rows(weight, self.embedding.rows(tokens))
        x = _at(self._mixed(x, tokens, None, None)[0], positions)
        weight = weight.view(self.trials, -1, weight.shape[-1])
        return logit_losses(x.reshape(self.trials, -1, x.shape[-1]), weight, targets, self.embedding.narrow)

    def step(self, tokens: Tensor, state: list[MixerState] | None = None) -> tuple[Tensor, list[MixerState]]:
        """Decode ``tokens`` ``[B]`` or ``[B, T]`` after ``state``: logits of each, and the state for the next."""
        shaped = tokens if tokens.ndim == 2 else tokens[:, None]
        x, finals = self.hidden(shaped, state, output_final_state=True, recurrent=True)
        logits = F.linear(x, self.embedding.weight)
        return (logits if tokens.ndim == 2 else logits[:, 0]), finals

    def state_size(self, sequence_length: int = 0) -> int:
        """Bytes (float32) that all mixers carry per sequence after ``sequence_length`` tokens."""
        return 4 * sum(block.mixer.state_size(sequence_length) for block in self.blocks)  # type: ignore[operator, union-attr]

    def num_parameters(self) -> int:
        """Learned numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _at(x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(1, positions.long()[..., None].expand(-1, -1, x.shape[-1]))


def _factory(mixer: Any, hidden_size: int, num_heads: int, options: dict[str, Any]) -> MixerFactory:
    if mixer == "softmax":
        return lambda layer: SoftmaxAttention(hidden_size, num_heads, **options)
    if callable(mixer) and not hasattr(mixer, "SPEC"):
        if options:
            raise UserError(f"Model: {', '.join(options)} are for the mixer, which a function makes here")
        return mixer
    from dspace.nn.operator import as_operator

    operator = as_operator(mixer)
    return lambda layer: Mixer(operator, hidden_size, num_heads, **options)


def _places(tokens: Tensor, offsets: Tensor | None) -> Tensor:
    place = torch.arange(tokens.shape[1], device=tokens.device)
    if offsets is None:
        return place
    starts = offsets.to(tokens.device)
    return place - starts[torch.bucketize(place, starts[1:], right=True)]

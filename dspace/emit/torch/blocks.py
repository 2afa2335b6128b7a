"""Building blocks of the chunkwise PyTorch form, emitted as they stand into generated modules.

They are ordinary differentiable PyTorch, so that gradients and double gradients come from autograd. Shapes:
``N`` sequences, ``H`` heads, ``NT`` chunks of ``C`` tokens, key channels ``K``, value channels ``V``. Padding
tokens carry a log decay of 0 and write nothing, so that they leave every state as it is.

Only sums of log decays (never positive) are exponentiated, and none of them is a difference of two larger
sums where the decay is one number per token: a gate of ``-inf`` is a clean reset (THEORY.md 3a, hazards).
"""

from __future__ import annotations

import torch

_LOG_DECAY_FLOOR = -30.0  # exp(-30) = 9e-14: nothing is left of the past, and sums over a chunk stay exact


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


def _vector_state(
    write: torch.Tensor, g: torch.Tensor, start: torch.Tensor, exclusive: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """All values ``[N, H, NT, C, X]`` of a state that is one number per channel, and its final value ``[N, H, X]``.

    ``write [N, H, NT, C, X]``; ``g`` is ``[N, H, NT, C]``, or ``[N, H, NT, C, X]`` per channel; ``start [N, H, X]``.
    """
    if g.dim() == write.dim():
        within, since, until, total = _channel_decays(g, exclusive)
        inside = (within * write[..., None, :, :]).sum(-2)
        local = (until * write).sum(-2)
    else:
        within, since, until, total = _decays(g, exclusive)
        since, total = since[..., None], total[..., None]
        inside = within @ write
        local = (until[..., None] * write).sum(-2)
    starts, final = _carry(local, total, start)
    return inside + since * starts[..., None, :], final


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

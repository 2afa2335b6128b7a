"""MQAR drawn on a GPU: the semantics of :mod:`dspace.tasks.mqar`, the random numbers of PyTorch's generator there.

The examples are as reproducible as those of NumPy (by seed, on the same kind of device), and are not the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspace.tasks.base import Batch, Seed, asked_once
from dspace.tasks.rules import check_mqar
from dspace.tasks.sampling import power_law

CELLS = 1 << 27
"""Most random numbers held at once: half a gigabyte."""


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """What training needs of ``N`` examples, on the device: int32 tokens ``[N, L]``, positions and targets ``[N, D]``."""

    task: str
    vocab_size: int
    inputs: Tensor
    positions: Tensor
    targets: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def to_batch(self) -> Batch:
        """The same examples as a batch of NumPy arrays, with ages and order, for metrics."""
        inputs, positions, targets = (t.cpu().numpy() for t in (self.inputs, self.positions, self.targets))
        places = 2 * np.arange(positions.shape[1], dtype=np.int32)
        return asked_once(self.task, self.vocab_size, self.settings, inputs, positions, targets, places)

    @property
    def hash(self) -> str:
        """As :attr:`Batch.hash`."""
        return self.to_batch().hash


def mqar_on_device(
    vocab_size: int,
    num_examples: int,
    input_seq_len: int,
    num_kv_pairs: int,
    power_a: float,
    random_non_queries: bool,
    seed: Seed,
    device: str | torch.device,
) -> DeviceBatch:
    """As :func:`dspace.tasks.mqar.mqar`, drawn on ``device``. Raises UserError for impossible sizes."""
    check_mqar(vocab_size, input_seq_len, num_kv_pairs, power_a, random_non_queries)
    generator = torch.Generator(device).manual_seed(_seed(seed))
    rows, pairs, half = num_examples, num_kv_pairs, vocab_size // 2
    keys = distinct(generator, rows, pairs, half - 1) + 1
    values = distinct(generator, rows, pairs, vocab_size - half) + half
    slots = (input_seq_len - 2 * pairs) // 2
    rates = torch.from_numpy(power_law(slots, power_a)).float().to(generator.device)
    positions = 2 * pairs + 2 * distinct(generator, rows, pairs, slots, rates)
    shape = (rows, input_seq_len)
    if random_non_queries:
        inputs = torch.randint(vocab_size, shape, generator=generator, device=generator.device, dtype=torch.int32)
    else:
        inputs = torch.zeros(shape, dtype=torch.int32, device=generator.device)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    inputs.scatter_(1, positions, keys.int())
    settings = {"num_examples": rows, "seed": seed, "device": str(device), "input_seq_len": input_seq_len}
    return DeviceBatch("mqar", vocab_size, inputs, positions.int(), values.int(), settings)


def distinct(generator: torch.Generator, rows: int, size: int, population: int, rates: Tensor | None = None) -> Tensor:
    """``size`` distinct integers of ``0..population-1`` per row in order of drawing, int64 ``[rows, size]``.

    Exponential clocks ring in the order of successive draws with probability proportional to ``rates`` (equal ones
    when None), so the first ``size`` bells of a row are its draw.
    """
    drawn = []
    block = max(1, CELLS // population)
    for start in range(0, rows, block):
        clocks = torch.empty(min(block, rows - start), population, device=generator.device)
        clocks.exponential_(generator=generator)
        if rates is not None:
            clocks /= rates
        drawn.append(clocks.topk(size, dim=1, largest=False, sorted=True).indices)
    return torch.cat(drawn) if drawn else torch.empty(0, size, dtype=torch.long, device=generator.device)


def _seed(seed: Seed) -> int:
    return int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:7], "big")

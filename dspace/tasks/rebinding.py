"""Recall where some keys are bound a second time: the latest value counts.

The probe of plasticity beside stability: a memory that cannot overwrite answers with the stale value, one
that overwrites too freely loses the old bindings. Placement ``end`` is that of Zoology's forgetting task
(all pairs, then the updates), ``mixed`` shuffles first and second bindings so that age and re-binding do not
go together.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dspace.tasks.base import Batch, Ints, Seed, Task, require, require_integers
from dspace.tasks.mqar import place_queries
from dspace.tasks.rules import common_rules
from dspace.tasks.sampling import distinct

Placement = Literal["end", "mixed"]


def check_rebinding_mqar(
    vocab_size: int,
    input_seq_len: int,
    num_kv_pairs: int,
    num_updates: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    placement: Placement = "end",
) -> None:
    """Raise a UserError that names each rule that these sizes break."""
    name = "rebinding_mqar"
    require_integers(
        name,
        vocab_size=vocab_size,
        input_seq_len=input_seq_len,
        num_kv_pairs=num_kv_pairs,
        num_updates=num_updates,
    )
    need = 2 * (num_kv_pairs + num_updates) + 2 * num_kv_pairs
    require(
        [
            *common_rules(vocab_size, input_seq_len, num_kv_pairs, power_a),
            (num_updates >= 0, f"num_updates = {num_updates} must not be negative", "0 gives plain mqar"),
            (
                num_updates <= num_kv_pairs,
                f"num_updates = {num_updates} must be at most num_kv_pairs = {num_kv_pairs}: a key is re-bound once",
                f"num_updates <= {num_kv_pairs}",
            ),
            (
                need <= input_seq_len,
                f"2 * (num_kv_pairs + num_updates) + 2 * num_kv_pairs = {need} must be at most "
                f"input_seq_len = {input_seq_len}",
                f"input_seq_len >= {need}, or fewer pairs or updates",
            ),
            (
                vocab_size - vocab_size // 2 >= 2,
                f"vocab_size = {vocab_size} has no second value to re-bind to",
                "a vocabulary of at least 4",
            ),
            (placement in ("end", "mixed"), f"placement = {placement!r} is unknown", "'end' or 'mixed'"),
        ],
        name,
    )


def rebinding_mqar(
    vocab_size: int = 8192,
    num_examples: int = 1000,
    input_seq_len: int = 64,
    num_kv_pairs: int = 8,
    num_updates: int = 4,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    placement: Placement = "end",
    seed: Seed = 0,
) -> Batch:
    """Make sequences of ``D`` pairs and ``U`` re-bindings, then one query per key for its latest value.

    The re-bound keys are drawn at random without replacement; a new value is uniform over the values other
    than the key's first one. Queries, fillers and ``seed`` as in :func:`dspace.tasks.mqar.mqar`.
    """
    check_rebinding_mqar(vocab_size, input_seq_len, num_kv_pairs, num_updates, power_a, random_non_queries, placement)
    require_integers("rebinding_mqar", num_examples=num_examples)
    rng = np.random.default_rng(seed)
    rows, pairs = num_examples, num_kv_pairs
    num_values = vocab_size - vocab_size // 2
    keys = distinct(rng, rows, pairs, vocab_size // 2 - 1) + 1
    first = distinct(rng, rows, pairs, num_values)
    chosen = distinct(rng, rows, num_updates, pairs)
    old = np.take_along_axis(first, chosen, axis=1)
    new = rng.integers(0, num_values - 1, size=chosen.shape, dtype=np.int32)
    new += new >= old

    owner = np.concatenate([np.broadcast_to(np.arange(pairs, dtype=np.int32), keys.shape), chosen], axis=1)
    if placement == "mixed":
        owner = np.take_along_axis(owner, np.argsort(rng.random(owner.shape, dtype=np.float32), axis=1), axis=1)
    begins, lives = _occurrences(owner, pairs)
    final = first.copy()
    np.put_along_axis(final, chosen, new, axis=1)
    slot_values = np.take_along_axis(final, owner, axis=1)
    np.put_along_axis(slot_values, begins, first, axis=1)
    # Columns follow the order in which the keys are first bound.
    column = np.argsort(begins, axis=1)
    bound, live, query, old_value, value = (
        np.take_along_axis(a, column, 1) for a in (begins, lives, keys, first, final)
    )

    offset = vocab_size // 2
    context = np.empty((rows, 2 * (pairs + num_updates)), dtype=np.int32)
    context[:, 0::2] = np.take_along_axis(keys, owner, axis=1)
    context[:, 1::2] = slot_values + offset
    inputs, positions = place_queries(rng, context, query, input_seq_len, power_a, random_non_queries, vocab_size)
    rebound = live > bound
    return Batch(
        task="rebinding_mqar",
        vocab_size=vocab_size,
        settings={
            "vocab_size": vocab_size,
            "num_examples": num_examples,
            "input_seq_len": input_seq_len,
            "num_kv_pairs": num_kv_pairs,
            "num_updates": num_updates,
            "power_a": power_a,
            "random_non_queries": random_non_queries,
            "placement": placement,
            "seed": seed,
        },
        inputs=inputs,
        positions=positions,
        targets=(value + offset).astype(np.int32),
        ages=(positions - 2 * live).astype(np.int32),
        order=np.argsort(np.argsort(live, axis=1), axis=1).astype(np.int32),
        rebound=rebound,
        stale=np.where(rebound, old_value + offset, -1).astype(np.int32),
    )


def _occurrences(owner: Ints, pairs: int) -> tuple[Ints, Ints]:
    """First and last slot of each key ``[N, D]`` in ``owner`` ``[N, slots]``, the key index of every slot."""
    rows, slots = owner.shape
    first = np.full((rows, pairs), slots, dtype=np.int32)
    last = np.full((rows, pairs), -1, dtype=np.int32)
    lanes = np.arange(rows)
    for slot in range(slots):
        key = owner[:, slot]
        first[lanes, key] = np.minimum(first[lanes, key], slot)
        last[lanes, key] = slot
    return first, last


REBINDING_MQAR = Task(
    name="rebinding_mqar",
    make=rebinding_mqar,
    check=check_rebinding_mqar,
    sizes={
        "vocab_size": 8192,
        "input_seq_len": 64,
        "num_kv_pairs": 8,
        "num_updates": 4,
        "power_a": 0.01,
        "random_non_queries": True,
        "placement": "end",
    },
    doc="recall the latest value of each key when some keys are bound twice",
    tags=("accuracy", "stability", "plasticity"),
)

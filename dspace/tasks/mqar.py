"""Multi-query associative recall (MQAR), the task of the Zoology benchmark.

A sequence shows ``D`` key-value pairs and later asks for the value of each key once, at gaps that follow a
power law. The answer is expected at the query token itself and is never written into the sequence.
Semantics as in ``zoology/data/multiquery_ar.py`` (arXiv:2312.04927), with one difference: every random
number, the fillers included, comes from ``seed``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dspace.tasks.base import Batch, Ints, Seed, Task, asked_once, require_integers
from dspace.tasks.rules import check_mqar
from dspace.tasks.sampling import distinct, power_law, weighted_distinct


def mqar(
    vocab_size: int = 8192,
    num_examples: int = 1000,
    input_seq_len: int = 64,
    num_kv_pairs: int = 8,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    seed: Seed = 0,
) -> Batch:
    """Make ``num_examples`` sequences ``k1 v1 .. kD vD`` followed by the queries.

    Keys are drawn from ``1 .. vocab_size//2 - 1``, values from ``vocab_size//2 .. vocab_size - 1``, each
    without replacement and independently. The query for key ``i`` stands at ``2 D + 2 gap_i``, where the gaps
    are distinct slots of ``0 .. (L - 2 D)/2 - 1`` drawn one after the other with probability proportional to
    ``power_a * (slot + 1)**(power_a - 1)``. With ``random_non_queries`` each remaining position holds a token
    of the whole vocabulary (which may happen to be a key of the context), else 0.

    ``seed`` is an integer or a sequence of them. Raises UserError for impossible sizes.
    """
    check_mqar(vocab_size, input_seq_len, num_kv_pairs, power_a)
    require_integers("mqar", num_examples=num_examples)
    rng = np.random.default_rng(seed)
    pairs = num_kv_pairs
    keys = distinct(rng, num_examples, pairs, vocab_size // 2 - 1) + 1
    values = distinct(rng, num_examples, pairs, vocab_size - vocab_size // 2) + vocab_size // 2
    context = np.empty((num_examples, 2 * pairs), dtype=np.int32)
    context[:, 0::2], context[:, 1::2] = keys, values
    inputs, positions = place_queries(rng, context, keys, input_seq_len, power_a, random_non_queries, vocab_size)
    settings = {
        "vocab_size": vocab_size,
        "num_examples": num_examples,
        "input_seq_len": input_seq_len,
        "num_kv_pairs": num_kv_pairs,
        "power_a": power_a,
        "random_non_queries": random_non_queries,
        "seed": seed,
    }
    places = 2 * np.arange(pairs, dtype=np.int32)
    return asked_once("mqar", vocab_size, settings, inputs, positions, values, places)


def place_queries(
    rng: np.random.Generator,
    context: Ints,
    keys: Ints,
    input_seq_len: int,
    power_a: float,
    random_non_queries: bool,
    vocab_size: int,
) -> tuple[Ints, Ints]:
    """Append the query section to ``context`` ``[N, C]``: tokens ``[N, L]`` and positions of the keys' queries."""
    rows, used = context.shape
    slots = (input_seq_len - used) // 2
    gaps = weighted_distinct(rng, rows, keys.shape[1], power_law(slots, power_a))
    positions = used + 2 * gaps
    inputs = np.zeros((rows, input_seq_len), dtype=np.int32)
    if random_non_queries:
        inputs[:, used:] = rng.integers(0, vocab_size, size=(rows, input_seq_len - used), dtype=np.int32)
    inputs[:, :used] = context
    np.put_along_axis(inputs, positions, keys, axis=1)
    return inputs, positions


def _on_device(**settings: Any) -> Any:
    from dspace.tasks.device import mqar_on_device  # PyTorch loads only where it is used

    return mqar_on_device(**settings)


MQAR = Task(
    name="mqar",
    make=mqar,
    on_device=_on_device,
    check=check_mqar,
    sizes={
        "vocab_size": 8192,
        "input_seq_len": 64,
        "num_kv_pairs": 8,
        "power_a": 0.01,
        "random_non_queries": True,
    },
    doc="recall the value of each of D keys shown earlier",
    tags=("accuracy", "stability"),
)

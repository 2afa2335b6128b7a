"""Recall with noise between the pairs: most tokens of the context mean nothing and must not be written.

After the noisy in-context recall of MAD (arXiv:2403.17844), in the mould of MQAR: pairs and single noise tokens in random
order, then a query for every key. Noise has an alphabet of its own, at the end of the vocabulary.
"""

from __future__ import annotations

import numpy as np

from dspace.tasks.base import Batch, Seed, Task, asked_once, require, require_integers
from dspace.tasks.mqar import place_queries
from dspace.tasks.rules import positive_power, some_pairs
from dspace.tasks.sampling import distinct

NAME = "noisy_recall"


def check_noisy_recall(
    vocab_size: int, input_seq_len: int, num_kv_pairs: int, num_noise: int, noise_vocab: int, power_a: float = 0.01
) -> None:
    """Raise a UserError that names each rule that these sizes break."""
    require_integers(
        NAME,
        vocab_size=vocab_size,
        input_seq_len=input_seq_len,
        num_kv_pairs=num_kv_pairs,
        num_noise=num_noise,
        noise_vocab=noise_vocab,
    )
    need = 4 * num_kv_pairs + num_noise
    values = vocab_size - noise_vocab - vocab_size // 2
    require(
        [
            some_pairs(num_kv_pairs),
            (num_noise >= 0, f"num_noise = {num_noise} must not be negative", "0 gives plain recall"),
            (noise_vocab >= 1, f"noise_vocab = {noise_vocab} must be at least 1", "16 as in MAD"),
            (
                need <= input_seq_len,
                f"4 * num_kv_pairs + num_noise = {need} must be at most input_seq_len = {input_seq_len}",
                f"input_seq_len >= {need}, or less noise",
            ),
            (
                min(vocab_size // 2 - 1, values) >= num_kv_pairs,
                f"vocab_size = {vocab_size} has {vocab_size // 2 - 1} keys and {values} values for {num_kv_pairs} distinct ones",
                f"vocab_size >= {2 * (num_kv_pairs + noise_vocab + 1)}",
            ),
            positive_power(power_a),
        ],
        NAME,
    )


def noisy_recall(
    vocab_size: int = 128,
    num_examples: int = 1000,
    input_seq_len: int = 128,
    num_kv_pairs: int = 8,
    num_noise: int = 32,
    noise_vocab: int = 16,
    power_a: float = 0.01,
    seed: Seed = 0,
) -> Batch:
    """Make sequences of ``D`` pairs among ``num_noise`` noise tokens, then a query for each key; the rest is 0.

    Keys from ``1 .. vocab_size//2 - 1``, values from ``vocab_size//2 .. vocab_size - noise_vocab - 1``, noise from the
    last ``noise_vocab`` tokens. Questions and ``seed`` as in :func:`dspace.tasks.mqar.mqar`.
    """
    check_noisy_recall(vocab_size, input_seq_len, num_kv_pairs, num_noise, noise_vocab, power_a)
    require_integers(NAME, num_examples=num_examples)
    rng = np.random.default_rng(seed)
    rows, pairs, half = num_examples, num_kv_pairs, vocab_size // 2
    keys = distinct(rng, rows, pairs, half - 1) + 1
    values = distinct(rng, rows, pairs, vocab_size - noise_vocab - half) + half
    # Among pairs + noise units in a row, these are the pairs, in order; each makes what follows it one token later.
    units = np.sort(distinct(rng, rows, pairs, pairs + num_noise), axis=1)
    begins = (units + np.arange(pairs)).astype(np.int32)
    context = rng.integers(vocab_size - noise_vocab, vocab_size, size=(rows, 2 * pairs + num_noise), dtype=np.int32)
    np.put_along_axis(context, begins, keys, axis=1)
    np.put_along_axis(context, begins + 1, values, axis=1)
    inputs, positions = place_queries(rng, context, keys, input_seq_len, power_a, False, vocab_size)
    settings = {
        "vocab_size": vocab_size,
        "num_examples": num_examples,
        "input_seq_len": input_seq_len,
        "num_kv_pairs": num_kv_pairs,
        "num_noise": num_noise,
        "noise_vocab": noise_vocab,
        "power_a": power_a,
        "seed": seed,
    }
    return asked_once(NAME, vocab_size, settings, inputs, positions, values, begins)


NOISY_RECALL = Task(
    name=NAME,
    make=noisy_recall,
    check=check_noisy_recall,
    sizes={
        "vocab_size": 128,
        "input_seq_len": 128,
        "num_kv_pairs": 8,
        "num_noise": 32,
        "noise_vocab": 16,
        "power_a": 0.01,
    },
    doc="recall the value of each key when most of the context is noise",
    tags=("accuracy", "stability"),
)

"""Recall where keys and values are several tokens long: no single token says which binding is meant.

After the fuzzy in-context recall of MAD (arXiv:2403.17844), in the mould of MQAR, with one difference: all keys of a task
have the same length, and all values (MAD draws lengths at random), so that every example asks as many questions. The
tokens of keys repeat between keys; only their sequence is distinct.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspace.tasks.base import Batch, Ints, Seed, Task, asked_once, require, require_integers
from dspace.tasks.rules import positive_power, some_pairs
from dspace.tasks.sampling import distinct, power_law, weighted_distinct

NAME = "fuzzy_recall"


def check_fuzzy_recall(
    vocab_size: int,
    input_seq_len: int,
    num_kv_pairs: int,
    key_length: int,
    value_length: int,
    key_vocab: int,
    power_a: float = 0.01,
) -> None:
    """Raise a UserError that names each rule that these sizes break."""
    require_integers(
        NAME,
        vocab_size=vocab_size,
        input_seq_len=input_seq_len,
        num_kv_pairs=num_kv_pairs,
        key_length=key_length,
        value_length=value_length,
        key_vocab=key_vocab,
    )
    width = key_length + value_length
    require(
        [
            some_pairs(num_kv_pairs),
            (
                min(key_length, value_length) >= 1,
                f"key_length = {key_length}, value_length = {value_length} must be at least 1",
                "1 and 1 give plain recall",
            ),
            (
                2 * width * num_kv_pairs <= input_seq_len,
                f"2 * (key_length + value_length) * num_kv_pairs = {2 * width * num_kv_pairs} must be at most "
                f"input_seq_len = {input_seq_len}",
                f"input_seq_len >= {2 * width * num_kv_pairs}, or fewer pairs",
            ),
            (
                key_vocab ** max(key_length, 1) >= 2 * num_kv_pairs,
                f"key_vocab = {key_vocab} makes too few keys of {key_length} tokens for {num_kv_pairs} distinct ones",
                "a larger key_vocab or longer keys",
            ),
            (
                vocab_size >= key_vocab + 3,
                f"vocab_size = {vocab_size} leaves no two values beside {key_vocab} key tokens and the blank",
                f"vocab_size >= {key_vocab + 3}",
            ),
            positive_power(power_a),
        ],
        NAME,
    )


def fuzzy_recall(
    vocab_size: int = 64,
    num_examples: int = 1000,
    input_seq_len: int = 128,
    num_kv_pairs: int = 8,
    key_length: int = 2,
    value_length: int = 2,
    key_vocab: int = 16,
    power_a: float = 0.01,
    seed: Seed = 0,
) -> Batch:
    """Make ``D`` bindings of ``key_length`` to ``value_length`` tokens, then every key once more, in random places.

    Tokens of keys are ``1 .. key_vocab``, of values ``key_vocab + 1 .. vocab_size - 1``. A query is the key's tokens
    followed by the value's but the last; each value token is asked for at the token before it: ``value_length``
    questions a binding, question ``i * value_length + j`` for token ``j`` of binding ``i``.
    """
    check_fuzzy_recall(vocab_size, input_seq_len, num_kv_pairs, key_length, value_length, key_vocab, power_a)
    require_integers(NAME, num_examples=num_examples)
    rng = np.random.default_rng(seed)
    rows, pairs, width = num_examples, num_kv_pairs, key_length + value_length
    codes = _distinct_codes(rng, rows, pairs, key_vocab**key_length)
    digits = [codes // key_vocab**i % key_vocab + 1 for i in range(key_length)]
    keys = np.stack(digits, axis=2).astype(np.int32)
    values = rng.integers(key_vocab + 1, vocab_size, size=(rows, pairs, value_length), dtype=np.int32)
    context = np.concatenate([keys, values], axis=2).reshape(rows, pairs * width)
    used = pairs * width
    slots = (input_seq_len - used) // width
    begins = used + width * weighted_distinct(rng, rows, pairs, power_law(slots, power_a))
    inputs = np.zeros((rows, input_seq_len), dtype=np.int32)
    inputs[:, :used] = context
    written = np.concatenate([keys, values[:, :, :-1]], axis=2)
    for j in range(width - 1):
        np.put_along_axis(inputs, begins + j, written[:, :, j], axis=1)
    answers: Ints = key_length - 1 + np.arange(value_length, dtype=np.int32)
    asked = begins[:, :, None] + answers
    bound = width * np.arange(pairs, dtype=np.int32)[:, None] + answers
    shape = (rows, pairs * value_length)
    settings = {
        "vocab_size": vocab_size,
        "num_examples": num_examples,
        "input_seq_len": input_seq_len,
        "num_kv_pairs": num_kv_pairs,
        "key_length": key_length,
        "value_length": value_length,
        "key_vocab": key_vocab,
        "power_a": power_a,
        "seed": seed,
    }
    return asked_once(
        NAME, vocab_size, settings, inputs, asked.reshape(shape), values.reshape(shape), bound.reshape(-1)
    )


def _distinct_codes(rng: np.random.Generator, rows: int, size: int, population: int) -> NDArray[np.int64]:
    """``size`` distinct numbers below ``population`` a row; from a large population by drawing rows again."""
    if population <= 1 << 12:
        return distinct(rng, rows, size, population).astype(np.int64)
    drawn = rng.integers(0, population, size=(rows, size))
    while True:
        again = (np.diff(np.sort(drawn, axis=1), axis=1) == 0).any(axis=1)
        if not again.any():
            return drawn
        drawn[again] = rng.integers(0, population, size=(int(again.sum()), size))


FUZZY_RECALL = Task(
    name=NAME,
    make=fuzzy_recall,
    check=check_fuzzy_recall,
    sizes={
        "vocab_size": 64,
        "input_seq_len": 128,
        "num_kv_pairs": 8,
        "key_length": 2,
        "value_length": 2,
        "key_vocab": 16,
        "power_a": 0.01,
    },
    doc="recall values of several tokens for keys of several tokens",
    tags=("accuracy", "stability"),
)

"""Two tasks without keys: copy what stood among blanks, and give back a sequence from its compressed form.

``selective_copy`` after arXiv:2312.00752 and MAD (arXiv:2403.17844): which tokens count depends on what they are, not on
where they stand. ``compression`` after MAD, with one difference: MAD decodes all tokens at once from the last hidden state
through an MLP of its own; here each is asked for by a token that names its place, so that every model is read alike.
"""

from __future__ import annotations

import numpy as np

from dspace.tasks.base import Batch, Seed, Task, asked_once, require, require_integers
from dspace.tasks.sampling import distinct

COPY, COMPRESS = "selective_copy", "compression"
BLANK, MARKER = 0, 1


def check_selective_copy(vocab_size: int, input_seq_len: int, num_tokens: int) -> None:
    """Raise a UserError that names each rule that these sizes break."""
    require_integers(COPY, vocab_size=vocab_size, input_seq_len=input_seq_len, num_tokens=num_tokens)
    require(
        [
            (num_tokens >= 1, f"num_tokens = {num_tokens} must be at least 1", "ask for one token or more"),
            (vocab_size >= 4, f"vocab_size = {vocab_size} has no two tokens to copy", "a vocabulary of at least 4"),
            (
                2 * num_tokens <= input_seq_len,
                f"2 * num_tokens = {2 * num_tokens} must be at most input_seq_len = {input_seq_len}",
                f"input_seq_len >= {2 * num_tokens}",
            ),
        ],
        COPY,
    )


def selective_copy(
    vocab_size: int = 16, num_examples: int = 1000, input_seq_len: int = 128, num_tokens: int = 16, seed: Seed = 0
) -> Batch:
    """Make ``num_tokens`` tokens (2 .. vocab_size - 1) in random places among blanks (0), then as many markers (1).

    At marker ``i`` the answer is the ``i``-th of the tokens.
    """
    check_selective_copy(vocab_size, input_seq_len, num_tokens)
    require_integers(COPY, num_examples=num_examples)
    rng = np.random.default_rng(seed)
    rows, count, room = num_examples, num_tokens, input_seq_len - num_tokens
    places = np.sort(distinct(rng, rows, count, room), axis=1)
    tokens = rng.integers(2, vocab_size, size=(rows, count), dtype=np.int32)
    inputs = np.full((rows, input_seq_len), BLANK, dtype=np.int32)
    np.put_along_axis(inputs, places, tokens, axis=1)
    inputs[:, room:] = MARKER
    positions = np.broadcast_to(np.arange(room, input_seq_len, dtype=np.int32), tokens.shape)
    settings = {"vocab_size": vocab_size, "input_seq_len": input_seq_len, "num_tokens": num_tokens}
    return asked_once(
        COPY, vocab_size, {**settings, "num_examples": rows, "seed": seed}, inputs, positions, tokens, places
    )


def check_compression(vocab_size: int, input_seq_len: int, num_tokens: int) -> None:
    """Raise a UserError that names each rule that these sizes break."""
    require_integers(COMPRESS, vocab_size=vocab_size, input_seq_len=input_seq_len, num_tokens=num_tokens)
    require(
        [
            (num_tokens >= 1, f"num_tokens = {num_tokens} must be at least 1", "ask for one token or more"),
            (
                vocab_size >= num_tokens + 3,
                f"vocab_size = {vocab_size} leaves no two tokens beside {num_tokens} names of places and the end",
                f"vocab_size >= {num_tokens + 3}",
            ),
            (
                2 * num_tokens + 1 <= input_seq_len,
                f"2 * num_tokens + 1 = {2 * num_tokens + 1} must be at most input_seq_len = {input_seq_len}",
                f"input_seq_len >= {2 * num_tokens + 1}",
            ),
        ],
        COMPRESS,
    )


def compression(
    vocab_size: int = 64, num_examples: int = 1000, input_seq_len: int = 65, num_tokens: int = 32, seed: Seed = 0
) -> Batch:
    """Make ``num_tokens`` random tokens, the end (0), and names of their places in random order; blanks fill the rest.

    Names are ``1 .. num_tokens``, tokens ``num_tokens + 1 .. vocab_size - 1``. Column ``i`` asks for token ``i``.
    """
    check_compression(vocab_size, input_seq_len, num_tokens)
    require_integers(COMPRESS, num_examples=num_examples)
    rng = np.random.default_rng(seed)
    rows, count = num_examples, num_tokens
    tokens = rng.integers(count + 1, vocab_size, size=(rows, count), dtype=np.int32)
    positions = (count + 1 + distinct(rng, rows, count, count)).astype(np.int32)
    places = np.broadcast_to(np.arange(count, dtype=np.int32), tokens.shape)
    inputs = np.full((rows, input_seq_len), BLANK, dtype=np.int32)
    inputs[:, :count] = tokens
    np.put_along_axis(inputs, positions, places + 1, axis=1)
    settings = {"vocab_size": vocab_size, "input_seq_len": input_seq_len, "num_tokens": num_tokens}
    return asked_once(
        COMPRESS, vocab_size, {**settings, "num_examples": rows, "seed": seed}, inputs, positions, tokens, places
    )


SELECTIVE_COPY = Task(
    name=COPY,
    make=selective_copy,
    check=check_selective_copy,
    sizes={"vocab_size": 16, "input_seq_len": 128, "num_tokens": 16},
    doc="copy in order the tokens that stood among blanks",
    tags=("accuracy", "stability"),
)
COMPRESSION = Task(
    name=COMPRESS,
    make=compression,
    check=check_compression,
    sizes={"vocab_size": 64, "input_seq_len": 65, "num_tokens": 32},
    doc="give back any token of a random sequence by its place",
    tags=("accuracy", "stability"),
)

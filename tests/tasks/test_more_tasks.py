"""Noisy and fuzzy recall, selective copy, compression: an oracle that reads the sequence alone answers every question."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dspace.errors import UserError
from dspace.tasks import TASKS, Batch, accuracy, evaluate, get_task, recall_by_age

NAMES = ["noisy_recall", "fuzzy_recall", "selective_copy", "compression"]


def noisy(batch: Batch, row: int) -> list[int]:
    """Whatever stands behind a key in the context is its value; noise is neither."""
    half, last = batch.vocab_size // 2, batch.vocab_size - batch.settings["noise_vocab"]
    tokens = batch.inputs[row].tolist()
    used = 2 * batch.settings["num_kv_pairs"] + batch.settings["num_noise"]
    memory = {k: v for k, v in zip(tokens[:used], tokens[1:used], strict=False) if 1 <= k < half and half <= v < last}
    return [memory[tokens[p]] for p in batch.positions[row]]


def fuzzy(batch: Batch, row: int) -> list[int]:
    """The longest match: find the tokens before the question in the context, answer with what followed there."""
    m, w, pairs = (batch.settings[k] for k in ("key_length", "value_length", "num_kv_pairs"))
    tokens = batch.inputs[row].tolist()
    bindings = [tokens[i * (m + w) : (i + 1) * (m + w)] for i in range(pairs)]
    answers = []
    for p in batch.positions[row]:
        for known in range(w):  # how many tokens of the value stand already before the question
            asked = tokens[p - m + 1 - known : p + 1]
            found = [b[m + known] for b in bindings if b[: m + known] == asked]
            if found:
                answers.append(found[0])
    return answers


def copied(batch: Batch, row: int) -> list[int]:
    return [t for t in batch.inputs[row].tolist() if t > 1]


def compressed(batch: Batch, row: int) -> list[int]:
    tokens = batch.inputs[row].tolist()
    return [tokens[tokens[p] - 1] for p in batch.positions[row]]


ORACLES: dict[str, Callable[[Batch, int], list[int]]] = dict(
    zip(NAMES, (noisy, fuzzy, copied, compressed), strict=True)
)


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_answers_every_question(name: str) -> None:
    batch = get_task(name).batch(100, seed=5)
    answers = np.array([ORACLES[name](batch, row) for row in range(len(batch))])
    assert answers.shape == batch.targets.shape and accuracy(batch, answers) == 1.0
    assert evaluate(batch, answers) == {"accuracy": 1.0, "stability": 1.0}
    assert sum(recall_by_age(batch, answers).count) == batch.targets.size


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_well_formed(name: str) -> None:
    batch = get_task(name).batch(300, seed=(1, 2))
    assert batch.inputs.min() >= 0 and max(batch.inputs.max(), batch.targets.max()) < batch.vocab_size
    assert (np.sort(batch.positions, 1)[:, 1:] != np.sort(batch.positions, 1)[:, :-1]).all(), "one question a place"
    assert (batch.ages >= 1).all() and (batch.positions < batch.length).all()
    # What is asked for stands in the sequence, as many tokens before the question as its age says.
    if name != "fuzzy_recall":
        offset = 1 if name == "noisy_recall" else 0
        found = np.take_along_axis(batch.inputs, batch.positions - batch.ages + offset, 1)
    else:
        found = np.take_along_axis(batch.inputs, batch.positions - batch.ages + 1, 1)
    assert (found == batch.targets).all()
    assert get_task(name).batch(300, seed=(1, 2)).hash == batch.hash != get_task(name).batch(300, seed=(1, 3)).hash


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("noisy_recall", {"num_noise": 200}, "input_seq_len >= 232"),
        ("noisy_recall", {"vocab_size": 20}, "distinct ones"),
        ("fuzzy_recall", {"num_kv_pairs": 40}, "fewer pairs"),
        ("fuzzy_recall", {"key_vocab": 3}, "longer keys"),
        ("selective_copy", {"num_tokens": 65}, "input_seq_len >= 130"),
        ("selective_copy", {"vocab_size": 3}, "at least 4"),
        ("compression", {"vocab_size": 34}, "vocab_size >= 35"),
        ("compression", {"num_tokens": 1.5}, "whole number"),
    ],
)
def test_impossible_sizes_are_refused_with_the_cure(name: str, sizes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_task(name).batch(2, **sizes)


def test_keys_of_several_tokens_share_their_tokens() -> None:
    batch = get_task("fuzzy_recall").batch(200, seed=0, key_vocab=128, vocab_size=200, key_length=3, input_seq_len=160)
    keys = batch.inputs[:, : 8 * 5].reshape(200, 8, 5)[:, :, :3]
    assert all(len({tuple(k) for k in row}) == 8 for row in keys.tolist()), "drawn again until distinct"
    few = get_task("fuzzy_recall").batch(200, seed=0, key_vocab=4)
    first = few.inputs[:, : 8 * 4].reshape(200, 8, 4)[:, :, 0]
    assert (np.array([len(set(row)) for row in first.tolist()]) < 8).all(), "no single token tells the keys apart"


def test_all_tasks_are_registered_and_documented() -> None:
    assert set(NAMES) < set(TASKS) and all(task.doc and task.sizes for task in TASKS.values())

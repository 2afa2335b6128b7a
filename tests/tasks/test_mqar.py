"""MQAR keeps the published semantics to the letter."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dspace.errors import UserError
from dspace.tasks import IGNORE, TASKS, get_task, mqar, rebinding_mqar
from dspace.tasks.sampling import distinct, power_law, weighted_distinct

SIZES = {"vocab_size": 100, "num_examples": 300, "input_seq_len": 64, "num_kv_pairs": 8}


def dictionary_answers(batch):
    """Read each sequence with a dictionary: what a perfect memory answers."""
    context = 2 * (batch.num_questions + batch.settings.get("num_updates", 0))
    answers = np.empty_like(batch.targets)
    for row, (tokens, where) in enumerate(zip(batch.inputs, batch.positions, strict=True)):
        memory = dict(zip(tokens[:context:2].tolist(), tokens[1:context:2].tolist(), strict=True))
        answers[row] = [memory[token] for token in tokens[where].tolist()]
    return answers


def test_layout_of_labels_and_context():
    batch = mqar(**SIZES, seed=3)
    d, length = 8, 64
    assert batch.inputs.shape == batch.labels.shape == (300, length)
    assert batch.inputs.dtype == np.int32 and batch.labels.dtype == np.int64
    rows, columns = np.nonzero(batch.labels != IGNORE)
    assert (np.bincount(rows) == d).all()
    assert (columns % 2 == 0).all() and columns.min() >= 2 * d and columns.max() <= length - 2
    keys, values = batch.inputs[:, 0 : 2 * d : 2], batch.inputs[:, 1 : 2 * d : 2]
    assert keys.min() >= 1 and keys.max() <= 49 and values.min() >= 50 and values.max() <= 99
    for table in (keys, values, batch.positions):
        assert all(len(set(row)) == d for row in table.tolist())
    assert (np.take_along_axis(batch.inputs, batch.positions, 1) == keys).all()
    assert (np.take_along_axis(batch.labels, batch.positions, 1) == values).all()
    assert set(np.unique(keys)) == set(range(1, 50)) and set(np.unique(values)) == set(range(50, 100))


def test_ages_count_tokens_from_the_binding():
    batch = mqar(**SIZES, seed=4)
    for row in range(20):
        for i, position in enumerate(batch.positions[row]):
            key = batch.inputs[row, position]
            bound = int(np.nonzero(batch.inputs[row, :16:2] == key)[0][0]) * 2
            assert batch.ages[row, i] == position - bound == batch.dense_ages[row, position]
            assert batch.order[row, i] == bound // 2
    assert ((batch.dense_ages >= 0) == (batch.labels != IGNORE)).all()


def test_fillers_cover_the_vocabulary_or_are_zero():
    off = mqar(**SIZES, random_non_queries=False, seed=5)
    free = np.ones_like(off.inputs, dtype=bool)
    free[:, :16] = False
    np.put_along_axis(free, off.positions, False, axis=1)
    assert (off.inputs[free] == 0).all() and (off.inputs[~free] > 0).all()
    on = mqar(**SIZES, random_non_queries=True, seed=5)
    np.testing.assert_array_equal(on.targets, on.inputs[:, 1:16:2])
    fill = on.inputs[free] if (on.positions == off.positions).all() else on.inputs[:, 17::2].ravel()
    counts = np.bincount(fill, minlength=100)
    expected = len(fill) / 100
    assert (counts > 0).all(), "keys, values and 0 all occur as fillers"
    assert ((counts - expected) ** 2 / expected).sum() < 170  # chi-square, 99 degrees: p < 1e-5


def test_first_gap_follows_the_power_law():
    batch = mqar(vocab_size=256, num_examples=40_000, input_seq_len=144, num_kv_pairs=8, seed=6)
    slots = (144 - 16) // 2
    p = power_law(slots, 0.01)
    assert slots == 64 and np.allclose(p[:4], [0.207, 0.104, 0.070, 0.052], atol=1e-3)
    gap = (batch.positions[:, 0] - 16) // 2  # key 0 takes the first draw
    counts = np.bincount(gap, minlength=slots)
    assert ((counts - 40_000 * p) ** 2 / (40_000 * p)).sum() < 125  # 63 degrees: p < 1e-5
    # the second draw avoids the first one's slot: P(second = j) = sum_{i != j} p_i p_j / (1 - p_i)
    second = np.bincount((batch.positions[:, 1] - 16) // 2, minlength=slots)
    q = p * ((p / (1 - p)).sum() - p / (1 - p))
    assert ((second - 40_000 * q) ** 2 / (40_000 * q)).sum() < 125


def test_draws_without_replacement_are_uniform():
    rng = np.random.default_rng(0)
    drawn = distinct(rng, 30_000, 3, 5)
    codes = drawn @ np.array([25, 5, 1])
    counts = np.bincount(codes)[np.unique(codes)]
    assert len(counts) == 60, "every ordered triple occurs"
    assert ((counts - 500) ** 2 / 500).sum() < 120
    everything = weighted_distinct(rng, 50, 7, power_law(7, 0.01))
    assert (np.sort(everything, axis=1) == np.arange(7)).all()


def test_a_seed_means_the_same_batch_in_every_process():
    here = mqar(**SIZES, seed=7).hash
    code = f"from dspace.tasks import mqar; print(mqar(**{SIZES!r}, seed=7).hash)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there and len(here) == 64
    assert here != mqar(**SIZES, seed=8).hash
    assert mqar(**SIZES, seed=(1, 2)).hash == mqar(**SIZES, seed=(1, 2)).hash


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"random_non_queries": False},
        {"num_kv_pairs": 16},
        {"vocab_size": 65, "num_kv_pairs": 16},
        {"input_seq_len": 4, "num_kv_pairs": 1},
    ],
)
def test_a_dictionary_is_perfect_on_mqar(settings):
    batch = mqar(**{**SIZES, **settings})
    np.testing.assert_array_equal(dictionary_answers(batch), batch.targets)


@pytest.mark.parametrize("placement", ["end", "mixed"])
@pytest.mark.parametrize("updates", [0, 1, 5, 8])
def test_a_dictionary_is_perfect_on_rebinding(placement, updates):
    batch = rebinding_mqar(**SIZES, num_updates=updates, placement=placement, seed=9)
    np.testing.assert_array_equal(dictionary_answers(batch), batch.targets)
    assert (batch.rebound.sum(axis=1) == updates).all()
    assert (np.sort(batch.order, axis=1) == np.arange(8)).all()
    context = 2 * (8 + updates)
    for row in range(40):
        tokens = batch.inputs[row].tolist()
        for i, position in enumerate(batch.positions[row].tolist()):
            slots = [s for s in range(0, context, 2) if tokens[s] == tokens[position]]
            assert len(slots) == 1 + batch.rebound[row, i]
            assert batch.ages[row, i] == position - slots[-1]
            assert batch.stale[row, i] == (tokens[slots[0] + 1] if batch.rebound[row, i] else -1)
            assert batch.stale[row, i] != batch.targets[row, i]
        live = np.argsort(-batch.ages[row] + batch.positions[row])
        assert (batch.order[row][live] == np.arange(8)).all()
    if placement == "end" and updates:
        assert (batch.order[batch.rebound] >= 8 - updates).all()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"input_seq_len": 63}, ["must be even", "64"]),
        ({"input_seq_len": 128}, ["vocab_size = 100 must exceed", "129"]),
        ({"num_kv_pairs": 17}, ["4 * num_kv_pairs = 68", "num_kv_pairs <= 16"]),
        ({"num_kv_pairs": 0}, ["at least 1"]),
        ({"num_kv_pairs": 2.5}, ["whole numbers"]),
        ({"power_a": 0}, ["power_a"]),
        ({"input_seq_len": 63, "num_kv_pairs": 99}, ["must be even", "4 * num_kv_pairs", "distinct ones"]),
    ],
)
def test_impossible_sizes_name_every_broken_rule(settings, words):
    with pytest.raises(UserError) as error:
        mqar(**{**SIZES, **settings})
    assert all(word in str(error.value) for word in [*words, "cure:"])


def test_impossible_rebindings_are_refused():
    with pytest.raises(UserError, match="= 42 must be at most"):
        rebinding_mqar(vocab_size=100, num_examples=2, input_seq_len=40, num_kv_pairs=8, num_updates=5)
    with pytest.raises(UserError, match="a key is re-bound once"):
        rebinding_mqar(vocab_size=100, num_examples=2, num_kv_pairs=4, num_updates=5)
    with pytest.raises(UserError, match="placement"):
        rebinding_mqar(**SIZES, placement="start")


def test_registry_makes_batches_by_name_and_helps_with_names():
    batch = get_task("mqar").batch(10, seed=1, vocab_size=100)
    assert len(batch) == 10 and batch.vocab_size == 100
    assert batch.hash == mqar(vocab_size=100, num_examples=10, seed=1).hash
    with pytest.raises(UserError, match="did you mean 'mqar'"):
        get_task("mqarr")
    with pytest.raises(UserError, match="no setting 'pairs'"):
        get_task("mqar").batch(10, pairs=3)
    for task in TASKS.values():
        task.check(**task.sizes)
        assert len(task.batch(4)) == 4
    for name in ("mqar", "rebinding_mqar"):
        small = get_task(name).batch(4)
        np.testing.assert_array_equal(dictionary_answers(small), small.targets)


def test_slices_and_hash_follow_the_content():
    batch = mqar(**SIZES, seed=1)
    assert batch[:10].inputs.shape == (10, 64) and batch[:10].hash == batch[np.arange(10)].hash != batch.hash

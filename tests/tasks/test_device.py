"""MQAR by PyTorch's generator: the same rules as by NumPy, checked on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspace.errors import UserError
from dspace.tasks import accuracy, get_task, mqar
from dspace.tasks.device import distinct, mqar_on_device

SIZES = {
    "vocab_size": 64,
    "input_seq_len": 32,
    "num_kv_pairs": 4,
    "power_a": 0.01,
    "random_non_queries": False,
}


def test_an_oracle_answers_every_question() -> None:
    batch = mqar_on_device(**SIZES, num_examples=200, seed=3, device="cpu").to_batch()
    answers = np.empty_like(batch.targets)
    for i, (tokens, positions) in enumerate(zip(batch.inputs, batch.positions, strict=True)):
        memory = dict(zip(tokens[0:8:2].tolist(), tokens[1:8:2].tolist(), strict=True))
        answers[i] = [memory[int(tokens[p])] for p in positions]
        rest = np.delete(tokens[8:], positions - 8)
        assert not rest.any(), "fillers are off"
    assert accuracy(batch, answers) == 1.0
    assert (batch.inputs[:, 0:8:2] < 32).all() and (batch.inputs[:, 0:8:2] >= 1).all()
    assert (batch.targets >= 32).all() and (
        np.sort(batch.positions, 1)[:, 1:] != np.sort(batch.positions, 1)[:, :-1]
    ).all()


def test_the_statistics_are_those_of_numpy() -> None:
    ours = mqar_on_device(**SIZES, num_examples=100_000, seed=1, device="cpu").to_batch()
    theirs = mqar(**SIZES, num_examples=100_000, seed=1)
    for a, b in ((ours.positions, theirs.positions), (ours.targets, theirs.targets), (ours.inputs, theirs.inputs)):
        width = int(max(a.max(), b.max())) + 1
        counts = [np.bincount(x.ravel(), minlength=width) / x.size for x in (a, b)]
        assert np.abs(counts[0] - counts[1]).max() < 0.005
    for i in range(4):  # the order of drawing counts: the first key sits earliest
        assert abs(ours.positions[:, i].mean() - theirs.positions[:, i].mean()) < 0.15


def test_seeds_and_refusals() -> None:
    one, same, other = (mqar_on_device(**SIZES, num_examples=8, seed=s, device="cpu") for s in (1, 1, 2))
    assert one.hash == same.hash != other.hash
    with pytest.raises(UserError, match="must be at most input_seq_len"):
        mqar_on_device(**{**SIZES, "num_kv_pairs": 20}, num_examples=1, seed=0, device="cpu")
    on_cpu = get_task("mqar").batch(4, seed=0, device="cpu", **SIZES)
    assert on_cpu.hash == get_task("mqar").batch(4, seed=0, **SIZES).hash, "on a CPU the examples are NumPy's"


def test_blocks_do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspace.tasks.device.CELLS", 100)
    drawn = distinct(torch.Generator().manual_seed(0), 50, 5, 10)
    assert drawn.shape == (50, 5) and all(len(set(row.tolist())) == 5 for row in drawn)
    assert len({tuple(row.tolist()) for row in drawn}) > 40

"""Metrics on predictions whose score is known."""

from __future__ import annotations

import numpy as np
import pytest

from dspace.errors import UserError
from dspace.tasks import (
    accuracy,
    evaluate,
    intrusion,
    mqar,
    oldest_quarter,
    plasticity,
    rebinding_mqar,
    recall_by_age,
    stability,
)

SIZES = {"vocab_size": 100, "num_examples": 200, "input_seq_len": 64, "num_kv_pairs": 8, "seed": 2}


def test_perfect_and_hopeless_answers():
    batch = rebinding_mqar(**SIZES, num_updates=4)
    assert evaluate(batch, batch.targets) == {"accuracy": 1, "stability": 1, "plasticity": 1, "intrusion": 0}
    assert evaluate(batch, np.zeros_like(batch.targets)) == {
        "accuracy": 0,
        "stability": 0,
        "plasticity": 0,
        "intrusion": 0,
    }


def test_accuracy_is_the_mean_of_the_examples_fractions():
    batch = mqar(**SIZES)
    answers = batch.targets.copy()
    answers[0, :] = 0
    answers[1, :2] = 0
    assert accuracy(batch, answers) == pytest.approx((198 + 0.75) / 200)


def test_a_memory_that_never_overwrites_is_stable_and_rigid():
    batch = rebinding_mqar(**SIZES, num_updates=4, placement="mixed")
    rigid = np.where(batch.rebound, batch.stale, batch.targets)
    assert stability(batch, rigid) == 1 and plasticity(batch, rigid) == 0 and intrusion(batch, rigid) == 1
    assert accuracy(batch, rigid) == pytest.approx(0.5)


def test_stability_looks_at_the_oldest_quarter_only():
    batch = mqar(**SIZES)
    assert (oldest_quarter(batch).sum(axis=1) == 2).all() and oldest_quarter(batch)[:, :2].all()
    forgetful = batch.targets.copy()
    forgetful[:, :2] = 0
    assert stability(batch, forgetful) == 0 and accuracy(batch, forgetful) == 0.75


def test_recall_by_age_finds_the_age_at_which_memory_ends():
    batch = mqar(**SIZES)
    answers = np.where(batch.ages < 20, batch.targets, 0)
    curve = recall_by_age(batch, answers, bins=1000)
    ages = np.array(curve.edges[:-1])
    assert all((r == 1) == (a < 20) for a, r in zip(ages, curve.recall, strict=True))
    coarse = recall_by_age(batch, answers, bins=8)
    assert sum(coarse.count) == sum(curve.count) == batch.targets.size
    assert coarse.recall[0] == 1 and coarse.recall[-1] == 0 and len(coarse.centres) == len(coarse.recall)
    weighted = np.dot(coarse.recall, coarse.count) / sum(coarse.count)
    assert weighted == pytest.approx(accuracy(batch, answers))
    assert set(coarse.as_dict()) == {"edges", "recall", "count"}


def test_metrics_without_meaning_are_left_out():
    batch = mqar(**SIZES)
    assert set(evaluate(batch, batch.targets)) == {"accuracy", "stability"}
    assert np.isnan(plasticity(batch, batch.targets))


def test_predictions_of_the_wrong_shape_are_refused():
    batch = mqar(**SIZES)
    with pytest.raises(UserError, match="one token per labelled position"):
        accuracy(batch, batch.labels)

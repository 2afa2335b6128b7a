"""The model keeps its contract, and training on a task makes the loss fall."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from dspace.errors import UserError
from dspace.nn import Mixer, Model, TrainConfig, predict, train
from dspace.nn.training import schedule
from dspace.tasks import accuracy, mqar

from .stub import STUB

SIZES = {"vocab_size": 32, "input_seq_len": 16, "num_kv_pairs": 2}


def small(**options):
    return Model(STUB, **{"vocab_size": 32, "hidden_size": 16, "num_heads": 2, **options})


def test_logits_at_the_labelled_positions_are_those_of_the_whole():
    model = small(mlp_ratio=2.0, max_positions=16)
    batch = mqar(**SIZES, num_examples=4)
    tokens, where = torch.from_numpy(batch.inputs), torch.from_numpy(batch.positions)
    whole = model(tokens)
    assert whole.shape == (4, 16, 32)
    chosen = model(tokens, where)
    assert chosen.shape == (4, 2, 32)
    torch.testing.assert_close(chosen, whole.gather(1, where.long()[..., None].expand(-1, -1, 32)))
    assert (predict(model, batch) == chosen.argmax(-1).numpy()).all()


@pytest.mark.parametrize("mixer", [STUB, "softmax"], ids=["stub", "softmax"])
def test_decoding_and_packing_equal_the_whole(mixer):
    model = Model(mixer, vocab_size=32, hidden_size=16, num_heads=2, mlp_ratio=1.0)
    tokens = torch.randint(32, (2, 10))
    whole = model(tokens)
    first, state = model.step(tokens[:, :4])
    outs = [first]
    for t in range(4, 10):
        logits, state = model.step(tokens[:, t], state)
        outs.append(logits[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)
    packed = model(tokens.reshape(1, 20), cu_seqlens=torch.tensor([0, 10, 20]))
    torch.testing.assert_close(packed.reshape(2, 10, 32), whole, rtol=1e-4, atol=1e-5)


def test_positions_start_anew_in_each_packed_sequence():
    model = small(max_positions=10)
    tokens = torch.randint(32, (2, 10))
    packed = model(tokens.reshape(1, 20), cu_seqlens=torch.tensor([0, 10, 20]))
    torch.testing.assert_close(packed.reshape(2, 10, 32), model(tokens), rtol=1e-4, atol=1e-5)


def test_seed_fixes_the_start_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = small(seed=3), small(seed=3), small(seed=4)
    assert (torch.get_rng_state() == before).all()
    assert all((x == y).all() for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any((x != y).any() for x, y in zip(a.parameters(), c.parameters(), strict=True))
    assert 0.015 < a.embedding.weight.std() < 0.025


def test_sizes():
    model = small(num_layers=3)
    assert model.state_size(64) == 4 * 3 * (2 * 2 * 8 * 8)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert Model("softmax", vocab_size=32, hidden_size=16).state_size(64) == 4 * 2 * 64 * 32
    own = Model(lambda layer: Mixer(STUB, 16, layer + 1), vocab_size=32, hidden_size=16)
    assert [block.mixer.num_heads for block in own.blocks] == [1, 2]
    with pytest.raises(UserError):
        small(num_layers=0)


def test_training_learns_and_repeats_itself():
    data, held_out = mqar(**SIZES, num_examples=4000, seed=(0, 0)), mqar(**SIZES, num_examples=64, seed=(0, 1))
    config = TrainConfig(steps=60, batch_size=64, eval_every=20, lr=2e-2)
    seen = []
    runs = []
    for _ in range(2):
        result = train(small(decay="small"), data, {"near": held_out, "far": held_out}, config, callback=seen.append)
        runs.append(result)
    assert runs[0].curve[-1].metrics == runs[1].curve[-1].metrics
    assert [e.loss for e in runs[0].curve] == [e.loss for e in runs[1].curve]
    result = runs[0]
    assert result.curve[-1].loss < 0.9 * result.curve[0].loss
    assert [e.step for e in result.curve] == [20, 40, 60] and seen[:3] == result.curve
    assert {"accuracy", "stability", "far/accuracy"} <= set(result.metrics)
    assert result.metrics["accuracy"] == result.metrics["far/accuracy"]
    assert result.stopped == "finished" and result.tokens_per_second > 0 and result.state_bytes == 4 * 2 * 256
    curve = result.recall_by_age["near"]
    total = np.dot(curve["recall"], curve["count"]) / sum(curve["count"])
    assert total == pytest.approx(result.metrics["accuracy"])
    assert result.as_dict()["curve"][0]["step"] == 20


def test_reasons_to_stop():
    data = mqar(**SIZES, num_examples=128)
    common = {"steps": 10, "batch_size": 64, "eval_every": 2}
    assert train(small(), data, data, **common, target=-1.0).stopped == "target"
    halted = train(small(), data, data, **common, callback=lambda e: e.step < 4)
    assert halted.stopped == "callback" and halted.steps == 4
    assert train(small(), data, data, **common, max_seconds=0.0).stopped == "time"
    broken = small()
    with torch.no_grad():
        broken.embedding.weight[:] = float("nan")
    result = train(broken, data, data, **common)
    assert result.stopped == "diverged" and len(result.curve) == 1

    class Pruned(Exception):
        pass

    def prune(_):
        raise Pruned

    with pytest.raises(Pruned):
        train(small(), data, data, **common, callback=prune)


def test_fresh_data_every_epoch_and_other_settings():
    epochs = []

    def fresh(epoch):
        epochs.append(epoch)
        return mqar(**SIZES, num_examples=100, seed=(7, epoch))

    held_out = mqar(**SIZES, num_examples=8, seed=1)
    model = small(dropout=0.1, embed_dropout=0.1, init_std=0.02)
    result = train(model, fresh, held_out, steps=5, batch_size=50, schedule="cosine", clip=None, precision="bfloat16")
    assert epochs == [0, 1, 2] and result.steps == 5
    assert accuracy(held_out, predict(model, held_out)) >= 0


def test_schedules():
    one = TrainConfig(steps=100)
    values = [schedule(one, s) for s in range(100)]
    assert values[0] == pytest.approx(0.04) and max(values) == values[30] == 1 and values[-1] < 2e-3
    assert schedule(TrainConfig(schedule="cosine", steps=100), 50) == pytest.approx(0.5)
    assert schedule(TrainConfig(schedule="constant"), 50) == 1


@pytest.mark.parametrize(
    "settings", [{"stepz": 1}, {"steps": 0}, {"lr": -1.0}, {"config": TrainConfig(), "steps": 3}], ids=str
)
def test_wrong_settings_are_refused(settings):
    data = mqar(**SIZES, num_examples=8)
    config = settings.pop("config", None)
    with pytest.raises(UserError):
        train(small(), data, data, config, **settings)


def test_importing_the_packages_does_not_load_torch():
    code = "import dspace.nn, dspace.tasks, sys; assert 'torch' not in sys.modules; dspace.nn.TrainConfig; dspace.nn.train()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "missing" in done.stderr and "TypeError" in done.stderr  # train is the function, not a module

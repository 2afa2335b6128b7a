"""Stacked trials give what separate trainings give."""

from __future__ import annotations

import pytest
import torch

import dspace
from dspace.errors import UserError
from dspace.nn import Model, TrainConfig, predict, stack, train, train_many, unstack
from dspace.nn.flat import FlatAdamW
from dspace.nn.step import Step
from dspace.tasks import rebinding_mqar

SIZES = {"vocab_size": 40, "input_seq_len": 24, "num_kv_pairs": 3, "num_updates": 1}
NAMES = ["palimpsa", "palimpsa_folded", "mamba2", "meta_mamba2", "gla", "metaplastic_gla", "softmax"]
"""The variants of the large studies: parameters per head (folded into heads), shared definitions, none at all."""


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative RMS difference: AdamW blows rounding errors of gradients near zero up to whole steps of a few numbers."""
    return float(((a - b).norm() / (b.norm() + 1e-8)).detach())


def models_of(name: str, count: int, **options) -> list[Model]:
    source = name if name == "softmax" else dspace.compile(name)
    return [Model(source, vocab_size=40, hidden_size=16, num_heads=2, seed=s, **options) for s in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_a_stacked_forward_pass_is_each_models_own(name: str) -> None:
    options = {} if name == "softmax" else {"skip": True, "decay": "small", "expand_v": 2.0}
    models = models_of(name, 3, mlp_ratio=2.0, **options)
    stacked = stack(models)
    batch = rebinding_mqar(num_examples=6, seed=1, **SIZES)
    tokens, positions = torch.from_numpy(batch.inputs), torch.from_numpy(batch.positions)
    logits = stacked(tokens, positions).unflatten(0, (3, 2))
    for i, model in enumerate(models):
        rows = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(logits[i], model(tokens[rows], positions[rows]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["palimpsa", "mamba2", "softmax"])
def test_stacked_training_is_separate_training(name: str) -> None:
    data = rebinding_mqar(num_examples=64, seed=(3, 0), **SIZES)
    held_out = rebinding_mqar(num_examples=16, seed=(3, 1), **SIZES)
    configs = [
        TrainConfig(steps=12, batch_size=16, lr=lr, weight_decay=wd, seed=s, eval_every=6)
        for s, (lr, wd) in enumerate([(1e-2, 0.1), (3e-3, 0.0), (2e-2, 0.1)])
    ]
    alone, together = models_of(name, 3), models_of(name, 3)
    results = train_many(together, data, held_out, configs)
    for model, twin, config, result in zip(alone, together, configs, results, strict=True):
        expected = train(model, data, held_out, config)
        assert [e.step for e in result.curve] == [6, 12] and result.stopped == "finished" and result.trials == 3
        for mine, his in zip(result.curve, expected.curve, strict=True):
            assert mine.loss == pytest.approx(his.loss, rel=1e-4) and mine.lr == pytest.approx(his.lr)
        for (key, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
            assert apart(p, q) < 5e-3, key
        assert result.num_parameters == expected.num_parameters and result.state_bytes == expected.state_bytes


def test_one_model_alone_goes_the_same_way() -> None:
    data = rebinding_mqar(num_examples=64, seed=(3, 0), **SIZES)
    config = TrainConfig(steps=8, batch_size=16, lr=1e-2, eval_every=8, seed=5)
    (mine,), (his,) = models_of("palimpsa", 1), models_of("palimpsa", 1)
    (result,) = train_many([mine], data, data, [config])
    expected = train(his, data, data, config)
    assert result.curve[-1].loss == pytest.approx(expected.curve[-1].loss, rel=1e-4)
    assert (predict(mine, data) == predict(his, data)).mean() > 0.99


def test_a_trial_that_ends_is_frozen_and_the_others_go_on() -> None:
    data = rebinding_mqar(num_examples=32, seed=(3, 0), **SIZES)
    configs = [TrainConfig(steps=9, batch_size=16, lr=lr, eval_every=3) for lr in (1e-2, 1e30, 1e-2)]
    models = models_of("simple_gla", 3)
    results = train_many(models, data, data, configs, callback=lambda trial, e: not (trial == 2 and e.step == 3))
    assert [r.stopped for r in results] == ["finished", "diverged", "callback"]
    assert [len(r.curve) for r in results] == [3, len(results[1].curve), 1]
    (again,) = models_of("simple_gla", 3)[2:]
    train(again, data, data, TrainConfig(steps=9, batch_size=16, lr=1e-2, eval_every=3), callback=lambda e: False)
    frozen = dict(again.named_parameters())
    for key, p in models[2].named_parameters():
        assert apart(p, frozen[key]) < 5e-3, key


def test_what_cannot_be_stacked_is_told() -> None:
    with pytest.raises(UserError, match="differ in name or shape"):
        stack([*models_of("mamba2", 1), *models_of("gla", 1)])
    data = rebinding_mqar(num_examples=32, seed=(3, 0), **SIZES)
    with pytest.raises(UserError, match="agree in steps"):
        train_many(models_of("gla", 2), data, data, [TrainConfig(steps=2), TrainConfig(steps=3)])
    stacked = stack(models_of("palimpsa", 2))
    with pytest.raises(UserError, match="unstack"):
        stacked.step(torch.zeros(2, dtype=torch.long))


def test_unstacking_gives_the_weights_back() -> None:
    models = models_of("palimpsa", 2)
    stacked = stack(models)
    with torch.no_grad():
        for p in stacked.parameters():
            p.add_(torch.arange(2.0).view(2, *[1] * (p.ndim - 1)))
    before = [{k: p.clone() for k, p in m.named_parameters()} for m in models]
    unstack(stacked, models)
    for i, (model, old) in enumerate(zip(models, before, strict=True)):
        for key, p in model.named_parameters():
            torch.testing.assert_close(p, old[key] + i)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("large", [10**9, 30])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_flat_optimizer_is_adamw(clip: float | None, large: int, compiled: bool, monkeypatch) -> None:
    """Also with a parameter large enough for a buffer of its own (blocks of 5 numbers), and traced by the compiler."""
    monkeypatch.setattr("dspace.nn.flat.LARGE", large)
    monkeypatch.setattr("dspace.nn.flat.BLOCK", 256 if large > 30 else 5)
    torch.manual_seed(0)
    mine, his = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    his.load_state_dict(mine.state_dict())
    flat = FlatAdamW(mine, 1, [0.1], clip)
    assert len(flat.buffers) == (1 if large > 30 else 2)
    update = torch.compile(flat.update, backend="aot_eager", dynamic=False) if compiled else flat.update
    theirs = torch.optim.AdamW(his.parameters(), lr=1.0, weight_decay=0.1)
    rates = torch.tensor([[0.1], [0.05], [0.2]])
    for rate, control in zip(rates, flat.controls(rates), strict=True):
        x = torch.randn(3, 7)
        grads = torch.autograd.grad(mine(x).square().sum(), flat.parameters)
        with torch.no_grad():
            update(control, grads)
        theirs.param_groups[0]["lr"] = float(rate)
        theirs.zero_grad()
        his(x).square().sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(his.parameters(), clip)
        theirs.step()
    torch.testing.assert_close(mine.weight, his.weight, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_float32_weights_and_inputs_of_one_kind() -> None:
    (model,) = models_of("palimpsa", 1, expand_v=2.0)
    seen: list[list[torch.dtype]] = []
    mixer = model.blocks[0].mixer
    inner = mixer.operator.recurrent

    def spy(*args, **kwargs):
        seen.append([a.dtype for a in args])
        return inner(*(a.float() for a in args), **kwargs)

    import dataclasses

    for block in model.blocks:
        block.mixer.operator = dataclasses.replace(block.mixer.operator, chunk=spy, recurrent=spy)
    data = rebinding_mqar(num_examples=32, seed=(3, 0), **SIZES)
    train_many([model], data, data, [TrainConfig(steps=2, batch_size=8, eval_every=2, precision="bfloat16")])
    low, full = torch.bfloat16, torch.float32
    assert seen[0] == [low, low, low, low, full, full], "operands of matmuls in bfloat16, rates and parameters not"
    assert all(p.dtype == full for p in model.parameters())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_loss_can_be_compiled(precision: torch.dtype | None) -> None:
    """Traced as for a GPU (the compiler's front end and autograd; no code is made on a CPU here)."""
    models = models_of("metaplastic_gla", 2)
    stacked = stack(models)
    optimizer = FlatAdamW(stacked, 2, [0.1, 0.1], 1.0)
    batch = rebinding_mqar(num_examples=8, seed=1, **SIZES)
    like = tuple(torch.from_numpy(a).long() for a in (batch.inputs, batch.positions, batch.targets))
    step = Step(stacked, optimizer, like, precision)
    close = 1.0 if precision is None else 300.0
    assert step.engine == "eager"
    expected = step.loss(*like)
    compiled = torch.compile(step.loss, fullgraph=True, backend="aot_eager", dynamic=False)
    found = compiled(*like)
    torch.testing.assert_close(found, expected, rtol=1e-4 * close, atol=1e-5 * close)
    grads = torch.autograd.grad(found.sum(), optimizer.parameters, allow_unused=True)
    for p, g, h in zip(
        optimizer.parameters,
        grads,
        torch.autograd.grad(expected.sum(), optimizer.parameters, allow_unused=True),
        strict=True,
    ):
        assert (g is None) == (h is None)
        if g is not None:
            assert apart(g, h) < 1e-3 * close**0.7, p.shape

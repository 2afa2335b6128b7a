"""Training of stacked trials: the loop around :class:`dspace.nn.step.Step`, with the results of separate trainings."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspace.errors import UserError
from dspace.nn.flat import FlatAdamW
from dspace.nn.model import Model
from dspace.nn.stacked import stack, unstack
from dspace.nn.step import Engine, Step, precision_of
from dspace.nn.training import Data, Evaluation, Result, TrainConfig, _sets, _tensor, row_orders, schedule
from dspace.tasks import Batch, evaluate, recall_by_age

OWN = ("lr", "weight_decay", "seed")
"""Settings in which stacked trials may differ."""

AHEAD = 16
"""Steps: a GPU's queue holds two to three times as many, so that a training that is told to stop does so soon."""

Columns = tuple[Tensor, Tensor, Tensor]
"""Tokens, positions of the questions, targets."""

Callback = Callable[[int, Evaluation], bool | None]
"""Sees trial and evaluation; False freezes that trial, which then only takes up its place."""


def train_many(
    models: Sequence[Model],
    data: Data,
    held_out: Batch | Mapping[str, Batch],
    configs: Sequence[TrainConfig],
    *,
    callback: Callback | None = None,
    each_step: Callable[[], None] = lambda: None,
    device: str | torch.device | None = None,
    engine: Engine = "auto",
) -> list[Result]:
    """Train models of equal structure in one batched step and return the result of each.

    Each trial has its own learning rate, weight decay and seed (its own order of the examples); the rest of
    ``configs`` must agree. A trial that diverges, reaches its target or is stopped by the callback is frozen; the
    others go on. On a GPU the step is compiled and recorded (``engine``); the models end up trained, on ``device``.
    Raises UserError for models or settings that do not go together.
    """
    trials, config = len(models), configs[0]
    _check(models, configs)
    sets = _sets(held_out)
    where = torch.device(device) if device is not None else next(models[0].parameters()).device
    for model in models:
        model.to(where)
    stacked = stack(models)
    stacked.train()
    optimizer = FlatAdamW(stacked, trials, [c.weight_decay for c in configs], config.clip, config.betas)
    rates = torch.tensor([[c.lr * schedule(c, s) for c in configs] for s in range(config.steps)])
    controls = optimizer.controls(rates)
    results = [
        Result(num_parameters=m.num_parameters(), state_bytes=m.state_size(next(iter(sets.values())).length))
        for m in models
    ]
    batches = _batches(data, configs, where)
    first = next(batches)
    if where.type == "cpu":
        torch.manual_seed(config.seed)  # dropout
    step = Step(stacked, optimizer, first, precision_of(config.precision), engine)
    held = {name: (batch, *_on(batch, where)) for name, batch in sets.items()}
    alive = [True] * trials
    spent, tokens, since, start = 0.0, 0, 0, time.perf_counter()
    ahead: deque[torch.cuda.Event] = deque()
    for number in range(1, config.steps + 1):
        each_step()
        step(*(first if number == 1 else next(batches)), controls[number - 1])
        tokens += first[0].numel()
        since += 1
        if where.type == "cuda" and number % AHEAD == 0:
            ahead.append(torch.cuda.Event())
            ahead[-1].record()
            if len(ahead) > 2:
                ahead.popleft().synchronize()
        if number % config.eval_every and number != config.steps:
            continue
        means = step.take_losses() / since  # waits for the GPU
        spent += time.perf_counter() - start
        since = 0
        answers = {name: predict_many(stacked, h, trials, config) for name, h in held.items()}
        for trial, result in enumerate(results):
            if not alive[trial]:
                continue
            loss = float(means[trial])
            metrics: dict[str, float] = {}
            for i, (name, batch) in enumerate(sets.items()) if math.isfinite(loss) else ():
                found = evaluate(batch, answers[name][trial])
                metrics |= found if i == 0 else {f"{name}/{key}": value for key, value in found.items()}
            lr = float(rates[number - 1, trial])
            result.curve.append(Evaluation(number, loss, lr, spent, tokens // trials, metrics))
            result.stopped = _end(result.curve[-1], config, trial, callback)
            if result.stopped or number == config.steps:
                _close(result, sets, {name: answers[name][trial] for name in sets})
                alive[trial] = not result.stopped or not _freeze(controls, number, trial)
                result.stopped = result.stopped or "finished"
        if not any(alive):
            break
        stacked.train()
        start = time.perf_counter()
    unstack(stacked, models)
    for result in results:
        result.engine, result.trials = step.engine, trials
    return results


def _end(evaluation: Evaluation, config: TrainConfig, trial: int, callback: Callback | None) -> str:
    """Why a trial ends with this evaluation, or nothing."""
    if not math.isfinite(evaluation.loss):
        return "diverged"
    if callback is not None and callback(trial, evaluation) is False:
        return "callback"
    if config.target is not None and evaluation.metrics["accuracy"] > config.target:
        return "target"
    if config.max_seconds is not None and evaluation.seconds > config.max_seconds:
        return "time"
    return ""


def _freeze(controls: Tensor, step: int, trial: int) -> bool:
    """Let no further step change this trial's weights."""
    controls[step:, trial] = 0.0
    return True


def _close(result: Result, sets: Mapping[str, Batch], answers: Mapping[str, np.ndarray]) -> None:
    result.recall_by_age = {name: recall_by_age(batch, answers[name]).as_dict() for name, batch in sets.items()}


def _check(models: Sequence[Model], configs: Sequence[TrainConfig]) -> None:
    if not models or len(models) != len(configs):
        raise UserError(f"train_many: {len(models)} models and {len(configs)} configurations\n  cure: one each")

    def shared(config: TrainConfig) -> dict[str, Any]:
        return {k: v for k, v in asdict(config).items() if k not in OWN}

    for config in configs[1:]:
        different = [k for k, v in shared(config).items() if v != shared(configs[0])[k]]
        if different:
            raise UserError(
                f"stacked trials must agree in {', '.join(different)}\n  cure: they may differ in {', '.join(OWN)}"
            )


def _on(batch: Any, device: torch.device) -> Columns:
    if isinstance(batch.inputs, Tensor):  # drawn there
        return batch.inputs.to(device), batch.positions.to(device).long(), batch.targets.to(device).long()
    return (
        _tensor(batch.inputs, device),
        _tensor(batch.positions, device).long(),
        _tensor(batch.targets, device).long(),
    )


def _batches(data: Data, configs: Sequence[TrainConfig], device: torch.device) -> Iterator[Columns]:
    """Endless batches of all trials: one set of examples on the device, gone through in each trial's own order."""
    epoch = 0
    batch = data(0) if callable(data) else data
    orders = [row_orders(c) for c in configs]
    columns = _on(batch, device)
    while True:
        count = len(batch)
        size = min(configs[0].batch_size, count)
        if size == 0:
            raise UserError("train: there are no examples\n  cure: num_examples >= 1")
        rows = torch.from_numpy(np.stack([next_order(count) for next_order in orders])).to(device)
        for start in range(0, count - size + 1, size):
            chosen = rows[:, start : start + size].reshape(-1)
            tokens, positions, targets = columns
            yield tokens[chosen], positions[chosen], targets[chosen]
        epoch += 1
        if callable(data):
            batch = data(epoch)
            columns = _on(batch, device)


@torch.no_grad()
def predict_many(
    stacked: Model, held: tuple[Batch, Tensor, Tensor, Tensor], trials: int, config: TrainConfig
) -> np.ndarray:
    """Every trial's answers to the same questions, int64 ``[S, N, D]``."""
    batch, inputs, positions, _ = held
    stacked.eval()
    rows = max(1, config.eval_batch_size // trials)
    precision = precision_of(config.precision)
    answers = []
    for start in range(0, len(batch), rows):
        part, where = inputs[start : start + rows], positions[start : start + rows]
        with torch.autocast(inputs.device.type, precision, enabled=precision is not None):
            logits = stacked(part.repeat(trials, 1), where.repeat(trials, 1))
        answers.append(logits.argmax(-1).unflatten(0, (trials, -1)).cpu())
    return torch.cat(answers, 1).numpy() if answers else np.empty((trials, *batch.targets.shape), dtype=np.int64)

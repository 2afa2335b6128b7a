"""Training on a task: AdamW, a schedule, logits at the labelled positions only, metrics as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspace.errors import UserError
from dspace.tasks import Batch, evaluate, recall_by_age

Data = Batch | Callable[[int], Batch]
"""Training examples: one batch gone through in epochs, or a function of the epoch that makes fresh ones."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; every random choice follows from ``seed``."""

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-2
    weight_decay: float = 0.1
    """Not applied to numbers per head (rates, biases and parameters of the spec)."""
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    warmup: float = 0.3
    """Part of the steps spent on the way up, one_cycle only."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None leaves it alone."""
    eval_every: int = 100
    eval_batch_size: int = 256
    target: float | None = None
    """Stop when held-out accuracy exceeds this."""
    max_seconds: float | None = None
    shuffle: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What was measured after ``step`` steps; ``metrics`` maps a held-out set's metric to its value."""

    step: int
    loss: float
    """Mean training loss since the evaluation before."""
    lr: float
    seconds: float
    """Time spent training so far, evaluations left out."""
    tokens: int
    metrics: Mapping[str, float]


@dataclass
class Result:
    """Curves and end of a run. ``stopped``: finished, target, diverged, callback or time."""

    curve: list[Evaluation] = field(default_factory=list)
    stopped: str = "finished"
    recall_by_age: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Per held-out set, see :func:`dspace.tasks.recall_by_age`."""
    num_parameters: int = 0
    state_bytes: int = 0
    engine: str = "eager"
    """How a step ran: eager, compile, graph, compile+graph."""
    trials: int = 1
    """Trials that shared each step, and so its time."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation."""
        return dict(self.curve[-1].metrics) if self.curve else {}

    @property
    def steps(self) -> int:
        return self.curve[-1].step if self.curve else 0

    @property
    def seconds(self) -> float:
        return self.curve[-1].seconds if self.curve else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all trials that shared the steps."""
        return self.trials * self.curve[-1].tokens / max(self.seconds, 1e-9) if self.curve else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {
            "curve": [asdict(e) for e in self.curve],
            "metrics": self.metrics,
            "stopped": self.stopped,
            "recall_by_age": self.recall_by_age,
            "num_parameters": self.num_parameters,
            "state_bytes": self.state_bytes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def train(
    model: nn.Module,
    data: Data,
    held_out: Batch | Mapping[str, Batch],
    config: TrainConfig | None = None,
    *,
    callback: Callable[[Evaluation], bool | None] | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Result:
    """Train ``model`` and return its curves.

    ``held_out`` is a batch or several by name; the metrics of the first one go by their own names
    (``accuracy``, ``stability``, ...), those of the others by ``NAME/accuracy``. ``callback`` sees every
    evaluation; returning False stops the run, and what it raises (a pruned trial) goes through.
    ``settings`` are fields of :class:`TrainConfig`, instead of ``config``.
    """
    config = _config(config, settings)
    sets = _sets(held_out)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(where)
    result = Result(
        num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        state_bytes=_state_bytes(model, next(iter(sets.values())).length),
    )
    for evaluation in iterate(model, data, sets, config):
        result.curve.append(evaluation)
        if not math.isfinite(evaluation.loss):
            result.stopped = "diverged"
            break
        if callback is not None and callback(evaluation) is False:
            result.stopped = "callback"
            break
        if config.target is not None and evaluation.metrics["accuracy"] > config.target:
            result.stopped = "target"
            break
        if config.max_seconds is not None and evaluation.seconds > config.max_seconds:
            result.stopped = "time"
            break
    for name, batch in sets.items():
        result.recall_by_age[name] = recall_by_age(batch, predict(model, batch, config)).as_dict()
    return result


def iterate(
    model: nn.Module, data: Data, held_out: Batch | Mapping[str, Batch], config: TrainConfig
) -> Iterator[Evaluation]:
    """Train step by step and yield an evaluation every ``eval_every`` steps and after the last one.

    A run whose loss is not finite ends with that evaluation. The caller may stop at any yield.
    """
    sets = _sets(held_out)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        _groups(model, config.weight_decay), lr=config.lr, betas=config.betas, fused=device.type in ("cpu", "cuda")
    )
    learned = [p for p in model.parameters() if p.requires_grad]
    batches = _batches(data, config, device)
    losses: list[Tensor] = []
    spent, tokens = 0.0, 0
    if device.type == "cpu":
        torch.manual_seed(config.seed)  # dropout
    model.train()
    start = time.perf_counter()
    for step in range(1, config.steps + 1):
        lr = config.lr * schedule(config, step - 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, positions, targets = next(batches)
        with _autocast(device, config):
            logits = model(inputs, positions)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(learned, config.clip)
        optimizer.step()
        losses.append(loss.detach())
        tokens += inputs.numel()
        if step % config.eval_every and step != config.steps:
            continue
        mean = float(torch.stack(losses).mean())
        losses.clear()
        spent += time.perf_counter() - start
        metrics = {} if not math.isfinite(mean) else _measure(model, sets, config)
        yield Evaluation(step, mean, lr, spent, tokens, metrics)
        if not math.isfinite(mean):
            return
        model.train()
        start = time.perf_counter()


def schedule(config: TrainConfig, step: int) -> float:
    """The part of ``lr`` used at ``step`` (from 0): one_cycle rises from 1/25 and falls to almost 0, both as cosines."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / config.steps))
    top = max(1.0, config.warmup * config.steps)
    if step < top:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * step / top))
    return 1e-5 + (1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (step - top) / max(1.0, config.steps - top)))


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, config: TrainConfig | None = None) -> np.ndarray:
    """The model's answer to every question: argmax over the whole vocabulary, int64 ``[N, D]``."""
    config = config or TrainConfig()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    answers = []
    for start in range(0, len(batch), config.eval_batch_size):
        part = batch[start : start + config.eval_batch_size]
        with _autocast(device, config):
            logits = model(_tensor(part.inputs, device), _tensor(part.positions, device))
        answers.append(logits.argmax(-1).cpu())
    model.train(was_training)
    return torch.cat(answers).numpy() if answers else np.empty(batch.targets.shape, dtype=np.int64)


def _measure(model: nn.Module, sets: Mapping[str, Batch], config: TrainConfig) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for i, (name, batch) in enumerate(sets.items()):
        found = evaluate(batch, predict(model, batch, config))
        metrics |= found if i == 0 else {f"{name}/{key}": value for key, value in found.items()}
    return metrics


def _batches(data: Data, config: TrainConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of full size: shuffled anew every epoch; what does not fill a batch waits for the next order."""
    next_order = row_orders(config)
    epoch = 0
    batch = data(0) if callable(data) else data
    while True:
        size = min(config.batch_size, len(batch))
        if size == 0:
            raise UserError("train: there are no examples\n  cure: num_examples >= 1")
        columns = [_tensor(a, device) for a in (batch.inputs, batch.positions, batch.targets)]
        columns[2] = columns[2].long()
        rows = torch.from_numpy(next_order(len(batch))).to(device)
        for start in range(0, len(batch) - size + 1, size):
            chosen = rows[start : start + size]
            yield columns[0][chosen], columns[1][chosen], columns[2][chosen]
        epoch += 1
        batch = data(epoch) if callable(data) else data


def row_orders(config: TrainConfig) -> Callable[[int], np.ndarray]:
    """A function that gives the order of the examples in each epoch, one after the other."""
    rng = np.random.default_rng([config.seed, 0x5EED])
    return lambda count: rng.permutation(count) if config.shuffle else np.arange(count)


def _tensor(array: Any, device: torch.device) -> Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; those marked ``no_weight_decay`` go without."""
    kept: list[Tensor] = []
    free: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (free if getattr(parameter, "no_weight_decay", False) else kept).append(parameter)
    return [{"params": kept, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]


def _autocast(device: torch.device, config: TrainConfig) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _sets(held_out: Batch | Mapping[str, Batch]) -> dict[str, Batch]:
    sets = {held_out.task: held_out} if isinstance(held_out, Batch) else dict(held_out)
    if not sets:
        raise UserError("train: there is no held-out batch\n  cure: make one with another seed than the training data")
    return sets


def _state_bytes(model: Any, length: int) -> int:
    return int(model.state_size(length)) if hasattr(model, "state_size") else 0


def _config(config: TrainConfig | None, settings: dict[str, Any]) -> TrainConfig:
    if config is not None and settings:
        raise UserError("train: give a TrainConfig or its fields, not both")
    known = TrainConfig.__dataclass_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(f"train: there is no setting {', '.join(unknown)}\n  cure: use one of {', '.join(known)}")
    config = config or TrainConfig(**settings)
    if min(config.steps, config.batch_size, config.eval_every, config.eval_batch_size) < 1 or config.lr < 0:
        raise UserError("train: steps, batch_size, eval_every and eval_batch_size must be >= 1, lr >= 0")
    return config

"""The objective of real studies: compose the spec, compile it, train a small model on the task, measure it."""

from __future__ import annotations

import math
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

from dspace.study.trial import Job, Outcome, Pruned, derive_seed


def train_point(job: Job) -> Outcome:
    """Train the job's point once per seed and return the means over the seeds.

    Only the first seed reports its curve and may be pruned. Raises Pruned for a training that diverges and
    UserError for a point that cannot be built.
    """
    (outcome,) = train_points([job])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def train_points(jobs: list[Job]) -> list[Outcome | Exception]:
    """Train points that differ in learning rate, weight decay and seed only, all in one batched step.

    The outcome of each, or what ended it (Pruned); the others go on without it.
    """
    repeats = range(jobs[0].study.budget.seeds_per_point)
    cells = [(job, repeat) for job in jobs for repeat in repeats]
    together = len(cells) if len(jobs) > 1 else _wanted(jobs[0])  # seeds of one point may share steps too
    ended: list[Outcome | Exception] = []
    for first in range(0, len(cells), together):
        ended += _train(cells[first : first + together])
    outcomes = [_means(ended[i * len(repeats) : (i + 1) * len(repeats)]) for i in range(len(jobs))]
    for job, outcome in zip(jobs, outcomes, strict=True):
        cost = job.composer.cost(job.point)
        if cost is not None and isinstance(outcome, Outcome):
            outcome.metrics["gpu_ms"] = cost.gpu_ms
    return outcomes


train_point.composes = True  # type: ignore[attr-defined]
train_point.many = train_points  # type: ignore[attr-defined]


def stack(job: Job) -> int:
    """How many points like this one are to share one batched step."""
    return max(_wanted(job) // job.study.budget.seeds_per_point, 1)


def _wanted(job: Job) -> int:
    wanted = job.point.train.stack
    if wanted != "auto":
        return max(wanted, 1)
    import torch

    if not torch.cuda.is_available():
        return 1
    from dspace.nn.stacked import worth_stacking

    model, task = job.point.model, job.study.task.sizes
    head = model.head_dim or model.hidden_size // model.num_heads
    numbers = (model.num_v_heads or model.num_heads) * head * int(head * model.expand_v)
    return worth_stacking(job.point.train.batch_size, int(task.get("input_seq_len", 64)), numbers)


train_point.stack = stack  # type: ignore[attr-defined]


def _means(runs: list[Outcome | Exception]) -> Outcome | Exception:
    """One outcome out of a point's seeds: means of the numbers, the rest from the first."""
    whole = [r for r in runs if isinstance(r, Outcome)]
    if len(whole) < len(runs):
        return next(r for r in runs if isinstance(r, Exception))
    metrics = {k: _mean([r.metrics[k] for r in whole]) for k in whole[0].metrics}
    test = {k: _mean([r.test[k] for r in whole]) for k in whole[0].test}
    attributes = whole[0].attributes
    if len(whole) > 1:
        attributes["metrics_by_seed"] = [r.metrics for r in whole]
        attributes["test_by_seed"] = [r.test for r in whole]
    return Outcome(metrics, test, attributes, whole[0].files)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _train(cells: list[tuple[Job, int]]) -> list[Outcome | Exception]:
    import torch

    import dspace
    from dspace.nn import Model, TrainConfig, train, train_many
    from dspace.study.data import batches, training_data

    torch.set_num_threads(max(int(os.environ.get("OMP_NUM_THREADS", 0)), 1))
    study, point = cells[0][0].study, cells[0][0].point
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = batches(study, cells[0][0].data)
    spec = point.build()
    source: Any = "softmax" if point.model.mixer == "softmax" else dspace.compile(spec)
    seeds = [derive_seed(job.seed, "repeat", repeat) for job, repeat in cells]
    settings = model_arguments(point, source)
    models = [
        Model(source, vocab_size=data.train.vocab_size, seed=derive_seed(seed, "model"), **settings).to(device)
        for seed in seeds
    ]
    total = point.train.steps
    configs = [
        TrainConfig(
            steps=total,
            batch_size=point.train.batch_size,
            lr=job.point.train.learning_rate,
            weight_decay=job.point.train.weight_decay,
            clip=point.train.clip or None,
            precision=point.train.precision,
            schedule=point.train.schedule,
            target=point.train.target,
            eval_every=max(math.ceil(total / point.train.reports), 1),
            seed=derive_seed(seed, "order"),
        )
        for (job, _), seed in zip(cells, seeds, strict=True)
    ]
    ended: dict[int, Pruned] = {}

    def on_evaluation(trial: int, e: Any) -> bool:
        job, repeat = cells[trial]
        job.check()
        try:
            if repeat == 0 and math.isfinite(e.loss):
                job.report(e.step, total, {"train_loss": e.loss, **_plain(e.metrics)})
        except Pruned as reason:
            ended[trial] = reason
            return False
        return True

    examples = training_data(study, device) if point.train.fresh else data.train
    held_out = {"valid": data.valid, "test": data.test}
    if len(cells) == 1 and device == "cpu":  # the native loops of a CPU serve one model best

        def alone(e: Any) -> bool:
            return on_evaluation(0, e)

        hook = models[0].register_forward_pre_hook(lambda *_: cells[0][0].check())  # Ctrl-C is heard within one step
        results = [train(models[0], examples, held_out, configs[0], callback=alone)]
        hook.remove()
    else:
        results = train_many(
            models, examples, held_out, configs, callback=on_evaluation, each_step=cells[0][0].check, device=device
        )
    return [
        ended[i]
        if i in ended
        else Pruned(f"the training diverged at step {result.steps}")
        if result.stopped == "diverged"
        else _outcome(cells[i][0], spec, models[i], result, data.hash)
        for i, result in enumerate(results)
    ]


def model_arguments(point: Any, source: Any = None) -> dict[str, Any]:
    """Keyword arguments of ``dspace.nn.Model`` for a point; ``source`` is its module, or ``"softmax"``."""
    from dspace.study.space import fitted

    model = point.model
    if model.state_per_head is not None and model.mixer == "spec":
        from dspace.nn.operator import as_operator

        model = fitted(model, as_operator(source).state_axes)
    settings = {k: v for k, v in model.model_dump().items() if v is not None and k not in ("mixer", "state_per_head")}
    if model.mixer == "softmax":
        taken = ("hidden_size", "num_layers", "num_heads", "mlp_ratio", "head_dim", "expand_v", "conv_size")
        settings = {k: v for k, v in settings.items() if k in taken}
    return settings


def _outcome(job: Job, spec: Any, model: Any, result: Any, data_hash: str) -> Outcome:
    final = result.metrics
    own = {k: v for k, v in final.items() if "/" not in k}
    test = {k.split("/", 1)[1]: v for k, v in final.items() if k.startswith("test/")}
    own |= {"state_bytes": float(result.state_bytes), "tokens_per_second": result.tokens_per_second}
    own.setdefault("loss", result.curve[-1].loss)
    attributes = {
        "spec_hash": spec.hash,
        "spec_name": spec.name if job.point.model.mixer == "spec" else job.point.model.mixer,
        "data_hash": data_hash,
        "versions": versions(),
        "parameters": result.num_parameters,
        "recall_by_age": result.recall_by_age.get("test") or result.recall_by_age.get("valid"),
        "steps": result.steps,
        "train_seconds": round(result.seconds, 3),
        "device": str(next(model.parameters()).device.type),
        "engine": result.engine,
        "stacked": result.trials,
    }
    return Outcome(own, test, attributes, _files(job, spec, model))


def _plain(metrics: Any) -> dict[str, float]:
    """Metrics of the set that the search sees."""
    return {k: v for k, v in metrics.items() if "/" not in k}


def _files(job: Job, spec: Any, model: Any) -> dict[str, Path]:
    import torch

    toml, weights = job.scratch / "spec.toml", job.scratch / "weights.pt"
    toml.write_text(spec.to_toml(), encoding="utf-8")
    torch.save({k: v.cpu() for k, v in model.state_dict().items()}, weights)
    return {"spec": toml, "weights": weights}


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What a number depends on besides the study file."""
    from importlib import metadata

    import dspace

    found = {"dspace": dspace.__version__, "python": platform.python_version(), "machine": machine()}
    for package in ("torch", "triton", "numba", "numpy", "optuna"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def machine() -> str:
    """The processor (and GPU) in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    text = f"{cpu}, {os.cpu_count()} cores"
    import torch

    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def _commit() -> str:
    """The commit of this checkout; ``DSPACE_COMMIT`` says it where a copy without its history runs."""
    import subprocess

    if os.environ.get("DSPACE_COMMIT"):
        return os.environ["DSPACE_COMMIT"]

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

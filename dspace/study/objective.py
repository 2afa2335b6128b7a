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
    runs = [_train_once(job, repeat) for repeat in range(job.study.budget.seeds_per_point)]
    metrics = {k: _mean([r.metrics[k] for r in runs]) for k in runs[0].metrics}
    test = {k: _mean([r.test[k] for r in runs]) for k in runs[0].test}
    cost = job.composer.cost(job.point)
    if cost is not None:
        metrics["gpu_ms"] = cost.gpu_ms
    attributes = runs[0].attributes
    if len(runs) > 1:
        attributes["metrics_by_seed"] = [r.metrics for r in runs]
        attributes["test_by_seed"] = [r.test for r in runs]
    return Outcome(metrics, test, attributes, runs[0].files)


train_point.composes = True  # type: ignore[attr-defined]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _train_once(job: Job, repeat: int) -> Outcome:
    import torch

    import dspace
    from dspace.nn import Model, TrainConfig, train
    from dspace.study.data import batches

    torch.set_num_threads(max(int(os.environ.get("OMP_NUM_THREADS", 0)), 1))
    point, seed = job.point, derive_seed(job.seed, "repeat", repeat)
    spec = point.build()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = batches(job.study)
    model = Model(
        dspace.compile(spec),
        vocab_size=data.train.vocab_size,
        seed=derive_seed(seed, "model"),
        **{k: v for k, v in point.model.model_dump().items() if v is not None},
    ).to(device)
    total = point.train.steps
    config = TrainConfig(
        steps=total,
        batch_size=point.train.batch_size,
        lr=point.train.learning_rate,
        weight_decay=point.train.weight_decay,
        clip=point.train.clip,
        precision=point.train.precision,
        schedule=point.train.schedule,
        target=point.train.target,
        eval_every=max(math.ceil(total / point.train.reports), 1),
        seed=derive_seed(seed, "order"),
    )

    def on_evaluation(e: Any) -> None:
        if not math.isfinite(e.loss):
            raise Pruned(f"the training diverged at step {e.step}")
        job.check()
        if repeat == 0:
            job.report(e.step, total, {"train_loss": e.loss, **_plain(e.metrics)})

    hook = model.register_forward_pre_hook(lambda *_: job.check())  # Ctrl-C is heard within one step
    result = train(model, data.train, {"valid": data.valid, "test": data.test}, config, callback=on_evaluation)
    hook.remove()
    if result.stopped == "diverged":
        raise Pruned(f"the training diverged at step {result.steps}")
    final = result.metrics
    own = {k: v for k, v in final.items() if "/" not in k}
    test = {k.split("/", 1)[1]: v for k, v in final.items() if k.startswith("test/")}
    own |= {"state_bytes": float(result.state_bytes), "tokens_per_second": result.tokens_per_second}
    own.setdefault("loss", result.curve[-1].loss)
    attributes = {
        "spec_hash": spec.hash,
        "spec_name": spec.name,
        "data_hash": data.hash,
        "versions": versions(),
        "parameters": result.num_parameters,
        "recall_by_age": result.recall_by_age.get("test") or result.recall_by_age.get("valid"),
        "steps": result.steps,
        "train_seconds": round(result.seconds, 3),
        "device": device,
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
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

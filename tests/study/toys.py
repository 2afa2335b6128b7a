"""Objectives without any training, for tests of the engine: workers import them by name."""

from __future__ import annotations

import os
import time

from dspace.study.trial import Job, Outcome


def _outcome(job: Job) -> Outcome:
    x = float(job.params.get("x", 0.5))
    gain = {"round": 0.2, "flat": 0.0}.get(str(job.params.get("shape")), 0.0)
    accuracy = 1.0 - (x - 0.3) ** 2 - 0.2 + gain
    metrics = {"stability": x, "plasticity": 1.0 - x, "accuracy": accuracy, "state_bytes": 1000.0 * (1 + x)}
    note = job.scratch / "note.txt"
    note.write_text(f"trial {job.number}")
    return Outcome(metrics, {"accuracy": accuracy - 0.01}, {"spec_hash": f"{job.seed:x}"}, {"note": note})


def quick(job: Job) -> Outcome:
    for step in (1, 2, 3):
        job.report(step, 3, {"accuracy": 0.1 * step})
    return _outcome(job)


def held(job: Job) -> Outcome:
    """The first two trials are quick; the others run until they are stopped or killed."""
    while job.number >= 2:
        time.sleep(0.02)
        job.check()
    return quick(job)


def suicidal(job: Job) -> Outcome:
    """The first attempt of trial 1 kills its own worker without warning."""
    marker = os.path.join(os.environ["TOY_FOLDER"], f"died-{job.seed}")
    if job.number == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), 9)
    return quick(job)


def broken(job: Job) -> Outcome:
    raise RuntimeError("the toy is broken")


def full_disk(job: Job) -> Outcome:
    raise OSError(28, "No space left on device", str(job.scratch / "weights.pt"))


def logged(job: Job) -> Outcome:
    """Writes down each attempt, by its seed, in one file that all workers append to; takes about 0.1 s."""
    line = f"{job.seed} {os.getpid()}\n".encode()
    handle = os.open(os.path.join(os.environ["TOY_FOLDER"], "attempts.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, line)
    os.close(handle)
    for step in (1, 2, 3):
        time.sleep(float(os.environ.get("TOY_SECONDS", "0.1")) / 3)
        job.report(step, 3, {"accuracy": 0.1 * step})
    return _outcome(job)


def counted(job: Job) -> Outcome:
    """Composes its point like real training does, and notes which points were asked for."""
    with open(os.path.join(os.environ["TOY_FOLDER"], "evaluated"), "a") as file:
        file.write(f"{job.point.hash} {job.point.build().name}\n")
    time.sleep(0.05)
    return _outcome(job)


counted.composes = True  # type: ignore[attr-defined]


def bare(job: Job) -> Outcome:
    """Leaves no file."""
    for step in (1, 2, 3):
        job.report(step, 3, {"accuracy": 0.1 * step})
    outcome = _outcome(job)
    outcome.files.clear()
    return outcome

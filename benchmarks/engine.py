"""What the engine costs beside the trials: ``PYTHONPATH=benchmarks python benchmarks/engine.py [--storage URL] [--jobs 8]``.

A toy objective of no cost, 1,000 trials, random sampler; wall-clock of the whole run, start of the workers included,
over the number of trials. Every trial is accounted for: none lost, none run twice.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from dspace.study.engine import run
from dspace.study.ledger import open_study
from dspace.study.phase import Phase
from dspace.study.reading import load
from dspace.study.storage import connect, home_of
from dspace.study.trial import Job, Outcome

STUDY = """
name = "{name}"
base = "linear_attention"
[task]
name = "rebinding_mqar"
vocab_size = 66
[budget]
trials = {trials}
[sampler]
kind = "{sampler}"
[axes.x]
low = 0.0
high = 1.0
target = "train.learning_rate"
"""


def toy(job: Job) -> Outcome:
    """Three reports, no work."""
    x = float(job.params["x"])
    for step in (1, 2, 3):
        job.report(step, 3, {"accuracy": x * step})
    return Outcome({"stability": x, "plasticity": 1 - x, "accuracy": x, "state_bytes": 1.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampler", default="random")
    args = parser.parse_args()
    name = f"toy{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.toml"
        path.write_text(STUDY.format(name=name, trials=args.trials, sampler=args.sampler))
        begin = time.perf_counter()
        run(path, args.jobs, objective="engine:toy", storage=args.storage, folder=Path(folder) / name, quiet=True)
        spent = time.perf_counter() - begin
        phase = Phase(load(path))
        trials = open_study(phase, connect(home_of(name, Path(folder) / name, args.storage))).get_trials(deepcopy=False)
    states = Counter(t.state.name for t in trials)
    seeds = Counter(t.user_attrs["seed"] for t in trials if t.state.name == "COMPLETE")
    kind = (args.storage or "journal").split("://")[0]
    processor = sum(os.times()[:4])  # of the engine and its workers; servers are processes of their own
    print(
        f"{kind}: {dict(states)}, {len(seeds)} different seeds, {1e3 * spent / args.trials:.1f} ms a trial, "
        f"{1e3 * processor / args.trials:.1f} ms of processor time beside the servers'"
    )


if __name__ == "__main__":
    main()

"""Training throughput, data included: ``python benchmarks/train_gpu.py [--trials 1 8] [--engine auto] [--json FILE]``.

The setting of MQAR at (L, pairs) = (512, 128): d_model 128, two layers, eight heads of K = 16 and V = 32, vocabulary 8192,
batch 128. Examples lie on the GPU; every step gathers its batch in the trial's own order, computes logits at the
questions, and updates float32 weights. Times are wall-clock between two synchronisations, after compiling. ``--profile``
adds the kernels that take the time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import dspace
from dspace.nn import Model, TrainConfig, stack
from dspace.nn.flat import FlatAdamW
from dspace.nn.many import _batches
from dspace.nn.step import Step, precision_of
from dspace.tasks import get_task


def measure(args: argparse.Namespace, variant: str, trials: int, engine: str) -> dict[str, Any]:
    """One row: set-up time, milliseconds a step, tokens a second of all trials."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    source: Any = "softmax" if variant == "softmax" else dspace.compile(variant)
    sizes = {"hidden_size": args.hidden, "num_heads": args.heads, "head_dim": args.head_dim, "expand_v": 2.0}
    options = {} if variant == "softmax" else {"decay": "small"}
    made = [Model(source, vocab_size=args.vocab, num_layers=2, seed=s, **sizes, **options) for s in range(trials)]
    model = stack([m.to(device) for m in made])
    config = TrainConfig(batch_size=args.batch, lr=3e-3, clip=None, precision=args.precision)
    configs = [TrainConfig(**{**config.__dict__, "seed": s}) for s in range(trials)]
    optimizer = FlatAdamW(model, trials, [c.weight_decay for c in configs], config.clip)
    task = {"vocab_size": args.vocab, "input_seq_len": args.length, "num_kv_pairs": args.pairs}
    data = get_task("mqar").batch(args.examples, seed=0, device=str(device), random_non_queries=False, **task)
    batches = _batches(data, configs, device)
    controls = optimizer.controls(torch.full((args.steps + args.warm, trials), config.lr))
    first = next(batches)
    step = Step(model, optimizer, first, precision_of(config.precision), engine)  # type: ignore[arg-type]

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for i in range(args.warm):
        step(*next(batches), controls[i])
    synchronise()
    setup = time.perf_counter() - begin
    step.take_losses()
    start = time.perf_counter()
    for i in range(args.steps):
        step(*next(batches), controls[args.warm + i])
    queued = time.perf_counter() - start
    synchronise()
    spent = time.perf_counter() - start
    tokens = args.steps * first[0].numel()
    row = {
        "variant": variant,
        "trials": trials,
        "engine": step.engine,
        "ms_per_step": round(1e3 * spent / args.steps, 3),
        "host_ms_per_step": round(1e3 * queued / args.steps, 3),
        "tokens_per_second": round(tokens / spent),
        "minutes_for_60_epochs_of_100k": round(60 * 100_000 * args.length * trials / (tokens / spent) / 60, 2),
        "setup_seconds": round(setup, 1),
        "loss": round(float(step.take_losses().mean()) / args.steps, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
    }
    if args.profile:
        row["profile"] = profile(step, batches, controls[-1], device)
    return row


def profile(step: Step, batches: Any, control: torch.Tensor, device: torch.device) -> list[list[Any]]:
    """The kernels (or operations) that take most of ten steps: name, milliseconds a step."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        for _ in range(10):
            step(*next(batches), control)
        if device.type == "cuda":
            torch.cuda.synchronize()
    rows = []
    for event in seen.key_averages():
        own = getattr(event, "self_device_time_total", 0) if device.type == "cuda" else event.self_cpu_time_total
        rows.append([event.key[:90], round(own / 1e4, 3), event.count // 10])
    return sorted(rows, key=lambda r: -r[1])[:25]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", nargs="+", default=["palimpsa"])
    parser.add_argument("--trials", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--engine", nargs="+", default=["auto"], help="auto, graph, compile, eager")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{name}, torch {torch.__version__}; L={args.length} pairs={args.pairs} batch={args.batch} {args.precision}")
    rows = []
    for variant in args.variant:
        for engine in args.engine:
            for trials in args.trials:
                try:
                    row = measure(args, variant, trials, engine)
                except Exception as error:  # one setting that fails must not hide the others
                    row = {"variant": variant, "trials": trials, "engine": engine, "error": f"{error}"[:500]}
                profiled = row.pop("profile", [])
                print(json.dumps(row), flush=True)
                for what, ms, calls in profiled:
                    print(f"    {ms:9.3f} ms  x{calls:<4} {what}", flush=True)
                rows.append({**row, "profile": profiled} if profiled else row)
                torch._dynamo.reset()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                if args.json is not None:
                    args.json.write_text(
                        json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1)
                    )


if __name__ == "__main__":
    main()

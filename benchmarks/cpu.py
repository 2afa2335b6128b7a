"""Native CPU loops against the token-by-token PyTorch loop, in one run.

    python benchmarks/cpu.py [--json] [--specs ratio,...] [--batch 16 --steps 256 --heads 4 --keys 16 --values 32 --rounds 7]

Times are medians; ``x`` is how many times faster than ``reference_`` the form is in this run. All forms take turns in
short rounds, so that a machine that slows down for a while does so for all of them, and ``x`` is the median of the
rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import dspace


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median after a pause and an untimed call: threads of what ran before keep spinning for some milliseconds."""
    time.sleep(0.02)
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_arguments(table: dict[str, Any], sizes: argparse.Namespace) -> list[torch.Tensor]:
    """Inputs and parameters in their declared domains."""
    shapes = {"": (), "k": (sizes.keys,), "v": (sizes.values,), "kv": (sizes.keys, sizes.values)}
    made = []
    for kind in ("inputs", "parameters"):
        for v in table[kind]:
            lead = (sizes.batch, sizes.steps, sizes.heads) if kind == "inputs" else (sizes.heads,)
            x = torch.randn(*lead, *shapes[v["axes"]])
            if v["axes"] == "k" and v["domain"] == "real":
                x = torch.nn.functional.normalize(x, dim=-1)
            sign = {"nonnegative": 1, "positive": 1, "nonpositive": -0.1, "negative": -0.1}.get(v["domain"])
            x = x if sign is None else sign * (x.abs() + (0.5 if v["domain"] == "positive" else 0))
            made.append((x.sigmoid() if v["domain"] == "unit" else x).requires_grad_())
    return made


def measure(name: str, sizes: argparse.Namespace) -> list[dict[str, Any]]:
    start = time.perf_counter()
    module = dspace.compile(name)
    compiled = time.perf_counter() - start
    arguments = random_arguments(module.SPEC, sizes)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    first = {}
    for form in ("reference", "recurrent", "chunk"):
        function = getattr(module, f"{form}_{module.SPEC['name']}")

        def forward(function: Callable = function) -> Any:
            with torch.no_grad():
                return function(*arguments)

        def both(function: Callable = function) -> Any:
            out = function(*arguments)[0]
            return torch.autograd.grad(out.sum(), arguments, allow_unused=True)

        runs[form, "forward"], runs[form, "both"] = forward, both
        start = time.perf_counter()
        both()
        first[form] = time.perf_counter() - start
        forward()
    rounds = [
        {key: median_seconds(run, 1 if key[0] == "reference" else 7) for key, run in runs.items()}
        for _ in range(sizes.rounds)
    ]
    rows = []
    for form in first:
        row = {
            "spec": module.SPEC["name"],
            "class": module.SPEC["class"],
            "form": form,
            "first_call_s": first[form],
            "compile_s": compiled,
        }
        for part in ("forward", "both"):
            row[f"{part}_ms"] = 1e3 * statistics.median(r[form, part] for r in rounds)
            row[f"{part}_x"] = statistics.median(r["reference", part] / r[form, part] for r in rounds)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--specs", default="palimpsa,simple_gla,gla")
    for option, value in (("batch", 16), ("steps", 256), ("heads", 4), ("keys", 16), ("values", 32), ("rounds", 7)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    sizes = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for name in sizes.specs.split(",") for row in measure(name, sizes)]
    if sizes.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"B={sizes.batch} T={sizes.steps} H={sizes.heads} K={sizes.keys} V={sizes.values} fp32, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    print(
        f"{'spec':16} {'class':6} {'form':10} {'forward ms':>11} {'x':>7} {'fwd+bwd ms':>11} {'x':>7} {'first call s':>13}"
    )
    for r in rows:
        print(
            f"{r['spec']:16} {r['class']:6} {r['form']:10} {r['forward_ms']:11.2f} {r['forward_x']:7.1f} "
            f"{r['both_ms']:11.2f} {r['both_x']:7.1f} {r['first_call_s']:13.2f}"
        )


if __name__ == "__main__":
    main()

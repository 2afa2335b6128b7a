"""Decoding one token on a GPU: the state traffic of ``recurrent_`` beside a device copy, in one run.

    python benchmarks/decode_gpu.py [--json] [--specs gated_delta_net,...] [--batch 64 --heads 16 --size 128]

Every variant is compared with its float64 reference first; no speed is printed for one that disagrees. Traffic is
each state read and written once, inputs and output included. ``share`` is its rate over that of a copy of as many
bytes. Kernel times are of a CUDA graph of many steps, each feeding the next, so that the host does not count; ``call``
is the time of one eager call, host included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

import dspace

SPECS = "simple_gla,gated_delta_net,kda,palimpsa"
BUDGET = 5e-3  # relative RMS error of bfloat16 outputs
STATE_BUDGET = 1e-5


def median_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds between device events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    """``run`` captured once; replaying it costs the device's time only."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_rate(nbytes: int, steps: int) -> float:
    """Bytes a second, read and written, of device copies of ``nbytes / 2`` each, ``steps`` of them in a graph."""
    source = torch.empty(max(nbytes // 8, 1), dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)

    def run() -> None:
        for i in range(steps):
            (target if i % 2 == 0 else source).copy_(source if i % 2 == 0 else target)

    return 2 * source.nbytes * steps / (1e-3 * median_ms(graph_of(run)))


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm().clamp(min=1e-12))


def arguments(table: dict[str, Any], sizes: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of one token with the parameters, and states, in their declared domains."""
    channels = {"": (), "k": (sizes.size,), "v": (sizes.size,), "kv": (sizes.size, sizes.size)}

    def drawn(v: dict[str, Any], *lead: int) -> torch.Tensor:
        x = torch.randn(*lead, *channels[v["axes"]], device="cuda")
        if v["axes"] == "k" and v["domain"] == "real":
            x = torch.nn.functional.normalize(x, dim=-1)
        sign = {"nonnegative": 1.0, "positive": 1.0, "nonpositive": -0.1, "negative": -0.1}.get(v["domain"])
        x = x if sign is None else sign * (x.abs() + (0.5 if v["domain"] == "positive" else 0.0))
        return x.sigmoid() if v["domain"] == "unit" else x

    given = [drawn(v, sizes.batch, 1, sizes.heads).bfloat16() for v in table["inputs"]]
    given += [drawn(p, sizes.heads) for p in table["parameters"]]
    return given, [drawn(s, sizes.batch, sizes.heads) for s in table["states"]]


def measure(name: str, sizes: argparse.Namespace) -> dict[str, Any]:
    module = dspace.compile(name, certify=False)
    spec = module.SPEC
    recurrent = getattr(module, f"recurrent_{spec['name']}")
    reference = getattr(module, f"reference_{spec['name']}")
    given, states = arguments(spec, sizes)

    def step(states: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        o, final = recurrent(*given, initial_state=tuple(states), output_final_state=True)
        return o, [final] if isinstance(final, torch.Tensor) else list(final)

    row: dict[str, Any] = {"name": name, "class": spec["class"]}
    with torch.no_grad():
        o, final = step(states)
        expected, wanted = reference(
            *(x.double() for x in given), initial_state=tuple(s.double() for s in states), output_final_state=True
        )
        wanted = (wanted,) if isinstance(wanted, torch.Tensor) else wanted
        row["error"] = error(o, expected)
        row["state_error"] = max(error(a, b) for a, b in zip(final, wanted, strict=True))
        if not (row["error"] < BUDGET and row["state_error"] < STATE_BUDGET):
            return row | {"wrong": True}
        del expected, wanted

        def run() -> None:
            now = states
            for _ in range(sizes.steps):
                _, now = step(now)

        nbytes = 2 * sum(s.nbytes for s in states) + sum(x.nbytes for x in given) + o.nbytes
        seconds = 1e-3 * median_ms(graph_of(run)) / sizes.steps
        row |= {"megabytes": nbytes / 1e6, "kernel_us": 1e6 * seconds, "gigabytes_per_second": nbytes / seconds / 1e9}
        row["copy_gigabytes_per_second"] = copy_rate(nbytes, sizes.steps) / 1e9
        row["share"] = row["gigabytes_per_second"] / row["copy_gigabytes_per_second"]
        row["call_us"] = 1e3 * median_ms(lambda: step(states))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default=SPECS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="K and V")
    parser.add_argument("--steps", type=int, default=20, help="tokens a graph")
    parser.add_argument("--json", action="store_true")
    sizes = parser.parse_args()
    rows = []
    for name in sizes.specs.split(","):
        rows.append(measure(name, sizes))
        row = rows[-1]
        if sizes.json:
            continue
        if row.get("wrong"):
            print(f"{name:28s} WRONG: output {row['error']:.1e}, state {row['state_error']:.1e}", flush=True)
        else:
            print(
                f"{name:28s} {row['kernel_us']:8.1f} us {row['gigabytes_per_second']:7.0f} GB/s, copy "
                f"{row['copy_gigabytes_per_second']:7.0f} GB/s, share {row['share']:.2f}, call {row['call_us']:7.1f} us, "
                f"error {row['error']:.1e}",
                flush=True,
            )
    if sizes.json:
        print(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

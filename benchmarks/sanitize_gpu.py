"""Errors of the generated kernels over the whole matrix of lengths and head sizes, and how they take bad input.

    python benchmarks/sanitize_gpu.py [--specs simple_gla,gla,...] [--jobs 16] [--json FILE]
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/sanitize_gpu.py --reduced --jobs 1
    ... compute-sanitizer python benchmarks/sanitize_gpu.py --jobs 1 --share FOLDER    (as many of these as there are cores)

T in {1, 63, 64, 65, 1000, 4096}, K and V in {16, 40, 48, 64, 96, 100, 128, 192, 256} (every size of each, in pairs),
float32, bfloat16 and float16; grouped heads, initial and final states, variance, packed sequences, splits with carried
states; outputs and every gradient against the float64 reference, which runs on the CPU. Prints the worst error of each
kind beside its budget (DESIGN.md section 6), then what bad input does. Exits 1 if anything is over budget.

Processes with the same ``--share`` folder share the work: what one has begun, no other does. Their journal is in it;
after a stop go on with a copy of that in a new folder. PyTorch takes every tensor's memory from the driver under
compute-sanitizer, so that what is beside a tensor is nobody's; then no CUDA graph is tried. Without a GPU it runs under
TRITON_INTERPRET=1, to try the script itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from dspace.runtime.budgets import FEW, MATMUL_CLASSES, MOST, ROUNDING, SAMPLES, budget, excused  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = "simple_gla,gla,normalized_linear_attention,palimpsa_folded,palimpsa"
SIZES = (16, 40, 48, 64, 96, 100, 128, 192, 256)
PAIRS = list(
    dict.fromkeys([(k, k) for k in SIZES] + [(k, SIZES[(3 * i + 4) % len(SIZES)]) for i, k in enumerate(SIZES)])
)
LONG = {(16, 16), (48, 48), (64, 64), (128, 128)}
"""Head sizes at which 4096 tokens are tried: the reference takes its time."""
DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = (0, 64, 1, 130, 5, 0)
Found = dict[str, tuple[float, float, str]]
"""Kind -> worst (share of the budget, error, where)."""


def module_of(name: str) -> Any:
    module = importlib.import_module(f"kernels.{name}")
    if DEVICE == "cpu":  # interpreted
        for form in ("chunk", "recurrent"):
            module._CORES["cpu", form] = module._CORES["cuda", form]
    return module


def draw(
    table: dict[str, Any], B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, N: int
) -> list[torch.Tensor]:
    """Inputs, parameters and initial states on the CPU, rounded to what the kernel sees; q and k have half the heads."""
    channels = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    generator = torch.Generator().manual_seed(T * 1000 + K + V)

    def one(v: dict[str, Any], *lead: int) -> torch.Tensor:
        x = torch.randn(*lead, *channels[v["axes"]], generator=generator)
        match v["domain"]:
            case "nonpositive" | "negative":
                return -torch.exp(-6.9 * torch.rand(x.shape, generator=generator))
            case "nonnegative":
                return x.abs()
            case "positive":
                return torch.exp(x / 2)
            case "unit":
                return torch.rand(x.shape, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1) if v["axes"] == "k" else x

    made = [one(v, B, T, max(H // 2, 1) if v["axes"] == "k" else H).to(dtype) for v in table["inputs"]]
    made += [one(p, H) for p in table["parameters"]]
    return made + [0.3 * one({**s, "domain": "nonnegative"}, N, H) for s in table["states"]]


def run(
    function: Callable[..., Any], table: dict[str, Any], leaves: list[torch.Tensor], weights: list[torch.Tensor],
    cu_seqlens: torch.Tensor | None = None, splits: tuple[int, ...] = (),
) -> list[torch.Tensor]:  # fmt: skip
    """Output, variance, final states, and the gradients of ``leaves`` for cotangents ``weights`` (made if empty)."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    inputs, states = len(table["inputs"]), leaves[len(leaves) - len(table["states"]) :]
    parameters = leaves[inputs : len(leaves) - len(table["states"])]
    bounds, state, parts = [0, *splits, leaves[0].shape[1]], tuple(states), []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        *out, state = function(
            *(x[:, start:stop] for x in leaves[:inputs]), *parameters, initial_state=state, output_final_state=True,
            output_variance=table["variance"], cu_seqlens=cu_seqlens,
        )  # fmt: skip
        parts.append(out)
    results = [torch.cat(p, 1) for p in zip(*parts, strict=True)]
    results += [state] if isinstance(state, torch.Tensor) else list(state)
    if not weights:
        generator = torch.Generator().manual_seed(7)
        # Numbers that every dtype has: rounding them changes a gradient that is one number a head by 16%.
        weights += [torch.randn(r.shape, generator=generator).bfloat16().float() for r in results]
    cotangents = [w.to(device=r.device, dtype=r.dtype) for w, r in zip(weights, results, strict=True)]
    found = torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
    return [*results, *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))]


def names(table: dict[str, Any]) -> list[tuple[str, str]]:
    """Quantity and kind of what :func:`run` returns."""
    rows = [("o", "output")] + [("variance", "output")] * table["variance"]
    rows += [(f"state {s['name']}", "output") for s in table["states"]]
    for v in (*table["inputs"], *table["parameters"]):
        rows.append((f"d {v['name']}", "gate gradient" if v["domain"] in ("nonpositive", "negative") else "gradient"))
    return rows + [(f"d state {s['name']}", "gradient") for s in table["states"]]


def error(reference: torch.Tensor, found: torch.Tensor) -> float:
    reference, found = reference.double(), found.detach().double().cpu()
    if reference.numel() == 0:
        return 0.0
    if float((reference - found).abs().max()) <= 1e-6:
        return 0.0
    return float((reference - found).square().mean().sqrt() / (reference.square().mean().sqrt() + 1e-8))


def rounded(
    table: dict[str, Any], leaves: list[torch.Tensor], weights: list[torch.Tensor], sample: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``leaves`` and cotangents in float32; operands of products (no gates, no parameters) rounded once more."""
    generator = torch.Generator().manual_seed(sample)
    eps = torch.finfo(leaves[0].dtype).eps

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.float() * (1 + (torch.rand(x.shape, generator=generator) - 0.5) * eps)

    operands = [v["domain"] not in ("nonpositive", "negative") for v in table["inputs"]]
    operands += [False] * len(table["parameters"]) + [True] * len(table["states"])
    near = [moved(x) if operand else x.float() for x, operand in zip(leaves, operands, strict=True)]
    return near, [moved(w) for w in weights]


def examine(order: tuple[str, int, int, str, bool]) -> tuple[tuple[str, int, int, str, bool], int, Found]:
    """All lengths, packed and split, of one variant at one head size in one dtype."""
    torch.set_num_threads(1)
    name, K, V, dtype, reduced = order
    module = module_of(name)
    table, kind = module.SPEC, getattr(torch, dtype)
    reference, chunk, recurrent = (getattr(module, f"{f}_{name}") for f in ("reference", "chunk", "recurrent"))
    lengths = (1, 65) if reduced else (1, 63, 64, 65, 1000, *([4096] if (K, V) in LONG else []))
    settings: list[tuple[str, int, dict[str, Any]]] = [(f"T{T}", T, {}) for T in lengths]
    packed = (0, 33, 7) if reduced else LENGTHS
    bounds = torch.tensor([0, *torch.tensor(packed).cumsum(0).tolist()])
    settings += [("packed", int(bounds[-1]), {"cu_seqlens": bounds})]
    settings += [("split", 35 if reduced else 140, {"splits": (1, 2, 34) if reduced else (1, 2, 66)})]
    worst: Found = {}
    checks = 0
    for label, T, options in settings:
        sequences = len(packed) if "cu_seqlens" in options else 2 if T < 100 else 1
        leaves = draw(table, 1 if "cu_seqlens" in options else sequences, T, 2, K, V, kind, sequences)
        weights: list[torch.Tensor] = []
        whole = {"cu_seqlens": options["cu_seqlens"]} if "cu_seqlens" in options else {}
        expected = run(reference, table, [x.double() for x in leaves], weights, **whole)
        floors: list[list[torch.Tensor]] = []
        on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        for form, function in (("chunk", chunk), ("recurrent", recurrent)):
            if form == "recurrent" and T > 200:
                continue
            result = run(function, table, [x.to(DEVICE) for x in leaves], list(weights), **on_device)
            for i, ((quantity, sort), want, got) in enumerate(zip(names(table), expected, result, strict=True)):
                accepted = budget(dtype, sort, form, table["class"])  # type: ignore[arg-type]
                wrong = error(want, got) if bool(got.isfinite().all()) else float("inf")
                checks += 1
                if wrong > accepted:
                    # What rounding alone does to the recurrence: terms of a sum, or a few sums, may cancel.
                    for sample in range(len(floors), 1 if dtype == "float32" else SAMPLES + 1):
                        floors.append(run(reference, table, *rounded(table, leaves, weights, sample), **whole))
                    least = max(error(want, floor[i]) for floor in floors)
                    few = want.numel() <= FEW * want.shape[-1]
                    room = excused(least, accepted, few, torch.finfo(kind).eps)
                    accepted = max(accepted, min(ROUNDING * least, MOST) if dtype == "float32" else room)
                where = f"{form} {label} K{K} V{V} {quantity}"
                if sort not in worst or wrong / accepted > worst[sort][0]:
                    worst[sort] = (wrong / accepted, wrong, where)
    return order, checks, worst


def bad_input(name: str) -> list[tuple[str, str]]:
    """What each kind of bad or odd input does: "ok", or what is wrong."""
    module = module_of(name)
    table = module.SPEC
    function = getattr(module, f"chunk_{name}")
    count = len(table["inputs"]) + len(table["parameters"])
    inputs = len(table["inputs"])
    good = [x.to(DEVICE) for x in draw(table, 2, 70, 2, 40, 24, torch.float32, 2)][:count]
    base = function(*good)[0]
    rows: list[tuple[str, str]] = []

    def refused(what: str, *kinds: type[Exception], call: Callable[[], object]) -> None:
        try:
            call()
            rows.append((what, "WRONG: accepted"))
        except kinds as problem:
            rows.append((what, "ok" if name in str(problem) else f"WRONG: {problem}"))
        except Exception as problem:
            rows.append((what, f"WRONG: {type(problem).__name__}: {problem}"[:100]))

    def same(what: str, found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> None:
        off = error(expected.cpu(), found) if found.shape == expected.shape else float("inf")
        rows.append((what, "ok" if off <= limit else f"WRONG: differs by {off:.1e}"))

    refused("shape", ValueError, call=lambda: function(good[0][:, :5], *good[1:]))
    refused("rank", ValueError, call=lambda: function(good[0][0], *good[1:]))
    refused("dtype", TypeError, call=lambda: function(good[0].int(), *good[1:]))
    refused("type", TypeError, call=lambda: function([1.0], *good[1:]))
    if DEVICE == "cuda":
        refused("device", ValueError, call=lambda: function(good[0], good[1].cpu(), *good[2:]))
    one = [x[:1] for x in good[:inputs]] + good[inputs:]
    for bounds in ([0, 50, 40, 70], [0, 30], [5, 70], [0, 90]):
        refused(
            f"cu_seqlens {bounds}", ValueError,
            call=lambda b=bounds: function(*one, cu_seqlens=torch.tensor(b, device=DEVICE)),
        )  # fmt: skip
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in good[:inputs]] + good[inputs:]
    same("not contiguous", function(*odd)[0], base)
    wide = [x[:1].expand(2, *x.shape[1:]) for x in good[:inputs]] + good[inputs:]
    same("expanded", function(*wide)[0][1], function(*(x.contiguous() for x in wide))[0][1])
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in good[:inputs]] + good[inputs:]
    same("not aligned", function(*shifted)[0], base)
    empty = [x[:, :0] for x in good[:inputs]] + good[inputs:]
    o, final = function(*empty, output_final_state=True)
    rows.append(("T = 0", "ok" if o.shape[1] == 0 and final is not None else "WRONG"))
    lengths = torch.tensor([0, 0, 30, 30, 70, 70], device=DEVICE)
    o = function(*one, cu_seqlens=lengths)[0]
    pieces = [function(*(x[:, a:b] for x in one[:inputs]), *one[inputs:])[0] for a, b in ((0, 30), (30, 70))]
    same("empty packed sequences", o, torch.cat(pieces, 1), 1e-4)
    again = function(*one, cu_seqlens=lengths)[0]
    same("the same cu_seqlens again", again, o, 0.0)
    poisoned = [good[0].clone(), *good[1:]]
    poisoned[0][0, 65, 0] = float("nan")
    o = function(*poisoned)[0]
    clean = bool(o[1].isfinite().all() and o[0, :64].isfinite().all())
    rows.append(("NaN in one sequence", "ok" if clean else "WRONG: spreads to others or before its chunk"))
    if torch.cuda.device_count() > 1:
        leaves = [x.to("cuda:1").requires_grad_() for x in good]
        o = function(*leaves)[0]
        o.sum().backward()
        same("a GPU that is not the current one", o, base)
    if table["states"][0]["axes"] == "kv":
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            same("autocast", function(*good)[0], base)
    rows += contract(function, good, inputs, base)
    return rows


def contract(
    function: Callable[..., Any], good: list[torch.Tensor], inputs: int, base: torch.Tensor
) -> list[tuple[str, str]]:
    """torch.compile as one graph without recompilation for another T, and CUDA graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    rows = []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if DEVICE == "cuda" else "aot_eager")
    compiled = torch.compile(lambda *x: function(*x)[0], fullgraph=True, backend=counter, dynamic=None)
    worst = 0.0
    for T in (70, 33, 64, 50, 69):
        leaves = [x[:, :T].contiguous().requires_grad_() for x in good[:inputs]] + good[inputs:]
        o = compiled(*leaves)
        o.square().sum().backward()
        worst = max(worst, error(base[:, :T].detach().cpu(), o))
    # The first length is compiled as it is, the second makes T symbolic; no other one is compiled again.
    verdict = "ok" if worst < 1e-5 and counter.frame_count <= 2 else f"WRONG: {counter.frame_count} graphs, {worst:.1e}"
    rows.append(("torch.compile, five lengths", verdict))
    if DEVICE == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # a graph has memory of its own
        still = [x.clone() for x in good]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(2):
                function(*still)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            o = function(*still)[0]
        still[0].mul_(2)
        graph.replay()
        off = error(function(*still)[0].detach().cpu(), o)
        rows.append(("CUDA graph", "ok" if off < 1e-6 else f"WRONG: {off:.1e}"))
    return rows


Result = tuple[tuple[str, int, int, str, bool], int, Found]


def claimed(folder: Path | None, *what: object) -> bool:
    """Whether this process is to do it: without a folder always, else the first one that asks."""
    if folder is None:
        return True
    try:
        os.close(os.open(folder / "-".join(map(str, what)), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def settled(
    orders: list[Any], jobs: int, journal: Path | None, seconds: float, share: Path | None
) -> tuple[list[Result], int]:
    """Results of ``orders``, those of the journal and new ones, and how many others there are."""
    results: list[Result] = []
    if journal is not None and journal.exists():
        known = [json.loads(line) for line in journal.read_text().splitlines()]
        results = [(tuple(o), n, {k: tuple(w) for k, w in f.items()}) for o, n, f in known if tuple(o) in set(orders)]
    end = time.perf_counter() + seconds
    todo = [o for o in orders if o not in {r[0] for r in results}]

    def keep(result: Result) -> None:
        results.append(result)
        if journal is not None:
            with journal.open("a") as file:
                file.write(json.dumps(result) + "\n")

    if jobs == 1:
        for order in todo:
            if time.perf_counter() < end and claimed(share, *order):
                keep(examine(order))
        return results, len(orders) - len(results)
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(examine, order) for order in todo]
    with contextlib.suppress(concurrent.futures.TimeoutError):
        for future in concurrent.futures.as_completed(futures, timeout=None if seconds == float("inf") else seconds):
            keep(future.result())
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    if len(results) < len(orders):  # what is under way is not waited for
        for worker in workers:
            worker.terminate()
    return results, len(orders) - len(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default=SPECS)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--reduced", action="store_true", help="two lengths, two head sizes, bfloat16: for compute-sanitizer"
    )
    parser.add_argument("--no-matrix", action="store_true", help="bad input only")
    parser.add_argument("--keys", type=int, nargs="+", metavar="K", help="only head sizes with so many key channels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--journal", type=Path, help="keeps what was examined; what is in it is not examined again")
    parser.add_argument(
        "--share", type=Path, metavar="FOLDER", help="share the work with others that have it (--jobs 1)"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing more is begun after these")
    asked = parser.parse_args()
    begin = time.perf_counter()
    if asked.share is not None:
        if asked.jobs != 1:
            parser.error("--share wants --jobs 1: start as many processes as you like")
        asked.share.mkdir(parents=True, exist_ok=True)
        asked.journal = asked.journal or asked.share / "journal"
    specs = asked.specs.split(",")
    pairs = [(16, 16), (40, 100)] if asked.reduced else PAIRS
    if asked.keys:
        pairs = [pair for pair in pairs if pair[0] in asked.keys]
    # Triton's interpreter does not multiply matrices of bfloat16.
    dtypes = ["bfloat16" if DEVICE == "cuda" else "float32"] if asked.reduced else asked.dtypes.split(",")
    orders = [
        (s, k, v, d, asked.reduced) for k, v in sorted(pairs, key=lambda p: -p[0] * p[1]) for s in specs for d in dtypes
    ]
    orders = [] if asked.no_matrix else orders
    results, left = settled(orders, asked.jobs, asked.journal, asked.seconds, asked.share)
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'interpreted'}, torch {torch.__version__}, classes with "
          f"matmul budgets: {', '.join(MATMUL_CLASSES)}; {sum(n for _, n, _ in results)} checks")  # fmt: skip
    rows, failed = [], 0
    for spec in specs:
        for dtype in dtypes:
            kinds: Found = {}
            for (s, _, _, d, _), _, worst in results:
                if (s, d) == (spec, dtype):
                    kinds |= {k: w for k, w in worst.items() if k not in kinds or w[0] > kinds[k][0]}
            for kind, (share, off, where) in kinds.items():
                failed += not share <= 1
                verdict = "ok" if share <= 1 else "OVER"
                rows.append({"spec": spec, "dtype": dtype, "kind": kind, "error": off, "share": share, "where": where})
                print(f"{spec:28} {dtype:9} {kind:14} {off:8.1e}  {share:6.0%} of budget  {verdict:5} {where}")
    for spec in specs:
        if not claimed(asked.share, spec, "input"):
            continue
        for what, verdict in bad_input(spec):
            failed += verdict != "ok"
            rows.append({"spec": spec, "input": what, "verdict": verdict})
            if verdict != "ok":
                print(f"{spec:28} {what}: {verdict}")
        print(
            f"{spec:28} bad input and contract: {sum(r.get('spec') == spec and r.get('verdict') == 'ok' for r in rows)} ok"
        )
    verdict = f"FAILED: {failed}" if failed else "all within budget"
    print(
        f"{verdict}, {left} of {len(orders)} not examined{' here' * (asked.share is not None)}, {time.perf_counter() - begin:.0f} s"
    )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    return 1 if failed or (left and asked.share is None) else 0


if __name__ == "__main__":
    sys.exit(main())

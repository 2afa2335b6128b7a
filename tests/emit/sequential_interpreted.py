"""Run as a program under TRITON_INTERPRET=1: kernels that go token by token against plain float64 evaluation, errors as JSON.

Sequence by sequence, or all chunks at once.

Triton decides when it is imported whether it interprets, hence a process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from cases import RECURRENCES, Identity, analysis_of, build, inputs, load, parameter  # noqa: E402
from draw import arguments, error, gradients  # noqa: E402
from oracle import evaluate  # noqa: E402

from dspace.emit import emit  # noqa: E402
from dspace.emit.triton import segments, sequential  # noqa: E402

MORE = {
    r.name: r
    for r in (
        build(
            "erase_channels",
            inputs(q="k", k="k", v="v", w="k", beta=""),
            (),
            {"S": ("kv", "0", "exp(w)*S + sigmoid(beta)*k*(v - sum_k(exp(w)*S*k))")},
            "scale*sum_k(S*q)",
        ),
        build(  # no state on kv, none that carries v
            "vector_only",
            inputs(q="k", k="k", v="v"),
            (),
            {"z": ("k", "1", "0.9*z + k**2"), "n": ("", "0", "n + sum_k(z*k)")},
            "v*sum_k(z*q) + n",
        ),
        build(  # states that swap, a constant update, an input that nothing reads
            "swap",
            inputs(q="k", k="k", v="v", g=""),
            (),
            {"A": ("kv", "0", "R + v*k"), "R": ("kv", "0", "A"), "c": ("k", "0", "2")},
            "sum_k(A*q*c)",
        ),
        build(  # a ratio that forgets each key channel at its own rate
            "ratio_channels",
            inputs(q="k", k="k", v="v", b="v", w="k"),
            (parameter("I_p", "k"),),
            {"M": ("kv", "0", "exp(w)*M + v*k"), "Ibar": ("kv", "0", "exp(w)*Ibar + b*k**2")},
            "scale*sum_k(q*M/(Ibar + I_p))",
            variance="scale**2*sum_k(q**2/(Ibar + I_p))",
            domains={"Ibar": "nonnegative"},
        ),
        build(  # what chunks make of zeros by matmuls: decays on v, one a head, none; numbers of a head and channels in writes
            "ratio_values",
            inputs(q="k", k="k", v="v", b="v", w="v", n=""),
            (parameter("rate", ""), parameter("a", "k"), parameter("c", "v")),
            {
                "M": ("kv", "0", "exp(w)*M + v*k + n*a*c"),
                "Ibar": ("kv", "0", "exp(-softplus(rate))*Ibar + b*k**2*a"),
                "count": ("kv", "0", "count + n*k"),
            },
            "scale*sum_k(q*M/(Ibar + 1)) + 0.1*sum_k(q*tanh(count))",
            domains={"b": "nonnegative", "a": "positive", "Ibar": "nonnegative"},
        ),
        build(  # decays on every axis, of any sign, and none; writes that are no products; states on every axis
            "composed",
            inputs(q="k", k="k", v="v", w="v", r="kv", g=""),
            (parameter("A", "kv"), parameter("c", "")),
            {
                "S": ("kv", "0", "sigmoid(r)*S + tanh(v*k)*A"),
                "R": ("kv", "A", "exp(w)*R + v*k"),
                "n": ("kv", "0", "n + v*k*r"),
                "z": ("k", "1", "tanh(g)*z + k**2"),
                "m": ("v", "0", "exp(w)*m + v"),
                "e": ("", "c", "exp(g)*e + sum_k(k**2)"),
            },
            "scale*sum_k((S + R + 0.1*n)*q*tanh(z)) + m*tanh(e)",
        ),
    )
}
PACKED = [0, 1, 1, 6]


def module(name: str, folder: Path, blocks: int, form: str) -> ModuleType:
    """The generated module with this section alone; ``blocks`` is the width of a block of v where v may be split.

    In the form "chunk" all chunks run at once, whatever the number of programs: four tokens each, in segments of two; four chunks a window.
    """
    r = (RECURRENCES | MORE)[name]
    section = segments.section if form == "chunk" else sequential.section
    source = emit(Identity(name), analysis_of(r), targets=[section])
    made = load(source, folder / f"{form}_{name}_{blocks}.py")
    usual = made._sequential_config

    def config(K: int, V: int, steps: int, backward: bool) -> tuple[int, int, int]:
        BK, BV, warps = usual(K, V, steps, backward)
        return BK, min(BV, blocks) if made._SEQUENTIAL_SPLITS else BV, warps

    made._sequential_config = config
    if form == "chunk":
        made._SEGMENT, made._SEGMENT_MEMORY, made._segmented = 4, 1, lambda *_: True
        made._exact_tile = made._ends_tile = lambda size: 2
        made._segment_config = lambda K, V: (2, *config(K, V, 4, True)[1:], 2)
        made._outputs_config = lambda K, V: (2, *config(K, V, 4, False)[1:], 3)
    return made


def errors(
    made: ModuleType, name: str, steps: int, batch: int, packed: bool, bf16: bool, form: str
) -> dict[str, float]:
    """Relative error of each result and each gradient."""
    r = (RECURRENCES | MORE)[name]
    steps = PACKED[-1] if packed else steps
    sequences = len(PACKED) - 1 if packed else batch
    dtype = torch.bfloat16 if bf16 else torch.float32
    args = arguments(r, batch=batch, steps=steps, keys=3, values=3, dtype=dtype, sequences=sequences)
    variance = r.variance is not None
    if packed:
        parts = []
        for n, (begin, end) in enumerate(zip(PACKED[:-1], PACKED[1:], strict=True)):
            if begin < end:
                alone = [x[:, begin:end] for x in args[0]], args[1], [s[n : n + 1] for s in args[2]]
                parts.append(evaluate(r, *alone, scale=0.6, variance=variance))
            else:
                empty = [parts[0][i][:, :0] for i in range(2 if variance else 1)]
                parts.append([*empty, *(s[n : n + 1].double() for s in args[2])])
        width = 2 if variance else 1
        expected = [torch.cat([p[i] for p in parts], 1 if i < width else 0) for i in range(len(parts[0]))]
    else:
        expected = evaluate(r, *args, scale=0.6, variance=variance)
    flat = [x for group in args for x in group]
    offsets = torch.tensor(PACKED) if packed else None
    result = [x for x in made._CORES["cuda", form](*flat, 0.6, offsets, variance) if x is not None]
    wanted, found = gradients(expected, flat), gradients(result, flat)
    assert result[0].dtype == dtype and all(g.dtype == x.dtype for g, x in zip(found, flat, strict=True))
    names = ["output", *(["variance"] if variance else []), *(s.name for s in r.states)]
    names += [f"d_{v.name}" for v in (*r.inputs, *r.parameters, *r.states)]
    pairs = zip(names, [*result, *found], [*expected, *wanted], strict=True)
    return {n: error(a, b) for n, a, b in pairs}


def operators(made: ModuleType, form: str) -> dict[str, float]:
    """Schema, fake implementation and autograd registration of the operator; the front door; compilation."""
    args = arguments(RECURRENCES["ratio"], batch=1, steps=2, heads=1, dtype=torch.float32)
    flat = [x for group in args for x in group]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = made._segment_op if form == "chunk" else made._sequential_op
    torch.library.opcheck(operator, (*flat, None, 0.5, True), test_utils=checks)
    made._CORES["cpu", "recurrent"] = made._CORES["cuda", form]
    args = arguments(RECURRENCES["ratio"], steps=3, dtype=torch.float32)
    shared = [x[:, :, :1] for x in args[0][:2]]  # one key head for two value heads
    given = (*shared, *args[0][2:], *args[1])
    o, final = made.recurrent_ratio(*given, output_final_state=True)
    expected, states = made.reference_ratio(*given, output_final_state=True)
    compiled = torch.compile(made.recurrent_ratio, fullgraph=True, backend="aot_eager")(*given)[0]
    doubled = made.recurrent_ratio(*(x.double() for x in given))[0]
    pairs = [(o, expected), *zip(final, states, strict=True), (compiled, expected), (doubled, expected)]
    return {f"call {i}": error(a, b) for i, (a, b) in enumerate(pairs)}


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    modules: dict[tuple[str, int, str], ModuleType] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in json.load(sys.stdin):
            name, blocks, form = key = case["name"], case["blocks"], case["form"]
            try:
                if key not in modules:
                    modules[key] = module(name, Path(folder), blocks, form)
                made = modules[key]
                if case["steps"] == 0:
                    found[case["id"]] = operators(made, form)
                else:
                    how = case["packed"], case["bf16"], form
                    found[case["id"]] = errors(made, name, case["steps"], case["batch"], *how)
            except Exception as problem:  # reported by the test that asked
                traceback.print_exc(limit=-3)
                found[case["id"]] = {f"{type(problem).__name__}: {problem}"[:300]: float("inf")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""Generated Triton of classes a, b and fold: interpreted against float64, compiled for GPUs that are not here."""

from __future__ import annotations

import types

import pytest
import sympy
import torch

import dspace.math
import dspace.spec
from dspace.emit.triton import features, printer
from dspace.errors import CompilerBug
from dspace.runtime import offline
from tests.emit.interpreting import interpreted as run
from tests.emit.names import left_to_a_spec
from tests.emit.triton_interpreted import build, draw

# Two matrix states with different decays, several writes, two reads, a state on v, one without axes.
MANY = """
name = "many"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "", domain = "nonpositive" }
w = { axes = "k", domain = "nonpositive" }
[parameters]
c = { axes = "", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k + tanh(v) * k**2"
[state.R]
axes = "kv"
init = "0"
update = "exp(w) * R + v * softplus(k)"
[state.n]
axes = "v"
init = "0"
update = "exp(g) * n + abs(v)"
[state.z]
axes = ""
init = "0"
update = "exp(g) * z + c"
[readout]
output = "(sum_k(S * q) + sum_k(R * sigmoid(q))) / (1 + n + z)"
"""

# The readout comes before the update, and a state on k is seen then too.
EXCLUSIVE = """
name = "exclusive"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "", domain = "nonpositive" }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k"
[state.z]
axes = "k"
init = "0"
update = "exp(g) * z + k**2"
[readout]
read = "before"
output = "scale * sum_k(S * q / (1 + z))"
"""

# A precision with a decay for each channel: scans in place of products.
CHANNELS = """
name = "channels"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "", domain = "nonnegative" }
w = { axes = "k", domain = "nonpositive" }
[parameters]
u = { axes = "k", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(w) * S + v * k"
[state.y]
axes = "k"
init = "0"
update = "exp(w) * y + b * k**2"
[state.z]
axes = "k"
init = "0"
update = "exp(w) * z + k**2"
[readout]
output = "scale * sum_k(S * q / (u + y + z))"
"""

# Two states on k with products, one of which never forgets, and a parameter for each channel.
SEVERAL = """
name = "several"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "", domain = "nonnegative" }
g = { axes = "", domain = "nonpositive" }
[parameters]
u = { axes = "k", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k"
[state.y]
axes = "k"
init = "0"
update = "exp(g) * y + b * u * k**2"
[state.z]
axes = "k"
init = "0"
update = "z + k**2 + u"
[readout]
output = "scale * sum_k(S * q * y / (u + y + z))"
"""

ODD = {"k": 20, "v": 24}
SHORT = {"_SHORTEST": 32}
WHOLE = {"_PROGRAMS": 1}
"""Segments of 32 tokens, and of whole sequences, whatever the size of the batch."""
# Names that the kernels and their launches use themselves.
NAMED = """
name = "named_fold"
[inputs]
W = "k"
N = "k"
V = "v"
I = { axes = "", domain = "nonnegative" }
next_0 = { axes = "", domain = "nonpositive" }
[parameters]
grid = { axes = "", domain = "positive", init = 1.0 }
[state.B]
axes = "kv"
init = "0"
update = "exp(next_0) * B + V * N"
[state.carry]
axes = "k"
init = "0"
update = "exp(next_0) * carry + I * N**2"
[readout]
output = "scale * sum_k(B * W / (grid + carry))"
"""

# Two precisions and a prior of each channel divide the query; names of the kernel in which they do.
DIVIDED = """
name = "divided"
[inputs]
query = "k"
value = "k"
tile = "v"
key = { axes = "", domain = "nonnegative" }
matrix = { axes = "", domain = "nonpositive" }
[parameters]
out = { axes = "k", domain = "positive", init = 1.0 }
[state.scores]
axes = "kv"
update = "exp(matrix) * scores + tile * value"
[state.S]
axes = "k"
update = "exp(matrix) * S + key * value**2"
[state.decay]
axes = "k"
update = "exp(2 * matrix) * decay + key * value**2"
[readout]
output = "scale * sum_k(scores * query / (out + S + 2 * decay))"
"""

# Two writes to the state that is read: the precision is a vector state with a kernel of its own, in products.
TWICE = """
name = "twice"
[inputs]
q = "k"
k = "k"
v = "v"
w = "v"
g = { axes = "", domain = "nonpositive" }
[parameters]
u = { axes = "k", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k + w * tanh(k)"
[state.y]
axes = "k"
init = "0"
update = "exp(g) * y + k**2"
[readout]
output = "scale * sum_k(S * q / (u + y))"
"""

# A precision that fades by a constant, whose key is a function of an input, whose state shows in the output too.
STEADY = """
name = "steady"
[inputs]
q = "k"
k = "k"
v = "v"
[parameters]
u = { axes = "", domain = "positive", init = 1.0 }
rate = { axes = "", domain = "positive", init = 0.3 }
gain = { axes = "k", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(-rate) * S + v * tanh(k)"
[state.y]
axes = "k"
init = "0"
update = "exp(-0.1) * y + gain * k**2 + rate * k**4"
[readout]
output = "scale * sum_k(S * q / (u + y)) + tanh(sum_k(y)) * scale"
"""

# A start that fades: a state to which no token adds anything.
FADING = """
name = "fading"
[inputs]
q = "k"
g = { axes = "", domain = "nonpositive" }
[parameters]
start = { axes = "kv", init = 0.1 }
[state.S]
axes = "kv"
init = "start"
update = "exp(g) * S"
[readout]
output = "scale * sum_k(S * q)"
"""

CASES = [
    (FADING, 75, ODD, True),
    (TWICE, 75, ODD, True, SHORT),
    (TWICE, 40, {"k": 40, "v": 16}, False, WHOLE),
    (STEADY, 75, ODD, True),
    (STEADY, 34, {"k": 40, "v": 16}, False),
    (NAMED, 20, {"k": 8, "v": 4}, False),
    (DIVIDED, 70, {"k": 48, "v": 40}, False),
    ("simple_gla", 75, ODD, True),
    ("simple_gla", 1, {"k": 16, "v": 40}, False),
    ("gla", 75, ODD, True),
    ("hgrn2", 33, {"k": 40, "v": 16}, False),
    ("rwkv6", 33, ODD, False),
    ("linear_attention", 33, {"k": 48, "v": 96}, False),
    ("retnet", 20, ODD, False),
    ("palimpsa_folded", 75, ODD, True),
    ("palimpsa_folded", 66, {"k": 48, "v": 16}, False),
    ("normalized_linear_attention", 20, ODD, False),
    (MANY, 75, ODD, True),
    (EXCLUSIVE, 75, ODD, True),
    (CHANNELS, 130, {"k": 8, "v": 4}, False, SHORT),
    (CHANNELS, 75, {"k": 8, "v": 4}, False, WHOLE),
    (SEVERAL, 75, ODD, True, SHORT),
    (SEVERAL, 40, {"k": 40, "v": 16}, False, WHOLE),
    ("palimpsa_folded", 34, {"k": 100, "v": 4}, False, SHORT),
    ("palimpsa_folded", 75, ODD, True, SHORT),
    ("palimpsa_folded", 75, {"k": 40, "v": 16}, False, WHOLE),
    ("normalized_linear_attention", 40, ODD, False, SHORT),
]
LEAN = [c for c in CASES if c[0] in ("simple_gla", "gla", "palimpsa_folded", MANY) and c[3] and len(c) == 4]
"""Cases that are run without initial and final states too, and with nothing kept for the backward pass."""
OPERATORS = [(SEVERAL, 40, ODD, False), *(c for c in LEAN if c[0] != MANY)]
"""Cases that go through the custom operators of torch.compile, with their own autograd."""
NAMES = {MANY: "many", EXCLUSIVE: "exclusive", CHANNELS: "channels", SEVERAL: "several", FADING: "fading"}
NAMES |= {NAMED: "named", DIVIDED: "divided", TWICE: "twice", STEADY: "steady"}


def identity(case: tuple) -> str:
    spec, steps, sizes, packed, *settings = case
    setting = "".join(name.lower() for given in settings for name in given)
    return f"{NAMES.get(spec, spec)}-T{steps}-K{sizes['k']}-V{sizes['v']}{'-packed' if packed else ''}{setting}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    fields = ("spec", "steps", "sizes", "packed", "settings")
    asked = [{"id": identity(c), **dict(zip(fields, c, strict=False))} for c in CASES]
    asked += [
        {**a, "id": "extreme", "gates": [0.0, -1e4]} for a in asked if a["spec"] == "palimpsa_folded" and a["packed"]
    ][-1:]
    asked += [
        {**dict(zip(fields, c, strict=False)), "id": f"lean {identity(c)}", "lean": True, "settings": {"_KEPT": -1}}
        for c in LEAN
    ]
    asked += [
        {**dict(zip(fields, c, strict=False)), "id": f"operators {identity(c)}", "operators": True} for c in OPERATORS
    ]
    return run("triton_interpreted.py", asked)


@pytest.mark.parametrize("case", [identity(c) for c in CASES])
def test_outputs_and_every_gradient_match_float64(interpreted: dict[str, dict[str, float]], case: str) -> None:
    worst = {name: error for name, error in interpreted[case].items() if not error < 5e-6}
    assert not worst


@pytest.mark.parametrize("case", [identity(c) for c in LEAN])
def test_states_that_nobody_gives_or_wants(interpreted: dict[str, dict[str, float]], case: str) -> None:
    worst = {name: error for name, error in interpreted[f"lean {case}"].items() if not error < 5e-6}
    assert len(LEAN) == 4 and len(interpreted[f"lean {case}"]) > 3 and not worst


@pytest.mark.parametrize("case", [identity(c) for c in OPERATORS])
def test_operators_and_their_gradients(interpreted: dict[str, dict[str, float]], case: str) -> None:
    worst = {name: error for name, error in interpreted[f"operators {case}"].items() if not error < 5e-6}
    assert len(OPERATORS) == 4 and len(interpreted[f"operators {case}"]) > 5 and not worst


def test_gates_that_keep_all_or_nothing(interpreted: dict[str, dict[str, float]]) -> None:
    """Sums of log decays inside a chunk lose digits to the steps that forget all; nothing worse happens."""
    assert all(error < 1e-4 for error in interpreted["extreme"].values())


def test_a_gradient_of_an_input_used_twice_is_added_in_the_kernel() -> None:
    """Of the key, which the precision sees too, and of the decay that both states have."""
    (launch,) = [x for x in calls("palimpsa_folded", 16, torch.bfloat16) if x.name == "_fold_gradients_kernel"]
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    assert given["d_key"] is given["d_x_k_out"] and given["d_retention"] is given["d_x_g_out"]
    assert given["d_query_out"] is given["d_x_q_out"]  # read by the program that wrote it before it writes there again


def calls(name: str, size: int, dtype: torch.dtype) -> list[offline.Launch]:
    """Every launch of forward and backward of one variant at K = V = size."""
    made = build(name)
    generator = torch.Generator().manual_seed(0)

    def call() -> None:
        batch, steps, heads = 2, 256, 4
        of_size = {"": (), "k": (size,), "v": (size,), "kv": (size, size)}
        tensors = []
        for v in made.SPEC["inputs"]:
            kind = dtype if v["domain"] == "real" and v["axes"] else torch.float32
            tensors.append(draw(v["domain"], (batch, steps, heads, *of_size[v["axes"]]), generator).to(kind))
        tensors += [draw(p["domain"], (heads, *of_size[p["axes"]]), generator) for p in made.SPEC["parameters"]]
        tensors += [torch.zeros(batch, heads, *of_size[s["axes"]]) for s in made.SPEC["states"]]
        tensors = [t.requires_grad_() for t in tensors]
        o, _, *final = made._CORES["cuda", "chunk"](*tensors, 1.0, None, False)
        (o.float().sum() + sum(f.sum() for f in final)).backward()

    return offline.record(made, call)


def test_float32_operands_compile() -> None:
    for launch in calls("simple_gla", 32, torch.float32):
        assert offline.build(launch, "sm_90").spilled <= 512


def test_an_input_used_as_it_is_costs_nothing() -> None:
    made = features.section(dspace.math.analyse(dspace.spec.load("simple_gla")))
    assert made is not None
    core = made.code[made.code.index("def _chunk_triton_core") :]
    assert ".float()" not in core and "exp(" not in core.split("#")[0]


def test_what_only_the_variance_needs_is_made_for_it_only() -> None:
    made = features.section(dspace.math.analyse(dspace.spec.load("palimpsa_folded")))
    assert made is not None
    core = made.code[made.code.index("def _chunk_triton_core") :]
    assert ".float()" not in core[: core.rindex("if want_variance")] and ".float()" in core


def test_other_classes_are_left_to_others() -> None:
    assert features.section(dspace.math.analyse(dspace.spec.load("palimpsa"))) is None


def test_conditional_lines_must_be_known_and_closed() -> None:
    with pytest.raises(CompilerBug):
        printer.specialise("#if nothing\n#endif\n", {})
    with pytest.raises(CompilerBug):
        printer.specialise("#if x\n", {"x": True})


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_and_its_backward_are_one_graph(packed: bool) -> None:
    made = build("palimpsa_folded")
    of_size = {"": (), "k": (16,), "v": (16,), "kv": (16, 16)}
    batch, sequences = (1, 3) if packed else (2, 2)
    tensors = [torch.zeros(batch, 70, 2, *of_size[v["axes"]], requires_grad=True) for v in made.SPEC["inputs"]]
    tensors += [torch.ones(2, *of_size[p["axes"]], requires_grad=True) for p in made.SPEC["parameters"]]
    tensors += [torch.zeros(sequences, 2, *of_size[s["axes"]], requires_grad=True) for s in made.SPEC["states"]]
    offsets = torch.tensor([0, 30, 30, 70]) if packed else None

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        o, variance, *final = made._CORES["cuda", "chunk"](*leaves, 0.5, offsets, True)
        return o.sum() + variance.sum() + sum(f.sum() for f in final)

    with offline.recording(made) as launches:
        torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors).backward()
    assert len({launch.name for launch in launches}) == 7
    assert all(t.grad is not None and t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("exponent", [2, 8, 9, 10, -3, -9, -10])
def test_whole_powers_keep_the_sign_of_their_base(exponent: int) -> None:
    x = sympy.Symbol("x", real=True)
    text, _ = printer.TritonPrinter({"x": "x"}).power(x, sympy.Integer(exponent))
    for value in (-1.3, -0.2, 0.7, *([0.0] if exponent > 0 else [])):
        tl = types.SimpleNamespace(exp=torch.exp, log=torch.log, abs=torch.abs)
        found = eval(text, {"tl": tl, "x": torch.tensor(value, dtype=torch.float64)})
        assert float(found) == pytest.approx(value**exponent, rel=1e-12)


def test_no_name_of_the_folds_functions_is_left_to_a_spec():
    """Its kernels call a spec's variables otherwise than anything else, and the host takes them by position."""
    kernels = {"_fold_states_kernel", "_fold_kernel", "_fold_gradients_kernel"}
    functions, bound = left_to_a_spec("palimpsa_folded", lambda n: n in kernels, frozenset())
    assert functions == 3 and {n for n in bound if n.startswith("x_")} <= {
        f"x_{v}" for v in ("q", "k", "b", "g", "I_p", "Ibar")
    }
    host = {"_fold_forward", "_fold_backward", "_fold"}
    functions, bound = left_to_a_spec("palimpsa_folded", lambda n: n in host, frozenset())
    assert functions == 3 and not {n for n in bound if n.startswith("x_")}


def test_no_name_of_the_vector_kernels_is_left_to_a_spec():
    def chosen(name: str) -> bool:
        return name.startswith("_vector_k_") and name.endswith("kernel")

    functions, free = left_to_a_spec("normalized_linear_attention", chosen, features._LOCAL)
    assert functions == 4 and free <= {"scale"}

"""Generated Triton of class c: interpreted against float64, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import sympy
import torch

import dspace.math
import dspace.spec
from dspace.emit.triton import ratio
from dspace.plan.ratio import ratio_plan
from dspace.runtime import offline
from tests.emit.interpreting import interpreted as run
from tests.emit.names import left_to_a_spec
from tests.emit.ratio_interpreted import build
from tests.emit.triton_interpreted import draw

# Two decays, two writes on one state, nonlinear keys and values, a gate and a per-channel parameter in the body,
# an output that is not one read, and a state that divides without a prior of its own.
MANY = """
name = "many_ratios"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "v", domain = "nonnegative" }
u = { axes = "", domain = "nonnegative" }
g = { axes = "", domain = "nonpositive" }
h = { axes = "", domain = "nonpositive" }
[parameters]
c = { axes = "", domain = "positive", init = 1.0 }
w = { axes = "k", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k + tanh(v) * k**2"
[state.R]
axes = "kv"
init = "0"
update = "exp(2 * h) * R + b * softplus(k)"
[readout]
output = "v * sum_k(S * q / (c + w + R)) + sum_k(sigmoid(q + u) * tanh(S))"
"""

# The readout comes before the update.
EXCLUSIVE = """
name = "exclusive_ratio"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "v", domain = "nonnegative" }
g = { axes = "", domain = "nonpositive" }
[parameters]
c = { axes = "", domain = "positive", init = 1.0 }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + v * k"
[state.R]
axes = "kv"
init = "0"
update = "exp(g) * R + b * k**2"
[readout]
read = "before"
output = "scale * sum_k(S * q / (c + R))"
"""

# A state that never forgets beside one that does.
LASTING = (
    EXCLUSIVE.replace("exclusive_ratio", "lasting_ratio").replace("exp(g) * R", "R").replace('read = "before"\n', "")
)

# Names that the kernels would make of others, or use themselves.
NAMED = """
name = "named_ratio"
[inputs]
key_0 = "k"
full_key_0 = "k"
most = "v"
border = { axes = "v", domain = "nonnegative" }
decay_0 = { axes = "", domain = "nonpositive" }
[parameters]
row = { axes = "", domain = "positive", init = 1.0 }
[state.B]
axes = "kv"
init = "0"
update = "exp(decay_0) * B + most * full_key_0"
[state.zero]
axes = "kv"
init = "0"
update = "exp(decay_0) * zero + border * full_key_0**2"
[readout]
output = "scale * sum_k(B * key_0 / (row + zero))"
"""

# Both states are read with an offset, and nowhere without it: sums of products start from it.
OFFSETS = EXCLUSIVE.replace("exclusive_ratio", "offset_ratio").replace(
    "S * q / (c + R)", "q * tanh(c + S) / (c / 2 + 1 + R)"
)

# A divisor that is its own state, so that it is 0 beyond the last channel.
BARE = """
name = "bare_divisor"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "v", domain = "nonnegative" }
[parameters]
c = { axes = "", domain = "positive", init = 1.0 }
rate = { axes = "", domain = "nonnegative", init = 0.1 }
[state.S]
axes = "kv"
init = "0"
update = "exp(-rate) * S + v * k"
[state.R]
axes = "kv"
init = "c"
update = "exp(-rate) * R + b * k**2"
[readout]
output = "scale * sum_k(S * q / R)"
variance = "scale**2 * sum_k(q**2 / R)"
"""


def case(
    name: str, spec: str, steps: int, k: int, v: int, packed: bool = False, window: int = 0, lean: bool = False
) -> dict:
    return {
        "id": name,
        "spec": spec,
        "steps": steps,
        "sizes": {"k": k, "v": v},
        "packed": packed,
        "window": window,
        "lean": lean,
    }


CASES = [
    case("palimpsa", "palimpsa", 37, 16, 8) | {"gate": -60.0},
    case("one token", "palimpsa", 1, 16, 16),
    case("several slabs and blocks", "palimpsa", 18, 40, 20),
    case("packed in windows", "palimpsa", 75, 5, 4, packed=True, window=32),
    case("windows", "palimpsa", 70, 8, 3, window=32),
    case("lean", "palimpsa", 35, 12, 5, lean=True),
    case("lean, packed in windows", "palimpsa", 75, 5, 4, packed=True, window=32, lean=True),
    case("many", MANY, 35, 12, 5),
    case("many in slabs, packed", MANY, 75, 33, 2, packed=True),
    case("read before", EXCLUSIVE, 40, 12, 5, window=16),
    case("lasting", LASTING, 35, 12, 5),
    case("offsets", OFFSETS, 40, 12, 5, window=16),
    case("named", NAMED, 20, 5, 3),
    case("bare divisor", BARE, 20, 20, 5),
    case("bare divisor, one token", BARE, 1, 16, 3),
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of all cases, from one process under the interpreter."""
    return run("ratio_interpreted.py", CASES)


@pytest.mark.parametrize("name", [c["id"] for c in CASES])
def test_outputs_and_every_gradient_match_float64(interpreted: dict[str, dict[str, float]], name: str) -> None:
    worst = {what: error for what, error in interpreted[name].items() if not error < 1e-5}
    assert not worst


def test_what_forgets_all_has_no_gradient_of_its_decay(interpreted: dict[str, dict[str, float]]) -> None:
    """It is a difference of equal sums, whose rounding in 16 bits would be a thousandth of other gradients."""
    assert interpreted["palimpsa"]["of shut gates"] == 0


def calls(name: str, k: int, v: int, dtype: torch.dtype, fast: bool) -> list[offline.Launch]:
    """Every launch of forward and backward of one variant."""
    made = build(name)
    made.__dict__["_fast"] = lambda tensor: fast
    generator = torch.Generator().manual_seed(0)

    def call() -> None:
        batch, steps, heads = 2, 64, 4
        of_size = {"": (), "k": (k,), "v": (v,), "kv": (k, v)}
        tensors = []
        for x in made.SPEC["inputs"]:
            kind = dtype if x["axes"] else torch.float32
            tensors.append(draw(x["domain"], (batch, steps, heads, *of_size[x["axes"]]), generator).to(kind))
        tensors += [draw(p["domain"], (heads, *of_size[p["axes"]]), generator) for p in made.SPEC["parameters"]]
        tensors += [torch.zeros(batch, heads, *of_size[s["axes"]]) for s in made.SPEC["states"]]
        tensors = [t.requires_grad_() for t in tensors]
        o, _, *final = made._CORES["cuda", "chunk"](*tensors, 1.0, None, False)
        (o.float().sum() + sum(f.sum() for f in final)).backward()

    return offline.record(made, call)


@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_kernel_compiles_without_much_spilling(target: str) -> None:
    size = 48 if target == "sm_90" else 16
    launches = calls("palimpsa", size, size, torch.bfloat16, fast=target.startswith("sm"))
    assert {launch.name for launch in launches} == {
        "_sums_kernel",
        "_states_kernel",
        "_reads_kernel",
        "_local_kernel",
        "_carry_kernel",
        "_settle_kernel",
    }
    for launch in launches:
        built = offline.build(launch, target)
        bound = 512 if built.name == "_local_kernel" else 256
        assert built.spilled <= bound, built


def test_what_the_plan_splits() -> None:
    plan = ratio_plan(dspace.math.analyse(dspace.spec.loads(MANY)))
    assert plan is not None
    assert len(plan.decays) == 2 and {d.expr for d in plan.decays if d.expr.is_Symbol} != set()
    assert [len(s.writes) for s in plan.states] == [2, 1]
    assert plan.output is not None and plan.output_reads == 2
    made = {t.name: t.axes for t in plan.tensors if t.name.startswith("made")}
    assert set(made.values()) == {"k"}  # the gate and the parameter in the bodies


def test_sums_start_from_what_states_are_read_with() -> None:
    def held(text: str) -> int:
        section = ratio.section(dspace.math.analyse(dspace.spec.loads(text)))
        assert section is not None
        return section.code.count(" = _held(")

    assert held(OFFSETS) == 4  # two states in two kernels
    assert held(EXCLUSIVE) == 2
    assert held(EXCLUSIVE.replace("(c + R)", "(c + R) / (2 * c + R)")) == 0  # there is no one number
    assert held(EXCLUSIVE.replace("S * q", "S * R * q")) == 0  # R is read without it too


def test_a_cotangent_is_a_product_of_another() -> None:
    plan = ratio_plan(dspace.math.analyse(dspace.spec.load("palimpsa")))
    assert plan is not None
    code = ratio.section(dspace.math.analyse(dspace.spec.load("palimpsa"))).code  # type: ignore[union-attr]
    local = code[code.index("def _local_kernel") : code.index("def _carry_kernel")]
    body = local[local.index("if not VARIANCE") : local.index("if VARIANCE:", local.index("if not VARIANCE"))]
    assert body.count("_reciprocal(") == 1
    assert body[: body.index("if K %")].count(" * ") <= 6
    assert all(isinstance(b, sympy.Expr) for b in plan.bodies)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_never_change_their_layout(dtype: torch.dtype) -> None:
    """What mma.sync computes depends on which lane holds what: a conversion of layout would be a wrong result."""
    checked = set()
    for launch in calls("palimpsa", 48, 48, dtype, fast=True):
        if launch.name in ("_reads_kernel", "_local_kernel"):
            text = offline.compiled_for(launch, "sm_90").asm["ttgir"]
            assert "mma.sync" in text
            assert "convert_layout" not in text and "local_alloc" not in text
            checked.add(launch.name)
    assert len(checked) == 2


def test_other_classes_and_decays_are_left_to_others() -> None:
    for name in ("gla", "metaplastic_gla", "delta_net"):
        assert ratio.section(dspace.math.analyse(dspace.spec.load(name))) is None


def test_no_name_of_the_emitted_functions_is_left_to_a_spec():
    """What they bind for themselves is reserved, or of a pattern that a spec's names are kept apart from."""
    kernels = {f"_{n}_kernel" for n in ("states", "reads", "local", "carry", "settle")}
    functions, free = left_to_a_spec("palimpsa", lambda n: n in kernels or "_ratio_" in n, ratio._RESERVED)
    assert functions > 8 and free <= {"scale"}

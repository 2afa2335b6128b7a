"""The Triton kernels of every built-in spec: certified under the interpreter, compiled for GPUs that are not here.

And that a certificate means something: mistakes planted in emitted kernels are refused.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from dspace.runtime import offline
from dspace.runtime.analysis import module_text
from dspace.runtime.load import load_file
from dspace.spec import builtin_names
from tests.emit.interpreting import interpreted

GROUPS = 4
"""Processes that share the built-in specs: importing everything takes as long as certifying one."""

STORE = r"((?:tl\.store|_put)\(%s \+ .*?, )(\(.+?\)|\w+(?: \* \(.+?\))?)(\.to\(|, m)"
WRONG_GRADIENT = STORE % r"d(?:v|_v_out\w*)"
WRONG_VARIANCE = STORE % r"(?:read_1_out|variance)\w*"
PLANTED = {
    ("simple_gla", "d v"): WRONG_GRADIENT,
    ("palimpsa", "d v"): WRONG_GRADIENT,
    ("palimpsa", "variance"): WRONG_VARIANCE,
}

SPILLED = {
    "_keys_": 1280,
    "_gradients_": 512,
    "_local_kernel": 1024,
    "_reads_kernel": 256,
    "_states_kernel": 256,
    "_vector_": 256,
}
NARROW = {
    "_local_kernel": 1024,
    "_states_kernel": 256,
    "_vector_": 512,
}
"""Bytes a thread that the largest kernels may spill, the others 64: at K = V = 64, and at 32."""


def certified(orders: list[dict]) -> list[dict]:
    """What ``builtin_interpreted.py`` says of each order, from one process under the interpreter."""
    return interpreted("builtin_interpreted.py", orders)


@pytest.mark.parametrize("group", range(GROUPS))
def test_kernels_of_every_spec_are_certified_under_the_interpreter(group: int) -> None:
    names = builtin_names()[group::GROUPS]
    found = dict(zip(names, certified([{"spec": n} for n in names]), strict=True))
    assert not {n: c["failures"] for n, c in found.items() if not c["passed"]}
    for name, certificate in found.items():
        for form in ("chunk", "recurrent"):
            compared = {q for f, q, _, status in certificate["checks"] if f == form and status == "ok"}
            assert {"o", "d q", "d v", "d initial state 0"} <= compared, (name, form, compared)


def test_mistakes_planted_in_emitted_kernels_are_refused() -> None:
    orders = [{"spec": s, "edits": [[p, r"\g<1>(1.02 * \g<2>)\g<3>", 0]]} for (s, _), p in PLANTED.items()]
    for (name, quantity), certificate in zip(PLANTED, certified(orders), strict=True):
        assert not certificate["passed"], (name, quantity)
        failed = {(form, what): error for form, what, error, status in certificate["checks"] if status == "failed"}
        assert set(failed) == {("chunk", quantity), ("recurrent", quantity)}, (name, certificate["failures"])
        assert all(error == pytest.approx(0.02, rel=0.05) for error in failed.values())


GROWING = """
name = "growing"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "", domain = "real" }
[state.S]
axes = "kv"
init = "0"
update = "exp(g) * S + k * v"
[state.p]
axes = "k"
init = "0"
update = "1.01 * p + k**2"
[readout]
output = "scale * sum_k(S * q / (1 + p))"
"""


def test_states_that_grow_are_right(tmp_path: Path) -> None:
    """Chunk forms know only decays: the kernel for any recurrence takes their place."""
    path = tmp_path / "growing.toml"
    path.write_text(GROWING, encoding="utf-8")
    (certificate,) = certified([{"spec": str(path)}])
    assert certificate["passed"], certificate["failures"]
    assert {"chunk", "recurrent"} <= {form for form, *_ in certificate["checks"]}


def test_gradients_of_an_average_are_right_where_tokens_are_alike() -> None:
    """The query's is a difference of two sums 200 times as large: products of bfloat16 leave nothing of it."""
    order = {"spec": "normalized_linear_attention", "case": "constant", "dtype": "bfloat16"}
    (certificate,) = certified([order])
    assert certificate["passed"], certificate["failures"]
    errors = {what: error for form, what, error, status in certificate["checks"] if form == "chunk" and status == "ok"}
    assert {"o", "d q", "d k", "d v"} <= set(errors) and errors["d q"] < 5e-3


def test_only_outputs_that_divide_by_states_are_float32_all_through(modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        kinds = {launch.options.get("OT") for launch in offline.launches_of(module, K=32, V=32)} - {None}
        wide = {str(kind) for kind in kinds} == {"fp32"}
        assert wide == (name == "normalized_linear_attention"), (name, kinds)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The generated module of every built-in spec."""
    folder, made = tmp_path_factory.mktemp("modules"), {}
    for name in builtin_names():
        path = folder / f"offline_{name}.py"
        path.write_text(module_text(name), encoding="utf-8")
        made[name] = load_file(path, path.stem)
    return made


def launches(modules: dict[str, ModuleType], size: int, target: str) -> list[offline.Launch]:
    """Every distinct kernel launch of every built-in spec, forward and backward, chunk and recurrent.

    For sm_90 also of calls without initial and final states.
    """
    found: dict[str, offline.Launch] = {}
    for module in modules.values():
        for form, carried in (("chunk", True), ("recurrent", True), ("chunk", target != "sm_90")):
            for launch in offline.launches_of(module, form, K=size, V=size, carried=carried, target=target):
                found.setdefault(launch.key, launch)
    return list(found.values())


@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_kernel_of_every_spec_compiles_with_bounded_spills(modules: dict[str, ModuleType], target: str) -> None:
    size, bounds = (64, SPILLED) if target == "sm_90" else (32, NARROW)
    tried = launches(modules, size, target)
    assert len(tried) > 60
    reports = [(launch, offline.build(launch, target)) for launch in tried]
    assert not [b for _, b in reports if b.faults]

    def bound(launch: offline.Launch) -> int:
        if "_gradients_" in launch.name and launch.options.get("PRECISION") in ("tf32x3", "ieee"):
            return 512  # three products of float32 for each
        return max((bytes for part, bytes in bounds.items() if part in launch.name), default=64)

    assert not [b for launch, b in reports if b.spilled > bound(launch)]


def test_no_length_compiles_anything_anew(modules: dict[str, ModuleType]) -> None:
    """T, odd or divisible by 16, and what is counted from it, is no part of what a kernel is compiled for."""
    for name, module in modules.items():
        for form, lengths in (("chunk", (65, 256, 1000, 4096)), ("recurrent", (6, 65, 256, 1000))):
            keys = [{x.key for x in offline.launches_of(module, form, B=1, T=T, K=16, V=16)} for T in lengths]
            assert all(found == keys[0] for found in keys), (name, form)

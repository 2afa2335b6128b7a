"""Triton kernels that go token by token: interpreted against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import RECURRENCES, Identity, analysis_of, build, inputs, load

from dspace.emit import emit
from dspace.emit.triton import section, sequential
from dspace.runtime import offline
from tests.emit.interpreting import interpreted as run


@dataclass(frozen=True)
class Case:
    """``blocks`` is the width of a block of value channels; ``steps`` 0 asks for the operators instead.

    The form is "recurrent", sequence by sequence, or "chunk", all chunks at once.
    """

    name: str
    steps: int
    blocks: int = 2
    batch: int = 1
    packed: bool = False
    bf16: bool = False
    form: str = "recurrent"

    @property
    def id(self) -> str:
        extra = (
            ("-chunks" if self.form == "chunk" else "")
            + ("-packed" if self.packed else "")
            + ("-bf16" if self.bf16 else "")
        )
        return f"{self.name}-T{self.steps}-BV{self.blocks}{extra}"


CASES = [
    *(Case(name, 5) for name in (*sorted(RECURRENCES), "erase_channels", "vector_only", "swap")),
    Case("erase", 1, batch=2),
    Case("ratio", 1, blocks=8),
    Case("normalised", 3, blocks=8, batch=2),
    Case("ratio", 6, packed=True),
    Case("coupled", 6, packed=True),
    Case("bonus_before", 6, packed=True),
    Case("erase", 3, bf16=True),
    Case("ratio", 0, blocks=8),
    *(Case(n, 5, form="chunk") for n in ("scalar_decay", "bonus_before", "normalised", "ratio_channels", "composed")),
    Case("ratio_channels", 19, form="chunk"),
    Case("ratio_values", 11, batch=2, form="chunk"),
    Case("ratio_values", 6, packed=True, form="chunk"),
    Case("ratio_channels", 4, batch=2, blocks=8, form="chunk"),
    Case("composed", 9, batch=2, form="chunk"),
    Case("ratio_channels", 6, packed=True, form="chunk"),
    Case("composed", 6, packed=True, form="chunk"),
    Case("ratio_channels", 3, bf16=True, form="chunk"),
    Case("ratio", 0, blocks=8, form="chunk"),
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    asked = [{**vars(c), "id": c.id} for c in CASES]
    return run("sequential_interpreted.py", asked)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_outputs_and_every_gradient_match_float64(interpreted: dict[str, dict[str, float]], case: Case) -> None:
    budget = 8e-3 if case.bf16 else 2e-6
    assert not {name: error for name, error in interpreted[case.id].items() if not error < budget}


KEY_DECAY = build(
    "erase_key",
    inputs(q="k", k="k", v="v", w="k", beta=""),
    (),
    {"S": ("kv", "0", "exp(w)*S + beta*k*(v - sum_k(exp(w)*S*k))")},
    "scale*sum_k(S*q)",
)


MOMENTS = build(
    "moments",
    inputs(q="k", k="k", v="v"),
    (),
    {
        "m": ("kv", "0", "0.9*m + 0.1*v*k"),
        "s": ("kv", "0", "0.99*s + 0.01*(v*k)**2"),
        "S": ("kv", "0", "S + m/sqrt(s + 0.1)"),
    },
    "sum_k(S*q)",
)
MORE = {r.name: r for r in (KEY_DECAY, MOMENTS)}


def launches(name: str, shape: tuple[int, ...], folder: Path) -> list[offline.Launch]:
    """Forward and backward of one recurrence on bfloat16 inputs of ``(B, T, H, K, V)``."""
    r = MORE[name] if name in MORE else RECURRENCES[name]
    made = load(emit(Identity(name), analysis_of(r), targets=[sequential.section]), folder / f"offline_{name}.py")
    B, T, H, K, V = shape
    of = {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    given = [torch.empty(B, T, H, *of[v.axes], dtype=torch.bfloat16) for v in r.inputs]
    parameters = [torch.empty(H, *of[p.axes]) for p in r.parameters]
    states = [torch.empty(B, H, *of[s.axes]) for s in r.states]
    o = torch.empty(B, T, H, V, dtype=torch.bfloat16)

    def call() -> None:
        made._sequential_forward(*given, *parameters, *states, None, 0.1, r.variance is not None)
        made._sequential_backward(
            *given, *parameters, *states, o, o, *states, None, 0.1, r.variance is not None
        )  # fmt: skip

    return offline.record(made, call)


@pytest.mark.parametrize("target", offline.TARGETS)
def test_kernels_compile_for_every_target_without_spills(target: str, tmp_path: Path) -> None:
    reports = [offline.build(x, target) for x in launches("erase", (4, 512, 8, 32, 32), tmp_path)]
    assert {b.name for b in reports} == {"_sequential_kernel", "_sequential_backward_kernel"}
    assert [b for b in reports if b.spilled > 64] == []


@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_warps_are_a_power_of_two_with_three_states(size: int, tmp_path: Path) -> None:
    found = launches("moments", (1, 20, 1, size, size), tmp_path)
    assert {x.options["num_warps"].bit_count() for x in found} == {1}
    if size == 16:
        assert all(offline.build(x, "sm_90").spilled == 0 for x in found)


def test_one_token_moves_states_in_wide_pieces(tmp_path: Path) -> None:
    """Decoding at batch 64, H = 16, K = V = 128: 16-byte accesses, thousands of programs, registers for six a core."""
    kernel = launches("erase_key", (64, 1, 16, 128, 128), tmp_path)[0]
    assert (kernel.options["BK"], kernel.options["BV"], kernel.options["num_warps"]) == (128, 32, 4)
    assert kernel.options["ONE"]
    report = offline.build(kernel, "sm_90")
    assert report.registers <= 80 and report.spilled == 0
    # Everything is asked for before anything is waited for, and sums over k stay within threads for the most part.
    code = [line for line in offline.disassembly(kernel, "sm_90").splitlines() if "*/" in line]
    loads = [i for i, line in enumerate(code) if " LDG." in line]
    assert loads[-1] < min(i for i, line in enumerate(code) if " BAR." in line)
    assert sum(" LDG.E.128" in line for line in code) == 8 == sum(" STG.E.128" in line for line in code)
    assert sum(" SHFL." in line for line in code) <= 40


def test_every_class_has_a_recurrent_form_and_the_rest_falls_back_to_it(tmp_path: Path) -> None:
    for name in ("erase", "coupled"):
        made = load(
            emit(Identity(name), analysis_of(RECURRENCES[name]), targets=[section.section]), tmp_path / f"{name}.py"
        )
        assert made._CORES["cuda", "chunk"] is made._CORES["cuda", "recurrent"] is made._recurrent_triton_core


def test_values_split_only_where_no_formula_contracts_over_them() -> None:
    assert {name for name, r in RECURRENCES.items() if not sequential.splits(r)} == {"coupled"}


def test_key_channels_are_tiles_of_powers_of_two_without_padding() -> None:
    """Of 48, three of 16; and matmuls make what chunks make of zeros."""
    module = importlib.import_module("kernels.metaplastic_gla")
    assert [module._exact_tile(K) for K in (16, 20, 40, 48, 64, 96, 192, 256)] == [16, 32, 16, 16, 64, 32, 64, 256]
    found = offline.launches_of(module, T=4096, B=1, H=1, K=48, V=40)
    tiles = {x.name: x.options["BK"] for x in found if "BK" in x.options}
    assert tiles["_segment_kernel"] == tiles["_segment_backward_kernel"] == 16
    reports = [offline.build(x, "sm_90") for x in found]
    assert not [b for b in reports if b.faults or b.spilled > 512]
    (ends,) = [x for x in found if x.name == "_ends_kernel"]
    assert "mma" in offline.compiled_for(ends, "sm_90").asm["ptx"]

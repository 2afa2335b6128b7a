"""Compile every Triton kernel of a generated module for GPUs that are not here.

:func:`record` runs a function of the module on CPU tensors with its kernels replaced by recorders, so that
grids, argument types and configurations are those of a real call; :func:`build` compiles the recorded launches
for a target and reads registers, spills and shared memory from the assembler's report.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dspace.runtime import sass

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""What every generated kernel is compiled for in the tests."""


@dataclass(frozen=True)
class Launch:
    """One recorded kernel call."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code, whichever module they come from."""
        return repr((self.kernel.src, _signature(self)))

    def source(self) -> Any:
        """What Triton compiles, with its types and constants, as it makes it of a launch itself."""
        from triton.compiler import ASTSource

        return ASTSource(self.kernel, *_signature(self)[:3])


@dataclass(frozen=True)
class Build:
    """What the assembler reports: registers and spilled bytes a thread, shared bytes a block."""

    name: str
    target: str
    registers: int
    spilled: int
    shared: int
    faults: tuple[str, ...] = ()
    """Instructions that the assembler got wrong, see :mod:`dspace.runtime.sass`."""


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.fn = kernel.fn
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, args, options))

        return launch


@contextlib.contextmanager
def recording(module: ModuleType) -> Iterator[list[Launch]]:
    """Within the block, kernels of ``module`` record their launches and do nothing else."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    _forget(module)
    try:
        for name, kernel in kernels.items():
            if name.endswith("_kernel"):
                setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        _forget(module)


def _forget(module: ModuleType) -> None:
    """Calls that ``module`` recorded to repeat them, with kernels that are not those in use any more."""
    module.__dict__.get("_TAPES", {}).clear()


def record(module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """Launches made by ``call``, one for each distinct kernel and configuration."""
    with recording(module) as launches:
        call()
    distinct: dict = {}
    for launch in launches:
        distinct.setdefault(repr((launch.name, _signature(launch)[:3], launch.options)), launch)
    return list(distinct.values())


@contextlib.contextmanager
def elsewhere(module: ModuleType, target: str = "sm_90") -> Iterator[None]:
    """Within the block, ``module`` runs the forms of a GPU for tensors of the CPU, as if they were on ``target``."""
    cores, nvidia = dict(module._CORES), target.startswith("sm")
    # whether the GPU has an approximate reciprocal, and how float32 is multiplied there
    there = {"_fast": lambda tensor: nvidia, "_EXACT": "tf32x3" if nvidia else "ieee"}
    here = {name: module.__dict__[name] for name in there if name in module.__dict__}
    try:
        for form in ("chunk", "recurrent"):
            module._CORES["cpu", form] = module._CORES["cuda", form]
        _forget(module)
        module.__dict__.update({name: there[name] for name in here})
        yield
    finally:
        module._CORES.update(cores)
        _forget(module)
        module.__dict__.update(here)


def launches_of(
    module: ModuleType,
    form: str = "chunk",
    *,
    B: int = 2,
    T: int = 256,
    H: int = 4,
    K: int = 64,
    V: int = 64,
    dtype: str = "bfloat16",
    variance: bool = False,
    backward: bool = True,
    carried: bool = True,
    target: str = "sm_90",
) -> list[Launch]:
    """Launches of one call of ``form`` with inputs ``[B, T, H, ...]``, and of its backward pass, without a GPU.

    ``carried``: with initial and final states, else without.
    """
    import torch

    table, sizes = module.SPEC, {"": (), "k": (K,), "v": (V,), "kv": (K, V)}
    kind = getattr(torch, dtype)
    inputs = [torch.zeros(B, T, H, *sizes[v["axes"]], dtype=kind) for v in table["inputs"]]
    parameters = [torch.ones(H, *sizes[p["axes"]]) for p in table["parameters"]]
    states = [torch.zeros(B, H, *sizes[s["axes"]]) for s in table["states"]] if carried else []
    leaves = [*inputs, *parameters, *states]
    function = getattr(module, f"{form}_{table['name']}")

    def call(gradients: bool) -> None:
        *results, final = function(
            *inputs,
            *parameters,
            initial_state=states if carried else None,
            output_final_state=carried,
            output_variance=variance,
        )
        results += [final] if isinstance(final, torch.Tensor) else final or ()
        if gradients:
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results], allow_unused=True)

    for leaf in leaves:
        leaf.requires_grad_(backward)
    with elsewhere(module, target):
        launches = record(module, lambda: call(backward))
        if backward:  # kernels of a call that nothing is differentiated in
            with torch.no_grad():
                plain = record(module, lambda: call(False))
            launches += [launch for launch in plain if launch.name not in {other.name for other in launches}]
    return launches


def build(launch: Launch, target: str) -> Build:
    """Compile one launch for ``target`` ("sm_90", "gfx942", ...) and read the assembler's report."""
    compiled = compiled_for(launch, target)
    wrong: tuple[str, ...] = ()
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
        spilled = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[-1])
    else:
        registers, spilled = _resources(compiled.asm["cubin"])
        if target == "sm_90":
            wrong = sass.faults(sass.disassemble(compiled.asm["cubin"]))
    return Build(launch.name, target, registers, spilled, compiled.metadata.shared, wrong)


def compiled_for(launch: Launch, target: str) -> Any:
    """One launch compiled for ``target``, as Triton returns it."""
    import triton
    from triton.backends.compiler import GPUTarget

    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(launch.source(), target=gpu, options=_signature(launch)[3])


def present_target() -> str:
    """The target of this machine's GPU."""
    import torch

    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def disassembly(launch: Launch, target: str) -> str:
    """Machine code of one launch for an NVIDIA target, as text."""
    return sass.disassemble(compiled_for(launch, target).asm["cubin"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack, which holds what was spilled, from a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"REG:(\d+)", report)[-1]), int(re.findall(r"STACK:(\d+)", report)[-1])


def _signature(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any], dict[str, Any]]:
    """Triton's view of a call: type of each argument, constants, alignment, and compile options."""
    import torch

    kernel = launch.kernel
    given = dict(zip((p.name for p in kernel.params), launch.args, strict=False))
    options: dict = {}
    names = {p.name for p in kernel.params}
    for name, value in launch.options.items():
        (given if name in names else options)[name] = value
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[str(value.dtype).removeprefix("torch.")]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes, options


_TYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int32": "i32",
    "int64": "i64",
    "bool": "i1",
}

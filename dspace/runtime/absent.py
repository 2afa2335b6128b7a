"""A GPU that is not here: Triton compiles for it and dispatches to it as always, and its kernels do nothing.

What is left is what a call costs the host, and a record of what would have been launched. Tensors stay on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launched:
    """One launch as the driver gets it: which compiled kernel, on which grid, with which arguments."""

    name: str
    code: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


class AbsentGPU:
    """A driver of Triton for a GPU of the given target (an NVIDIA one, sm_90, by default).

    >>> gpu = AbsentGPU.install()                       # in a process of its own: it stays
    >>> gpu.launched                                    # everything launched since
    """

    def __init__(self, target: Any = None) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = target or GPUTarget("cuda", 90, 32)
        self.launched: list[Launched] = []
        self.recording = True
        self.utils = _Utilities()

    @classmethod
    def install(cls) -> AbsentGPU:
        """Make Triton use such a driver from now on in this process."""
        from triton.runtime import driver

        gpu = cls()
        driver.set_active(gpu)  # type: ignore[arg-type]
        return gpu

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return _Launcher(self, metadata)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


class _Launcher:
    """Between a compiled kernel and the driver, with the parts of Triton's own."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, gpu: AbsentGPU, metadata: Any) -> None:
        self.gpu, self.name, self.code = gpu, metadata.name, metadata.hash

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, *rest[:4], rest[4:])  # metadata twice and hooks, then arguments

    def launch(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        if self.gpu.recording:
            self.gpu.launched.append(Launched(self.name, self.code, (x, y, z), rest[4]))


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads a block at most

    def unload_module(self, module: int) -> None:
        pass  # Triton gives back a kernel that two threads compiled at once

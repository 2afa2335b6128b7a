"""The first call of a module's form on a GPU compiles all of its kernels at once, those of its backward pass too.

Triton compiles a kernel when it is first launched, one after another, which is most of the wait for a first result.
A form of a module that :func:`dspace.compile` hands out is therefore wrapped until its first call: what that call and
its backward pass launch is recorded and compiled together (:mod:`dspace.runtime.ahead`), then the wrapping is gone.
The recording is made in another copy of the module, so that calls of other threads are not recorded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dspace.runtime.cache import Cache, digest
from dspace.runtime.load import load_file

_guard = threading.Lock()


def arm(module: ModuleType, cache: Cache) -> None:
    """Wrap the forms of ``module`` for a GPU, unless they are or were; kernels of another module are its own matter."""
    cores = module._CORES
    if hasattr(module, "_SHARED") or hasattr(module, "_ARMED"):
        return
    module._ARMED = True  # type: ignore[attr-defined]
    for key in [k for k in cores if k[0] == "cuda"]:
        cores[key] = _FirstCall(module, key, cores[key], cache)


def disarm(module: ModuleType) -> None:
    """Forms that were not called yet are as they were before :func:`arm`."""
    module.__dict__.pop("_ARMED", None)
    for key, core in list(module._CORES.items()):
        if isinstance(core, _FirstCall) and core.module is module:
            module._CORES[key] = core.core


class _FirstCall:
    """A core that has not been called yet."""

    def __init__(self, module: ModuleType, key: tuple[str, str], core: Callable[..., Any], cache: Cache) -> None:
        self.module, self.key, self.core, self.cache = module, key, core, cache
        self.lean = getattr(core, "lean", False)

    def __call__(self, *arguments: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return self.core(*arguments)
        with _guard:
            first = self.module._CORES.get(self.key) is self
            if first:
                self.module._CORES[self.key] = self.core
        if first:
            # A thread of its own: hooks on saved tensors, dispatch modes and the like of the caller see nothing of it.
            thread = threading.Thread(target=self._compile, args=(arguments, torch.is_grad_enabled(), _stream()))
            thread.start()
            thread.join()
        return self.core(*arguments)

    def _compile(self, arguments: tuple[Any, ...], gradients: bool, stream: Any) -> None:
        # Whatever goes wrong here goes wrong in earnest in a moment, or does not matter.
        with contextlib.suppress(Exception), stream:
            from dspace.runtime import ahead, offline, versions

            path = Path(str(self.module.__file__))
            libraries = [f"{n}={v}" for n, v in sorted(versions.library_versions().items())]
            kinds = [_kind(x) for x in arguments]
            key = digest("first call", path.name, *self.key, *libraries, versions.device_name("cuda"), *kinds)
            if self.cache.was_called(key):
                return  # the kernels are in Triton's cache
            twin = load_file(path, f"{self.module.SPEC['name']}_recorded")
            twin._TUNED = getattr(self.module, "_TUNED", {})  # type: ignore[attr-defined]
            core = twin._CORES[self.key]
            launches = offline.record(twin, lambda: _both_ways(core, arguments, gradients))
            ahead.compile_launches(launches)
            self.cache.store_called(key)


def _stream() -> contextlib.AbstractContextManager[Any]:
    """The caller's device and stream, which another thread does not have by itself."""
    import torch

    return torch.cuda.stream(torch.cuda.current_stream()) if torch.cuda.is_available() else contextlib.nullcontext()


def _both_ways(core: Callable[..., Any], arguments: tuple[Any, ...], gradients: bool) -> None:
    import torch

    with torch.set_grad_enabled(gradients):
        results = core(*arguments)
    wanted = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    if wanted and leaves:
        torch.autograd.grad(wanted, leaves, [torch.empty_like(r) for r in wanted], allow_unused=True)


def _kind(argument: Any) -> str:
    """What decides which kernels an argument makes necessary: never the number of tokens or sequences."""
    import torch

    if not isinstance(argument, torch.Tensor):
        return type(argument).__name__ if isinstance(argument, float) else repr(argument)
    return f"{argument.dtype} {tuple(argument.shape[2:])} {argument.requires_grad}"

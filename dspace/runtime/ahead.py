"""Compile the kernels of some calls ahead of them, all at once: Triton alone compiles one after another.

The calls are made with every kernel replaced by a recorder, so that nothing runs; what they would have launched is
compiled by forked processes, since half of Triton's work holds the interpreter's lock, and lies in Triton's caches
when the calls are made in earnest.
"""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.runtime.offline import Launch


def compile_calls(
    module: ModuleType,
    calls: Iterable[Callable[[], object]],
    workers: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> int:
    """Compile for this machine's GPU what ``calls`` launch; returns the number of kernels.

    This process calls ``meanwhile`` while others compile, if any do: it is work to do anyway.
    What goes wrong here is a warning: the calls themselves will compile what is missing, and raise what is to be
    raised.
    """
    from dspace.runtime import offline

    try:
        launches: dict[str, Launch] = {}
        for call in calls:
            for launch in offline.record(module, call):
                launches.setdefault(launch.key, launch)
        compile_launches(list(launches.values()), workers, meanwhile)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        warnings.warn(f"kernels were not compiled ahead: {type(error).__name__}: {first[:200]}", stacklevel=2)
        return 0
    return len(launches)


def compile_launches(
    launches: Sequence[Launch], workers: int | None = None, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Compile recorded launches into Triton's caches, by ``workers`` processes (as many as there are cores, at most 16).

    Processes write what they compiled to Triton's cache on disk, from which this one then loads it. What they did not
    compile, for whatever reason, is compiled here in threads, and its errors are raised.
    """
    import triton

    workers = min(workers or _cores(), 16)
    if len(launches) > 2 and workers > 1 and hasattr(os, "fork"):
        compile_in_processes(launches, min(workers, len(launches)), meanwhile=meanwhile)
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)


def compile_in_processes(
    launches: Sequence[Launch], workers: int, limit: float = 300.0, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Compile ``launches`` into Triton's cache on disk by forked processes, which are stopped after ``limit`` seconds."""
    from triton.runtime import driver

    from dspace.runtime.absent import AbsentGPU

    launcher, stand_in = driver.active.launcher_cls, AbsentGPU(driver.active.get_current_target())
    longest_first = sorted(range(len(launches)), key=lambda i: -len(launches[i].kernel.src))
    tickets, fill = os.pipe()  # a read of two bytes takes the next launch, whichever process makes it
    os.write(fill, struct.pack(f"={len(launches)}H", *longest_first))
    os.close(fill)
    children: set[int] = set()
    try:
        for _ in range(workers):
            with warnings.catch_warnings():  # forking beside threads: the children call neither them nor the GPU
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                _work(launches, tickets, stand_in, launcher)
            children.add(child)
        end = time.monotonic() + limit
        meanwhile()
        while children and time.monotonic() < end:
            ended = {child for child in children if _ended(child)}
            children -= ended
            if not ended:
                time.sleep(0.005)
    finally:
        os.close(tickets)
        for child in children:
            with contextlib.suppress(OSError):
                os.kill(child, 9)
                os.waitpid(child, 0)


def _work(launches: Sequence[Launch], tickets: int, stand_in: Any, launcher: Any) -> None:
    """What a forked process does; it never returns. The GPU's driver must not be used after a fork: a stand-in is.

    Some releases of Triton have a launcher for each signature, which a C compiler makes: also for the cache on disk,
    and while the kernel is compiled, where the signature is known before.
    """
    try:
        gc.disable()  # no tensor of the parent is freed here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what cannot be compiled is told once, by the parent
        from triton.runtime import driver  # imported before the fork: here it waits for no lock

        driver.set_active(stand_in)
        while ticket := os.read(tickets, 2):
            launch = launches[struct.unpack("=H", ticket)[0]]
            early = threading.Thread(target=_launcher_early, args=(launch, launcher))
            early.start()
            with contextlib.suppress(Exception):
                compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
                early.join()
                launcher(compiled.src, compiled.metadata)
    finally:
        os._exit(0)


def _launcher_early(launch: Launch, launcher: Any) -> None:
    with contextlib.suppress(Exception):
        launcher(launch.source(), _Unknown())


class _Unknown:
    """Metadata of what is not compiled yet: a launcher only keeps them."""

    def __getattr__(self, name: str) -> None:
        return None


def _ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:  # somebody else waited for it
        return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

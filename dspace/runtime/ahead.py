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

    What the first call launches is compiled while the others are recorded. This process calls ``meanwhile`` while others
    compile: it is work to do anyway.
    What goes wrong here is a warning: the calls themselves will compile what is missing, and raise what is to be
    raised.
    """
    from dspace.runtime import offline

    launches: dict[str, Launch] = {}
    try:
        with _Workers(workers) as pool:
            fresh: list[Launch] = []
            for number, call in enumerate(calls):
                fresh += [x for x in offline.record(module, call) if x.key not in launches]
                launches |= {x.key: x for x in fresh}
                if number == 0 or len(fresh) > 4 * pool.most:
                    pool.share(fresh)
                    fresh = []
            pool.share(fresh)
            meanwhile()
            pool.wait()
        _compile_here(list(launches.values()), pool.most)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        warnings.warn(f"kernels were not compiled ahead: {type(error).__name__}: {first[:200]}", stacklevel=2)
        return 0
    return len(launches)


def compile_launches(launches: Sequence[Launch]) -> None:
    """Compile recorded launches into Triton's caches, by as many processes as there are cores, at most 16."""
    with _Workers() as pool:
        pool.share(launches)
        pool.wait()
    _compile_here(launches, pool.most)


def _compile_here(launches: Sequence[Launch], workers: int) -> None:
    """Load what others wrote to Triton's cache on disk; what they did not, for whatever reason, is compiled in threads.

    Errors of a kernel are raised here.
    """
    import triton

    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)


class _Workers:
    """Forked processes that compile launches into Triton's cache on disk; they end with the block."""

    def __init__(self, most: int | None = None) -> None:
        self.most = min(most or _cores(), 16)
        self.children: set[int] = set()

    def share(self, launches: Sequence[Launch]) -> None:
        """Have ``launches`` compiled by further processes: as many as there are cores left, and half of them at least."""
        from triton.runtime import driver

        from dspace.runtime import warm
        from dspace.runtime.absent import AbsentGPU

        warm.wait()
        if not launches or self.most < 2 or not hasattr(os, "fork"):
            return
        launcher, stand_in = driver.active.launcher_cls, AbsentGPU(driver.active.get_current_target())
        longest_first = sorted(range(len(launches)), key=lambda i: -len(launches[i].kernel.src))
        tickets, fill = os.pipe()  # a read of two bytes takes the next launch, whichever process makes it
        os.write(fill, struct.pack(f"={len(launches)}H", *longest_first))
        os.close(fill)
        self._reap()
        try:
            for _ in range(min(self.most - min(len(self.children), self.most // 2), len(launches))):
                with warnings.catch_warnings():  # forking beside threads: the children call neither them nor the GPU
                    warnings.simplefilter("ignore", DeprecationWarning)
                    child = os.fork()
                if child == 0:
                    _work(launches, tickets, stand_in, launcher)
                self.children.add(child)
        finally:
            os.close(tickets)

    def wait(self, limit: float = 300.0) -> None:
        """Until all of them have ended, ``limit`` seconds at most."""
        end = time.monotonic() + limit
        while self.children and time.monotonic() < end:
            if not self._reap():
                time.sleep(0.005)

    def _reap(self) -> bool:
        ended = {child for child in self.children if _ended(child)}
        self.children -= ended
        return bool(ended)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
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

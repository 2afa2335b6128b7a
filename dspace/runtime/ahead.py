"""Compile the kernels of some calls ahead of them, all at once: Triton alone compiles one after another.

The calls are made with every kernel replaced by a recorder, so that nothing runs; what they would have launched is
compiled by threads, which lets go of the interpreter's lock for most of the time, and lies in Triton's caches when
the calls are made in earnest.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.runtime.cases import Case
    from dspace.runtime.offline import Launch


def compile_calls(module: ModuleType, calls: Iterable[Callable[[], object]], workers: int | None = None) -> int:
    """Compile for this machine's GPU what ``calls`` launch; returns the number of kernels.

    What goes wrong here is a warning: the calls themselves will compile what is missing, and raise what is to be
    raised.
    """
    from dspace.runtime import offline

    try:
        launches: dict[str, Launch] = {}
        for call in calls:
            for launch in offline.record(module, call):
                launches.setdefault(launch.key, launch)
        compile_launches(list(launches.values()), workers)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        warnings.warn(f"kernels were not compiled ahead: {type(error).__name__}: {first[:200]}", stacklevel=2)
        return 0
    return len(launches)


def compile_launches(launches: Sequence[Launch], workers: int | None = None) -> None:
    """Compile recorded launches into Triton's caches, in ``workers`` threads (as many as there are cores)."""
    import triton

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max(1, workers)) as pool, triton.AsyncCompileMode(pool):
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)


def certificate_calls(examiner: Any, runs: Sequence[tuple[Case, str]]) -> list[Callable[[], object]]:
    """The calls of a certificate: every (case, dtype) and form, with and without gradients, with states of zeros."""
    import torch

    from dspace.runtime.certify import FORMS

    def one(case: Case, dtype: str, form: str) -> None:
        arguments = examiner.blank_arguments(case, getattr(torch, dtype))
        with torch.no_grad():
            examiner.call(form, case, arguments)
        results = examiner.call(form, case, arguments)
        outputs = [r for r in results.values() if r.requires_grad]
        if outputs:
            leaves = list(arguments.leaves().values())
            torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs], allow_unused=True)

    forms = [f for f in FORMS if f != "reference"]
    return [functools.partial(one, c, d, f) for c, d in runs if c.shape.T for f in forms]

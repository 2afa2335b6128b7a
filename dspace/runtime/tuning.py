"""Which configuration of a kernel is fastest on this GPU: measured on request, once for all processes and lengths.

A generated module proposes a handful of configurations for each kernel family from the registers and shared memory
that they take, and uses the first. :func:`tune` measures the others and keeps what is faster in the cache folder,
under the GPU and Triton, keyed by family, sizes and dtype, never by T. :mod:`dspace.runtime.tuned` hands a module what
is known.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dspace.errors import UserError
from dspace.runtime import versions
from dspace.runtime.cache import Cache
from dspace.runtime.tuned import apply, record_of

MARGIN = 0.03
"""A configuration replaces the first one if it saves this share of the time: less is noise."""


@dataclass(frozen=True)
class Choice:
    """One key with the configuration in use after tuning, its time in ms, and that of each proposal (None: ruled out)."""

    key: str
    config: Any
    milliseconds: float
    tried: tuple[tuple[Any, float | None], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def tune(
    source: Any,
    *,
    keys: int = 128,
    values: int = 128,
    dtype: str = "bfloat16",
    again: bool = False,
    cache_dir: str | Path | None = None,
) -> list[Choice]:
    """Measure what a variant's module proposes for heads of these sizes on this GPU and keep the choices.

    Keys that were tuned before on this GPU are left as they are unless ``again``. Another process that tunes is
    waited for, and its choices are used. Proposals are ruled out whose machine code is known to be wrong
    (:mod:`dspace.runtime.sass`) or that do not fit the GPU.

    Raises:
        UserError: there is no GPU.
        CertificationError: the module is wrong on this machine.
    """
    import torch

    from dspace.runtime.bench import certify_sizes
    from dspace.runtime.compiler import compile
    from dspace.runtime.sources import as_spec
    from dspace.runtime.timing import calls

    if not torch.cuda.is_available():
        raise UserError("tuning measures kernels, and there is no GPU here\n  cure: run it where the GPU is")
    module = compile(source, cache_dir=cache_dir)
    cache, record = Cache(cache_dir), record_of("cuda")
    found: list[Choice] = []
    with cache.lock(record):
        apply(module, cache)
        for run in calls(module, keys, values, dtype):
            found += tune_call(module, run, milliseconds, () if again else module._TUNED)
        if found:  # what was chosen has not been certified yet
            certify_sizes(as_spec(source), module, "cuda", dtype, keys, values)
        cache.store_tuning(record, cache.tuning(record) | {c.key: c.config for c in found})
    apply(module, cache)
    return found


def write_table(path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Merge the choices of this machine's GPU into a table such as :data:`dspace.runtime.tuned.SHIPPED`."""
    file = Path(path)
    tables = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    name = versions.device_name("cuda")
    tables[name] = dict(sorted((tables.get(name, {}) | Cache(cache_dir).tuning(record_of("cuda"))).items()))
    file.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file


def tune_call(
    module: ModuleType, run: Callable[[], object], measure: Callable[[Callable[[], object]], float], known: Any = ()
) -> list[Choice]:
    """Try every proposal of every key that ``run`` uses and that is not in ``known``, one key at a time."""
    module._CONFIGS.clear()
    run()
    found = []
    for key in list(module._CONFIGS):
        text, proposals = " ".join(map(str, key)), module._PROPOSALS[key]
        if text in known or len(proposals) < 2:
            continue
        times: list[float | None] = []
        for config in proposals:
            module._CONFIGS[key] = config
            times.append(_time(module, run, measure))
        valid = {i: t for i, t in enumerate(times) if t is not None}
        best = min(valid, key=valid.__getitem__, default=0)
        if 0 in valid and valid[best] > (1 - MARGIN) * valid[0]:
            best = 0
        module._CONFIGS[key] = proposals[best]
        if valid:
            found.append(Choice(text, proposals[best], valid[best], tuple(zip(proposals, times, strict=True))))
    return found


def milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """Median time of ``run`` between events of the GPU."""
    import torch

    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _time(
    module: ModuleType, run: Callable[[], object], measure: Callable[[Callable[[], object]], float]
) -> float | None:
    """Time of ``run`` with the configurations now set; None if they must not be used."""
    from dspace.runtime import offline

    try:
        target = offline.present_target()
        if target == "sm_90" and any(offline.build(x, target).faults for x in offline.record(module, run)):
            return None
        return measure(run)
    except Exception as error:  # out of resources, or the compiler failed: not a candidate
        if "illegal" in str(error):
            raise
        return None

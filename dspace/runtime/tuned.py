"""Hand a module the configurations of its kernels that are known to be fastest on this machine's GPU.

The choices of this machine, which :mod:`dspace.runtime.tuning` measured and put into the cache folder, come before
those of the table that dspace ships. This only looks up: no call of a module ever waits for tuning.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from dspace.runtime import versions
from dspace.runtime.cache import Cache, digest

SHIPPED = Path(__file__).with_name("tuned.json")
"""GPU name -> {"family sizes...": configuration}: choices measured for the releases of dspace."""


def apply(module: ModuleType, cache: Cache, device: str = "cuda") -> None:
    """Give ``module`` the choices known for this machine's GPU."""
    if hasattr(module, "_TUNED"):
        known = shipped(device) | cache.tuning(record_of(device))
        module._TUNED.update({key: _tuples(config) for key, config in known.items()})
        module._CONFIGS.clear()


@functools.cache
def shipped(device: str) -> dict[str, Any]:
    """Choices that come with dspace for the GPU behind ``device``; those of its architecture where it was not measured."""
    tables = json.loads(SHIPPED.read_text(encoding="utf-8"))
    name = versions.device_name(device)
    kin = [tables[other] for other in sorted(tables) if other.rpartition("(")[2] == name.rpartition("(")[2]]
    return tables.get(name) or {key: config for table in kin for key, config in table.items()}


def record_of(device: str) -> str:
    """The cache's key of the choices for the GPU behind ``device``: by Triton too, which decides what is fastest."""
    return digest("tuning", versions.device_name(device), versions.library_versions()["triton"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value

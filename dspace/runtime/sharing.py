"""Two spellings of one mathematics share their kernels.

Each spec gets a module of its own, with its names in signatures, messages and formulas. Where the cache holds a module
whose normal form is the same up to names, the new module's cores, the only part that is slow to build, are handed
over to that one, arguments and states in its order: nothing is compiled twice. A module stands alone all the same: if
the other one is gone it uses its own cores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dspace.runtime.analysis import analysis_of
from dspace.runtime.cache import Cache, Entry, digest
from dspace.runtime.load import load_file
from dspace.runtime.versions import emitter_version

if TYPE_CHECKING:
    from dspace.math.canonical import CanonicalForm
    from dspace.spec import Spec


def kernels_for(spec: Spec, form: CanonicalForm, text: str, cache: Cache) -> dict[str, Any] | None:
    """Whose kernels the new module of ``spec`` uses, for its entry in the cache; None for its own.

    The first module of a mathematics is recorded as such. ``arguments`` says for each tensor that the other module's
    core takes which of this module's it is, ``states`` for each state of this module which of the other's it is.
    """
    recurrence = analysis_of(spec).recurrence
    own = [*(v.name for v in (*recurrence.inputs, *recurrence.parameters)), *(s.name for s in recurrence.states)]
    names = (*form.variables, *form.states)
    if len(names) != len(own) or set(names) != set(own):
        return None  # a variable that no formula uses: the canonical form does not order it
    key = digest("mathematics", emitter_version(), form.hash)
    record = cache.mathematics(key)
    if record is None or cache.module(_entry(record)) is None:
        sha = hashlib.sha256(text.encode()).hexdigest()
        # "own" is the order of the module's arguments, the others that of the mathematics.
        told = {"name": spec.name, "spec_hash": spec.hash, "sha256": sha, "own": own}
        cache.store_mathematics(key, {**told, "variables": form.variables, "states": form.states})
        return None
    if record["spec_hash"] == spec.hash:
        return None
    theirs = (*record["variables"], *record["states"])
    mine = dict(zip(theirs, names, strict=True))
    arguments = [own.index(mine[name]) for name in record["own"]]
    count = len(form.states)
    order = [arguments[-count:].index(len(own) - count + i) for i in range(count)] if count else []
    return {**{k: record[k] for k in ("name", "spec_hash", "sha256")}, "arguments": arguments, "states": order}


def _entry(record: dict[str, Any]) -> Entry:
    return Entry(record["name"], record["spec_hash"], record["sha256"])


def loaded(entry: Entry, path: Path, cache: Cache) -> ModuleType:
    """The module of ``entry``, with the kernels of another one of the same mathematics where it has any."""
    module = load_file(path, entry.name)
    shared = entry.kernels
    if shared is None or hasattr(module, "_SHARED"):
        return module
    other = cache.module(_entry(shared))
    if other is None:
        return module
    base = load_file(other, shared["name"])
    cores = {k: _handed(core, shared["arguments"], shared["states"]) for k, core in base._CORES.items()}
    module._CORES.update({k: core for k, core in cores.items() if k in module._CORES})
    module._SHARED = shared["name"]  # type: ignore[attr-defined]
    return module


def _handed(core: Callable[..., Any], arguments: list[int], states: list[int]) -> Callable[..., Any]:
    """``core`` of another module, taking tensors and giving states in this module's order."""

    def handed(*given: Any) -> tuple[Any, ...]:
        *tensors, scale, offsets, want_variance = given
        o, variance, *final = core(*(tensors[i] for i in arguments), scale, offsets, want_variance)
        return (o, variance, *(final[i] for i in states))

    return handed

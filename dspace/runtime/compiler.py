"""From a spec to an imported module: compiled once, cached by content, certified once per machine."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from dspace.errors import CertificationError
from dspace.runtime import first, sharing, sources, tuned, warm
from dspace.runtime.analysis import analysis_of, module_text
from dspace.runtime.cache import Cache, Entry
from dspace.runtime.certificate import Certificate, certificate_key, refusal

_memory: dict[tuple[str, str], tuple[Entry, ModuleType]] = {}
_trusted: set[str] = set()
_guard = threading.RLock()


def compile(source: Any, *, certify: bool = True, cache_dir: str | Path | None = None) -> ModuleType:
    """The module of a variant: ``chunk_NAME``, ``recurrent_NAME``, ``reference_NAME``, ``SPEC``.

    The first use of a variant on a machine runs a short certificate (seconds); later uses read its result.

    Args:
        source: path of a spec file, name of a built-in spec, or a ``dspace.spec.Spec``.
        certify: refuse a module that disagrees with the float64 oracle here. With False the module is handed out
            unchecked; its ``reference_NAME`` is plain PyTorch and does not depend on any kernel.
        cache_dir: cache folder; ``$DSPACE_CACHE`` or the user's cache folder by default.

    Raises:
        SpecError: the spec cannot be compiled.
        CertificationError: the module failed its certificate; the message names the first checks that failed.
        UserError: neither the cache folder nor a temporary one can be written.
    """
    cache = Cache(cache_dir)
    with _guard:
        if default_device() == "cuda":
            warm.start()
        entry, module = _module(source, cache)
        if certify:
            _certify(source, entry, module, cache)
        if default_device() == "cuda":
            first.arm(module, cache)
        return module


def _module(source: Any, cache: Cache) -> tuple[Entry, ModuleType]:
    key = sources.raw_key(source)
    memory = (str(cache.folder), key or "")
    if key is not None and memory in _memory:
        return _memory[memory]
    found = _lookup(cache, key) or _build(source, cache, key)
    entry, path = found
    result = (entry, sharing.loaded(entry, path, cache))
    if default_device() == "cuda":
        tuned.apply(result[1], cache)
    if key is not None:
        _memory[memory] = result
    return result


def _lookup(cache: Cache, key: str | None) -> tuple[Entry, Path] | None:
    entry = cache.entry(key) if key is not None else None
    path = cache.module(entry) if entry is not None else None
    return (entry, path) if entry is not None and path is not None else None


def _build(source: Any, cache: Cache, key: str | None) -> tuple[Entry, Path]:
    """Compile ``source`` into the cache, unless another process did so while this one waited."""
    from dspace.math.canonical import canonical_form

    spec = sources.as_spec(source)
    own = sources.spec_key(spec.hash)
    with cache.lock(own):
        keys = [own] if key is None else list({own, key})
        found = _lookup(cache, own)
        if found is not None:
            entry, text = found[0], found[1].read_text(encoding="utf-8")
            return cache.store_module(spec.name, spec.hash, text, keys, entry.kernels) if key != own else found
        text = module_text(spec)
        form = canonical_form(analysis_of(spec).recurrence)
        return cache.store_module(spec.name, spec.hash, text, keys, sharing.kernels_for(spec, form, text, cache))


def compile_entry(source: Any, cache_dir: str | Path | None = None) -> tuple[Entry, ModuleType]:
    """The uncertified module of a variant and its entry in the cache."""
    with _guard:
        return _module(source, Cache(cache_dir))


def default_device() -> str:
    """The device that :func:`compile` certifies: "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _certify(source: Any, entry: Entry, module: ModuleType, cache: Cache) -> None:
    device = default_device()
    key = certificate_key(entry, device, quick=True)
    if key in _trusted:
        return
    known = cache.certificate(key)
    if known is None or not known["passed"]:
        with cache.lock(key):
            known = cache.certificate(key)
            if known is None or not known["passed"]:
                first.disarm(module)
                certificate = _run_certificate(source, module, device)
                cache.store_certificate(key, certificate.as_dict())
                if not certificate.passed:
                    raise CertificationError(refusal(certificate))
    _trusted.add(key)


def _run_certificate(source: Any, module: ModuleType, device: str) -> Certificate:
    from dspace.runtime.certify import certify_module

    return certify_module(sources.as_spec(source), module, device=device, quick=True)

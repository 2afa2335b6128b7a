"""A certificate on request: compile a variant, certify its module as thoroughly as asked, keep what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dspace.runtime.cache import Cache
from dspace.runtime.certificate import Certificate, certificate_key
from dspace.runtime.certify import certify_module
from dspace.runtime.compiler import compile_entry
from dspace.runtime.sources import as_spec


def verify(
    source: Any,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
    *,
    seed: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Certify the module of a variant on this machine and store the certificate in the cache.

    Args:
        source: path of a spec file, name of a built-in spec, or a Spec.
        device: "cpu" or "cuda".
        dtypes: names such as "float32"; :data:`dspace.runtime.certify.DTYPES` by default.
        quick: a few seconds instead of the whole matrix.
        seed: of the inputs; fresh ones each time by default (the certificate names it).
        cache_dir: cache folder, see :func:`dspace.compile`.
        progress: called with a line of text before each case.

    Raises:
        UserError: no such device or dtype here.
        SpecError: the spec cannot be compiled.
    """
    spec = as_spec(source)
    entry, module = compile_entry(spec, cache_dir)
    certificate = certify_module(spec, module, device=device, dtypes=dtypes, quick=quick, seed=seed, progress=progress)
    if dtypes is None:  # a certificate of fewer dtypes must not stand for all of them
        Cache(cache_dir).store_certificate(certificate_key(entry, device, quick), certificate.as_dict())
    return certificate

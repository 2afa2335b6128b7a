"""Import a generated module from its text or its file, under a name of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dspace.errors import CompilerBug

PREFIX = "dspace_generated_"
"""Start of the import names of generated modules."""


def load_file(path: Path, name: str) -> ModuleType:
    """Import the file ``path`` as ``dspace_generated_NAME_HASH``; the same file gives the same module object.

    The name is unique by the file's content, so that two versions of a variant live side by side in one process,
    and it is registered in ``sys.modules``, where pickle, inspect, Numba and Triton look for it.
    """
    tag = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    full = f"{PREFIX}{name}_{tag}"
    known = sys.modules.get(full)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    specification = importlib.util.spec_from_file_location(full, path)
    if specification is None or specification.loader is None:
        raise CompilerBug(f"cannot import the generated module {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[full] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(full, None)
        raise
    return module

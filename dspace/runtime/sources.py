"""What a user may name a variant by, and the raw bytes that decide it, found without SymPy.

``dspace.spec`` reads and checks a spec in full; this file only finds the files that a spec consists of (its own
and those that it extends), so that an unchanged one is recognised in a few milliseconds.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspace.runtime.cache import digest
from dspace.runtime.versions import emitter_version
from dspace.spec.library import find_builtin

if TYPE_CHECKING:
    from dspace.spec import Spec


def as_spec(source: Any) -> Spec:
    """``source`` as a Spec: itself if it is one, else what ``dspace.spec.load`` makes of the path or name."""
    from dspace import spec

    return source if hasattr(source, "hash") and hasattr(source, "to_toml") else spec.load(source)


def raw_key(source: Any) -> str | None:
    """A key of the compiled form of ``source`` from raw bytes alone, or None where that cannot be told.

    A Spec is keyed by its content hash; a file or built-in name by the bytes of every file that it consists of.
    """
    if hasattr(source, "hash") and hasattr(source, "to_toml"):
        return spec_key(source.hash)
    files = files_of(source)
    if files is None:
        return None
    return digest("files", emitter_version(), *(part for path, data in files for part in (path.name, data)))


def spec_key(spec_hash: str) -> str:
    """The key of the compiled form of a spec with this content hash."""
    return digest("spec", emitter_version(), spec_hash)


def files_of(source: str | Path) -> list[tuple[Path, bytes]] | None:
    """The file of ``source`` and of everything that it extends, with their bytes; None if one is not found."""
    files: list[tuple[Path, bytes]] = []
    path = _named(source)
    while path is not None:
        try:
            data = path.read_bytes()
            base = tomllib.loads(data.decode("utf-8-sig")).get("extends")
        except (OSError, ValueError, RecursionError):
            return None
        files.append((path, data))
        if base is None:
            return files
        path = _extended(base, path.parent) if isinstance(base, str) and len(files) <= 16 else None
    return None


def _named(source: str | Path) -> Path | None:
    """The file that ``dspace.spec.load`` would read."""
    try:
        path = Path(source)
        if path.is_file():
            return path
        return find_builtin(str(source)) if path.suffix != ".toml" and len(path.parts) == 1 else None
    except (OSError, ValueError, TypeError):
        return None


def _extended(base: str, folder: Path) -> Path | None:
    """The file that ``extends = base`` means in a spec that lies in ``folder``."""
    try:
        for path in (folder / base, folder / f"{base}.toml"):
            if path.is_file():
                return path
    except (OSError, ValueError):
        return None
    return find_builtin(base)

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

if TYPE_CHECKING:
    from dspace.spec import Spec

_PACKAGE = Path(__file__).parent.parent
BUILTIN_FOLDERS = (_PACKAGE.parent / "specs", _PACKAGE / "_specs")
"""Where built-in specs live: in a checkout, in an installed distribution."""


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
    folder = Path()
    wanted: str | Path | None = source
    while wanted is not None:
        path = _locate(wanted, folder)
        if path is None or any(path == seen for seen, _ in files):
            return None
        try:
            data = path.read_bytes()
            table = tomllib.loads(data.decode())
        except (OSError, ValueError):
            return None
        files.append((path, data))
        folder = path.parent
        wanted = table.get("extends")
        if wanted is not None and not isinstance(wanted, str):
            return None
    return files


def _locate(source: str | Path, folder: Path) -> Path | None:
    name = str(source)
    candidates = [folder / name, folder / f"{name}.toml"]
    candidates += [base / f"{name}.toml" for base in BUILTIN_FOLDERS]
    if not isinstance(source, Path) and name.isidentifier():
        candidates = candidates[2:] + candidates[:2]
    for path in candidates:
        try:
            if path.is_file():
                return path.resolve()
        except (OSError, ValueError):
            continue
    return None

"""Where the built-in specs are: ``specs/`` of a checkout, or the copies inside an installed distribution."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def find_specs() -> Path | None:
    """Folder of the built-in specs, or None when they were not shipped."""
    for folder in (_PACKAGE.parent / "specs", _PACKAGE / "_specs"):
        if any(folder.glob("*.toml")):
            return folder
    return None


def builtin_names() -> list[str]:
    """Names of the built-in specs, sorted."""
    folder = find_specs()
    return sorted(path.stem for path in folder.glob("*.toml")) if folder else []


def find_builtin(name: str) -> Path | None:
    """File of one built-in spec, or None."""
    folder = find_specs()
    return folder / f"{name}.toml" if folder and name in builtin_names() else None

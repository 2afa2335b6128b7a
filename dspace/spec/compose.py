"""``extends``, ``remove`` and ``transform``: a spec stated as a change of another one.

The order is fixed: the tables of the base, overridden key by key by the file's own; then ``remove``; then
the transforms, in the order given. What a transform adds can be declared beforehand (see
:mod:`dspace.spec.transforms`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dspace.errors import Problem, SpecError
from dspace.spec.expressions import nearest
from dspace.spec.library import builtin_names, find_builtin

if TYPE_CHECKING:
    from dspace.spec.reader import Source

Tables = dict[str, Any]
Reader = Callable[..., tuple[Tables, list["Source"]]]

_OWN = ("name", "title", "doc")
"""Keys that are never inherited."""


def resolve_tables(
    tables: Tables, sources: list[Source], folder: Path, chain: tuple[Path, ...], read: Reader
) -> tuple[Tables, list[Source]]:
    """Complete tables, without ``extends``, ``remove`` and ``transform``, and all sources, nearest first."""
    from dspace.spec.reader import locator

    tables = dict(tables)
    base = tables.pop("extends", None)
    removed = tables.pop("remove", [])
    transforms = tables.pop("transform", [])

    def fail(place: str, message: str, cure: str, suggestion: str = "") -> NoReturn:
        at = locator(sources)(place, 1)
        raise SpecError([Problem(message, where=place, cure=cure, suggestion=suggestion, **at)])

    if base is not None:
        if not isinstance(base, str) or not base or len(base) > 1_000 or "\0" in base:
            fail("extends", "the name or path of one spec is expected here", 'for example extends = "my_base.toml"')
        path = _base_path(base, folder)
        if path is None:
            known = builtin_names()
            fail(
                "extends",
                f"no spec {base[:80]!r}",
                "give a built-in name or a path from this file",
                nearest(base, known),
            )
        if path.resolve() in chain or len(chain) > 16:
            names = " -> ".join([*(p.name for p in chain), path.name])
            fail("extends", f"specs extend each other in a circle: {names}", "break the circle")
        inherited, more = read(path, chain)
        inherited = {k: v for k, v in inherited.items() if k not in _OWN}
        tables = _merged(inherited, tables)
        sources = [*sources, *more]
    if not isinstance(removed, list) or not all(isinstance(r, str) for r in removed):
        fail("remove", "a list of places is expected here", 'for example remove = ["parameters.I_p"]')
    for place in removed:
        if not _remove(tables, place.split(".")):
            fail("remove", f"there is no {place[:80]!r} to remove", "name a table or table.key that is inherited")
    if transforms:
        from dspace.spec.transforms import apply_transforms

        tables = apply_transforms(tables, transforms, sources)
    return tables, sources


def _base_path(base: str, folder: Path) -> Path | None:
    try:
        for path in (folder / base, folder / f"{base}.toml"):
            if path.is_file():
                return path
    except OSError:
        return None
    return find_builtin(base)


def _merged(base: Tables, over: Tables, depth: int = 0) -> Tables:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and depth < 4:
            result[key] = _merged(old, value, depth + 1)
        else:
            result[key] = value
    return result


def _remove(tables: Tables, path: list[str]) -> bool:
    inner: Any = tables
    copies = tables
    for part in path[:-1]:
        inner = copies.get(part)
        if not isinstance(inner, dict):
            return False
        copies[part] = dict(inner)
        copies = copies[part]
    return copies.pop(path[-1], None) is not None

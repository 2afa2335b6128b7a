"""Generated modules as files that people read: write them, and check that they are what the compiler writes today."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspace.errors import UserError
from dspace.runtime.analysis import module_text
from dspace.runtime.sources import as_spec

PACKAGE_DOC = (
    '"""Generated modules of the built-in specs, one a variant: `dspace generate NAME` writes them again."""\n'
)


@dataclass(frozen=True)
class Difference:
    """A file that is not what the compiler writes: ``kind`` is "missing", "changed" or "extra"."""

    path: Path
    kind: str
    diff: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}" + (f"\n{self.diff}" if self.diff else "")


def generate(source: Any, out_dir: str | Path = "kernels") -> Path:
    """Write the module of a variant as ``out_dir/NAME.py``; returns the path.

    Raises:
        SpecError: the spec cannot be compiled.
        UserError: the folder cannot be written.
    """
    spec = as_spec(source)
    text = module_text(spec)
    path = Path(out_dir) / f"{spec.name}.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".py.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; cure: another folder") from error
    return path


def generate_all(out_dir: str | Path = "kernels", names: Iterable[str] | None = None) -> list[Path]:
    """Write the modules of all built-in specs (or of ``names``) and the package's ``__init__.py``."""
    folder = Path(out_dir)
    paths = [generate(name, folder) for name in _names(names)]
    (folder / "__init__.py").write_text(PACKAGE_DOC, encoding="utf-8")
    return paths


def check(out_dir: str | Path = "kernels", names: Iterable[str] | None = None) -> list[Difference]:
    """Compare ``out_dir`` with what the compiler writes now; an empty list means that they agree.

    Nothing is written. With ``names`` only those variants are compared and other files are left alone.
    """
    folder = Path(out_dir)
    differences = []
    wanted = _names(names)
    for name in wanted:
        spec = as_spec(name)
        path = folder / f"{spec.name}.py"
        text = module_text(spec)
        if not path.is_file():
            differences.append(Difference(path, "missing"))
            continue
        found = path.read_text(encoding="utf-8")
        if found != text:
            lines = difflib.unified_diff(
                found.splitlines(), text.splitlines(), "committed", "compiled", lineterm="", n=1
            )
            differences.append(Difference(path, "changed", "\n".join(list(lines)[:40])))
    if names is None:
        known = {f"{name}.py" for name in wanted} | {"__init__.py"}
        differences += [Difference(p, "extra") for p in sorted(folder.glob("*.py")) if p.name not in known]
    return differences


def _names(names: Iterable[str] | None) -> list[str]:
    from dspace.spec import builtin_names

    return sorted(builtin_names()) if names is None else list(names)


def main() -> int:
    """``python -m dspace.runtime.generation [--check] [DIR]``: write the built-in modules, or compare them."""
    import sys

    arguments = [a for a in sys.argv[1:] if a != "--check"]
    folder = arguments[0] if arguments else "kernels"
    if "--check" in sys.argv:
        differences = check(folder)
        for difference in differences:
            print(difference)
        return 1 if differences else 0
    for path in generate_all(folder):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

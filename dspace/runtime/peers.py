"""Other people's kernels to time beside ours, named in a file and not in the code: ``benchmarks/peers.toml``."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspace.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (_PACKAGE.parent / "benchmarks" / "peers.toml", _PACKAGE / "_peers.toml")
"""In a checkout, and in an installed distribution."""

KEYS = {"package", "chunk", "recurrent", "arguments", "options"}


@dataclass(frozen=True)
class Peer:
    """Kernels of the distribution ``package``: ``forms`` maps "chunk" and "recurrent" to "module:function".

    ``arguments`` maps its argument names to our inputs and parameters, ``options`` are passed as they stand.
    """

    package: str
    forms: dict[str, str]
    arguments: dict[str, str]
    options: dict[str, Any]

    def function(self, form: str, names: list[str]) -> Callable[..., Any] | None:
        """The kernel as a function of our arguments, called ``names``, in order; None if it is not installed."""
        if form not in self.forms:
            return None
        module, _, name = self.forms[form].partition(":")
        try:
            kernel = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return None

        def call(*given: Any, initial_state: Any = None, output_final_state: bool = False) -> Any:
            ours = dict(zip(names, given, strict=True))
            theirs = {argument: ours[name] for argument, name in self.arguments.items()}
            state = initial_state[0] if isinstance(initial_state, (list, tuple)) else initial_state
            return kernel(**theirs, **self.options, initial_state=state, output_final_state=output_final_state)

        return call


def find_peer(name: str, path: str | Path | None = None) -> Peer | None:
    """The peer of variant ``name``, or None if the file knows none. Raises UserError for a file that is not right."""
    file = Path(path) if path is not None else next((p for p in PLACES if p.is_file()), None)
    if file is None:
        return None
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get(name)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: {error}\n  cure: give a file like benchmarks/peers.toml") from error
    if table is None:
        return None
    unknown = set(table) - KEYS
    if unknown or "package" not in table or "arguments" not in table:
        found = f"unknown keys {sorted(unknown)}" if unknown else "package and arguments are needed"
        raise UserError(f"{file}: [{name}]: {found}\n  cure: keys are {', '.join(sorted(KEYS))}")
    forms = {form: table[form] for form in ("chunk", "recurrent") if form in table}
    return Peer(table["package"], forms, table["arguments"], table.get("options", {}))

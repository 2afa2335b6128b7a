"""Generated modules of the test recurrences, made once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import RECURRENCES, Identity, analysis_of, load  # noqa: E402


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    """``native(name)``: the module of a test recurrence, with the native loops as its only target."""
    from dspace.emit import emit
    from dspace.emit.cpu.section import section

    folder = tmp_path_factory.mktemp("modules")
    made: dict[str, ModuleType] = {}

    def get(name: str) -> ModuleType:
        if name not in made:
            source = emit(Identity(name), analysis_of(RECURRENCES[name]), targets=[section])
            made[name] = load(source, folder / f"emit_test_{name}.py")
        return made[name]

    return get

"""What the tests of relations share."""

from __future__ import annotations

import pytest

from dspace.math.reductions import Answer, reduce


@pytest.fixture(scope="session")
def answers() -> dict[tuple[str, str], Answer]:
    """Every ordered pair of built-in variants, searched once in a process."""
    from relations import RECURRENCES

    names = list(RECURRENCES)
    return {(a, b): reduce(RECURRENCES[a], RECURRENCES[b]) for a in names for b in names if a != b}

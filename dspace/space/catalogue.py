"""All valid points that are not the same mathematics in another spelling, with their class and cost, kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from dspace.space.points import AXES, Point, all_points, coincides, parse_point, why_not

PACKAGES = ("spec", "math", "space")
"""The packages whose text decides what the catalogue says."""


@dataclass(frozen=True)
class Entry:
    """A point with what the mathematics says of it: costs are formulas in K, V and the chunk C."""

    point: Point
    hash: str
    letter: str
    costs: dict[str, str]
    """As :mod:`dspace.math.roofline` takes them."""


@dataclass(frozen=True)
class Catalogue:
    """``entries`` are pairwise inequivalent; ``same`` maps a point to the one that has its mathematics."""

    entries: tuple[Entry, ...]
    same: dict[str, str]
    refused: dict[str, int]
    """How many combinations are no variants, by reason."""

    def sample(self, count: int, seed: int) -> tuple[Entry, ...]:
        """``count`` entries at random without repetition, the same for the same seed."""
        return tuple(random.Random(seed).sample(self.entries, min(count, len(self.entries))))

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        entries = [{**asdict(e), "point": str(e.point)} for e in self.entries]
        return {"axes": AXES, "entries": entries, "same": self.same, "refused": self.refused}


def examine(point: Point) -> Entry:
    """What the mathematics says of a valid point."""
    from dspace.math import analyse, canonical_hash
    from dspace.math.roofline import costs_of
    from dspace.space.composing import compose

    analysis = analyse(compose(point))
    return Entry(point, canonical_hash(analysis.recurrence), analysis.classification.letter, costs_of(analysis))


def candidates() -> tuple[Point, ...]:
    """The valid points that no rule of :func:`~dspace.space.points.coincides` folds into another."""
    return tuple(p for p in all_points() if not why_not(p) and coincides(p) is None)


def build(points: Iterable[Point] | None = None, progress: Callable[[str], None] | None = None) -> Catalogue:
    """Analyse ``points`` (all candidates by default) and keep one of each mathematics."""
    refused = Counter(reason for p in all_points() if (reason := why_not(p)))
    same = {str(p): str(other) for p in all_points() if not why_not(p) and (other := coincides(p)) is not None}
    chosen: Sequence[Point] = candidates() if points is None else tuple(points)
    first: dict[str, Entry] = {}
    for number, point in enumerate(chosen):
        if progress is not None and number % 20 == 0:
            progress(f"{number} of {len(chosen)} points analysed")
        entry = examine(point)
        if entry.hash in first:
            same[str(point)] = str(first[entry.hash].point)
        else:
            first[entry.hash] = entry
    return Catalogue(tuple(first.values()), same, dict(refused))


def load_or_build(
    folder: Path, progress: Callable[[str], None] | None = None, points: Iterable[Point] | None = None
) -> Catalogue:
    """The catalogue of ``points`` (all candidates by default) kept in ``folder`` for this very version of the
    compiler, else built and kept there."""
    chosen = None if points is None else tuple(points)
    store = folder / f"space-{_version(chosen)[:16]}.json"
    try:
        told = json.loads(store.read_text())
        entries = tuple(Entry(**{**e, "point": parse_point(e["point"])}) for e in told["entries"])
        return Catalogue(entries, told["same"], told["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or unreadable: build it anew
    built = build(progress=progress) if chosen is None else build(chosen, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(built.as_dict()))
        partial.replace(store)
    except OSError:
        pass  # a catalogue that cannot be kept is still one
    return built


def _version(points: Sequence[Point] | None) -> str:
    package = Path(__file__).parent.parent
    total = hashlib.sha256(repr([astuple(p) for p in (candidates() if points is None else points)]).encode())
    for name in PACKAGES:
        for path in sorted((package / name).rglob("*.py")):
            total.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return total.hexdigest()

"""The mathematics of a variant, pass by pass: Spec -> Analysis."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import sympy

from dspace.errors import CompilerBug
from dspace.math import coordinates
from dspace.math.classes import classify
from dspace.math.cost import cost
from dspace.math.gradients import adjoint
from dspace.math.ir import Analysis, PassRecord, Recurrence
from dspace.math.lowering import lower
from dspace.math.ranges import ranges
from dspace.math.simplify import count_ops, simplify_recurrence

if TYPE_CHECKING:
    from dspace.spec import Spec

T = TypeVar("T")


def analyse(spec: Spec | Recurrence) -> Analysis:
    """All that the mathematics knows of ``spec`` (or of a recurrence built by hand)."""
    log = _Log()
    # Spec -> Recurrence in the spec's own coordinates
    source = spec if isinstance(spec, Recurrence) else log.run("lower", lambda: lower(spec), 0)
    # -> coordinates in which as many states as possible are affine and start at zero
    change = log.run("coordinates", lambda: coordinates.normalise(source), count_ops(source))
    coordinates.check(change, source)
    # -> fewer operations
    recurrence = log.run("simplify", lambda: simplify_recurrence(change.recurrence), count_ops(change.recurrence))
    _same_shape(change.recurrence, recurrence)
    # -> which parallel algorithm applies
    classification = log.run("classify", lambda: classify(recurrence), count_ops(recurrence))
    # -> gradients of one token
    gradients = log.run("adjoint", lambda: adjoint(recurrence), count_ops(recurrence))
    # -> what may overflow or divide by zero; what a token costs
    warnings = log.run("ranges", lambda: ranges(recurrence), count_ops(recurrence))
    price = log.run("cost", lambda: cost(recurrence, classification), count_ops(recurrence))
    log.note("coordinates", change.note)
    log.note("classify", f"class {classification.letter}: {classification.name}")
    return Analysis(source, recurrence, classification, gradients, warnings, price, tuple(log.records))


@dataclass
class _Log:
    records: list[PassRecord] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], T], before: int) -> T:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        self.records.append(PassRecord(name, before, _ops(result, before), seconds))
        return result

    def note(self, name: str, text: str) -> None:
        self.records = [
            PassRecord(r.name, r.ops_before, r.ops_after, r.seconds, text) if r.name == name else r
            for r in self.records
        ]


def _ops(result: object, otherwise: int) -> int:
    if isinstance(result, coordinates.Change):
        result = result.recurrence
    if isinstance(result, Recurrence):
        return count_ops(result)
    wrt = getattr(result, "wrt", None)
    if wrt is not None:
        return int(sum(sympy.count_ops(e) for e in wrt.values()))
    return otherwise


def _same_shape(before: Recurrence, after: Recurrence) -> None:
    if [(s.name, s.axes) for s in before.states] != [(s.name, s.axes) for s in after.states]:
        raise CompilerBug(f"simplify changed the states of {before.name}")

"""The class of a recurrence: which parallel algorithm applies, decided by tests on the expressions alone.

Tests in order (THEORY: normal form): contraction of a state in an update; affinity of every state; axes of the
decay; separability of the writes; Moebius form; rank of the transition; the readout, and whether its denominator
varies with v.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from dspace.math.affinity import coefficients
from dspace.math.ir import (
    AffineState,
    Classification,
    Readout,
    Recurrence,
    State,
    Write,
    axes_of,
    divisor_symbols,
    join_axes,
)
from dspace.math.logdecay import log_decay
from dspace.math.moebius import is_moebius
from dspace.math.rank import rank_one
from dspace.math.readout import divides, readout_of
from dspace.math.separate import state_sums, writes

NAMES = {
    "a": "affine, scalar decay",
    "b": "affine, decay per channel",
    "bp": "affine, elementwise decay or write",
    "fold": "affine, small states fold into the readout",
    "c": "ratio: nonlinear readout of affine states",
    "d": "affine, rank-one transition",
    "e": "Moebius (Riccati), elementwise",
    "f": "full precision",
    "g": "general",
}
"""What each class letter stands for."""

AXIS_WORDS = {"": "one number per head", "k": "per key channel", "v": "per value channel", "kv": "per matrix element"}


@dataclass
class _Trail:
    """The tests made so far, in words."""

    steps: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.steps.append(text)

    def decide(self, letter: str, reason: str, affine=None, readout: Readout | None = None) -> Classification:
        return Classification(letter, NAMES[letter], reason, affine, readout, tuple(self.steps))


def classify(recurrence: Recurrence) -> Classification:
    """The class of ``recurrence`` (best in normal coordinates), with the reason in words."""
    trail = _Trail()
    symbols = frozenset(s.symbol for s in recurrence.states)
    contracting = [s.name for s in recurrence.states if state_sums(s.update, symbols)]
    if contracting:
        trail.note(f"the update of {_list(contracting)} contracts a state: not elementwise")
        return _contracting(recurrence, trail)
    trail.note("no update contracts a state: elementwise")
    affine = affine_states(recurrence)
    if affine is None:
        return _not_affine(recurrence, trail)
    trail.note("every update is affine in its own state, with decay and write free of states")
    return _affine(recurrence, affine, trail)


def affine_states(recurrence: Recurrence) -> tuple[AffineState, ...] | None:
    """Decay and writes of every state; None unless all are affine, elementwise and decoupled.

    A write that is no sum of few separable terms is kept whole as one ``key`` on kv.
    """
    table = recurrence.axes_table()
    symbols = [s.symbol for s in recurrence.states]
    found = []
    for s in recurrence.states:
        form = coefficients(s.update, symbols)
        if form is None or set(form[0]) - {s.symbol}:
            return None
        decay = form[0].get(s.symbol, sympy.S.Zero)
        terms = writes(form[1], s.axes, table)
        if terms is None:
            terms = (Write(form[1], sympy.S.One),)
        found.append(AffineState(s.name, s.axes, decay, log_decay(decay, recurrence), axes_of(decay, table), terms))
    return tuple(found)


def _affine(recurrence: Recurrence, affine: tuple[AffineState, ...], trail: _Trail) -> Classification:
    table = recurrence.axes_table()
    decay_axes = join_axes(*(a.decay_axes for a in affine))
    for a in affine:
        trail.note(f"decay of {a.name}: {a.decay} ({AXIS_WORDS[a.decay_axes]})")
    readout = readout_of(recurrence)
    elementwise = [a.name for a in affine if a.decay_axes == "kv"]
    whole = [a.name for a in affine if any(axes_of(w.key, table) == "kv" for w in a.writes)]
    if elementwise or whole:
        why = f"the decay of {_list(elementwise)} differs per matrix element" if elementwise else ""
        if whole:
            why += (" and " if why else "") + f"the write to {_list(whole)} is no sum of products key * value"
        return trail.decide("bp", f"{why}: there is no matmul form", affine, readout)
    if readout is None:
        trail.note("the readout reads a large state through another read, or outside a sum over k")
        return trail.decide(
            "g", "the updates are affine, but the readout is no set of single sums over k", affine, None
        )
    nonlinear = [r for r in readout.reads if r.queries is None]
    if nonlinear:
        return _ratio(recurrence, affine, readout, trail)
    trail.note("every read is linear in the large states")
    places = divides(recurrence, readout)
    letter = "b" if decay_axes else "a"
    decay = "per channel" if decay_axes else "a scalar"
    if places:
        small = [s.name for s in recurrence.states if s.axes != "kv"]
        trail.note(
            f"{_list(small)} {'is' if len(small) == 1 else 'are'} small (free of v or k) and {'enters' if len(small) == 1 else 'enter'} the {_list(places)}"
        )
        share, one = "divide" if _divides(recurrence, readout) else "enter", len(small) == 1
        reason = (
            f"all states are affine and the decay is {decay}; {_list(small)} {'varies' if one else 'vary'} only "
            f"{_along(recurrence)}, so {f'it {share}s' if one else f'they {share}'} the {_list(places)} and what remains "
            f"is class {letter}"
        )
        return trail.decide("fold", reason, affine, readout)
    reason = f"every state is affine, its decay is {decay}, its writes are products key * value, the readout is linear"
    return trail.decide(letter, reason, affine, readout)


def _divides(recurrence: Recurrence, readout: Readout) -> bool:
    """Whether a small state occurs in a divisor of the readout."""
    small = {s.symbol for s in recurrence.states if s.axes != "kv"}
    parts = [readout.output, *(q for r in readout.reads for q in (r.queries or {}).values())]
    return any(divisor_symbols(e) & small for e in parts)


def _along(recurrence: Recurrence) -> str:
    axes = [s.axes for s in recurrence.states if s.axes != "kv"]
    return {"k": "along k", "v": "along v", "": "from head to head"}.get(join_axes(*axes), "along k or v")


def _ratio(recurrence: Recurrence, affine, readout: Readout, trail: _Trail) -> Classification:
    body = next(r.body for r in readout.reads if r.queries is None)
    _, denominator = sympy.fraction(sympy.together(body))
    table = recurrence.axes_table()
    if denominator.free_symbols & {s.symbol for s in recurrence.states}:
        on = axes_of(denominator, table)
        trail.note(f"the denominator {denominator} lives on {on!r}: it varies along v and k, and does not fold")
        reason = (
            "every state is affine, but the readout divides one by another inside the sum over k, "
            "and the divisor varies along both axes: it can fold neither into the query nor into the output"
        )
    else:
        trail.note(f"the read {body} is not linear in the states")
        reason = "every state is affine, but the readout is not linear in them inside the sum over k"
    return trail.decide("c", reason, affine, readout)


def _contracting(recurrence: Recurrence, trail: _Trail) -> Classification:
    verdict = rank_one(recurrence)
    trail.note(verdict.note)
    if verdict.holds:
        reason = (
            f"{verdict.state} is affine and its transition is a diagonal plus one outer product ({verdict.note}); "
            "runs on the sequential plan for now (its chunkwise plan comes later)"
        )
        return trail.decide("d", reason, None, readout_of(recurrence))
    return trail.decide("g", f"the update contracts a state, and {verdict.note}: token by token", None, None)


def _not_affine(recurrence: Recurrence, trail: _Trail) -> Classification:
    symbols = [s.symbol for s in recurrence.states]
    moebius, affine, other = [], [], []
    for s in recurrence.states:
        form = coefficients(s.update, [s.symbol])
        if form is not None:
            affine.append(s.name)
        elif is_moebius(s.update, s.symbol) and not s.update.free_symbols & (set(symbols) - {s.symbol}):
            moebius.append(s.name)
        else:
            other.append(s.name)
    if moebius and not other and not _cycle(recurrence, affine):
        trail.note(f"{_list(moebius)}: numerator and denominator have degree 1 in the state")
        reason = (
            f"{_list(moebius)} follows a Moebius map of itself"
            + (f", and {_list(affine)} is affine given it" if affine else "")
            + ": 2x2 matrices compose; runs on the sequential plan for now"
        )
        return trail.decide("e", reason, None, readout_of(recurrence))
    if other:
        trail.note(f"{_list(other)}: neither affine nor Moebius")
        reason = (
            f"the update of {_list(other)} is neither affine in the states nor a Moebius map, in any coordinates tried"
        )
    else:
        reason = "the states are coupled: one is written with another"
        trail.note("states are coupled")
    return trail.decide("g", f"{reason}; runs token by token", None, readout_of(recurrence))


def _cycle(recurrence: Recurrence, names: list[str]) -> bool:
    """Whether the named states depend on each other."""
    by_name: dict[str, State] = {s.name: s for s in recurrence.states}
    chosen = [by_name[n] for n in names]
    return any(other.symbol in s.update.free_symbols for s in chosen for other in chosen if other.name != s.name)


def _list(names: list[str]) -> str:
    return " and ".join(names)

"""Tests for an affine recurrence whose transition is a diagonal plus one outer product over the key axis."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dspace.math.affinity import coefficients
from dspace.math.ir import AffineState, Axes, Recurrence, State, SumK, SumV, axes_of
from dspace.math.logdecay import log_decay
from dspace.math.separate import factors, state_sums, writes


@dataclass(frozen=True)
class RankOne:
    """``S_t = decay * S + erase * SumK(probe * S) + write`` if ``holds``; ``note`` says so, or why not, in words."""

    holds: bool
    note: str
    state: str = ""
    decay: sympy.Expr = sympy.S.Zero
    erase: sympy.Expr = sympy.S.Zero
    probe: sympy.Expr = sympy.S.Zero
    write: sympy.Expr = sympy.S.Zero


@dataclass(frozen=True)
class DeltaRule:
    """``S_t = decay * S + key * (value + SumK(probe * S))``: a rank-one transition that erases along what it writes.

    ``state`` has decay, key and value of the one write. What is erased and what is written lie along one key, up to a
    number per token; so values that a token writes follow from a triangular system (THEORY.md section 3d).
    """

    state: AffineState
    probe: sympy.Expr


def delta_rule(recurrence: Recurrence) -> DeltaRule | None:
    """The form above, or None where the transition, a decay or the direction of the write has no such form."""
    found, table = rank_one(recurrence), recurrence.axes_table()
    if not found.holds or len(recurrence.states) != 1:
        return None  # other states would have to be known at every token before the system is
    (state,) = recurrence.states
    decay = log_decay(found.decay, recurrence)
    terms = writes(found.write, state.axes, table)
    axes: Axes = axes_of(found.decay, table)
    if decay is None or axes not in ("", "k") or not terms or len(terms) != 1:
        return None
    size = sympy.cancel(found.erase / terms[0].key)
    if axes_of(size, table) != "" or state.symbol in size.free_symbols | terms[0].key.free_symbols:
        return None
    return DeltaRule(AffineState(state.name, state.axes, found.decay, decay, axes, terms), size * found.probe)


def rank_one(recurrence: Recurrence) -> RankOne:
    """Whether exactly one state contracts itself, linearly, with a transition of rank one beside its diagonal."""
    table = recurrence.axes_table()
    symbols = frozenset(s.symbol for s in recurrence.states)
    contracting = [s for s in recurrence.states if state_sums(s.update, symbols)]
    if len(contracting) != 1:
        return RankOne(False, "several states contract a state")
    state = contracting[0]
    for other in recurrence.states:
        if other is state:
            continue
        if state.symbol in other.update.free_symbols:
            return RankOne(False, f"{other.name} is written with {state.name}")
        if coefficients(other.update, [s.symbol for s in recurrence.states if s is not state]) is None:
            return RankOne(False, f"{other.name} is not affine")
    return _transition(state, table)


def _transition(state: State, table) -> RankOne:
    x = state.symbol
    update = _pull_out(state.update, x, table)
    if update is None:
        return RankOne(False, f"{state.name} is contracted in a way that is not linear")
    sums = state_sums(update, frozenset([x]))
    names = {node: sympy.Dummy(f"c{i}", real=True) for i, node in enumerate(sums)}
    found = coefficients(update.xreplace(names), [x, *names.values()])
    if found is None:
        return RankOne(False, f"the update is not affine in {state.name}")
    linear, write = found
    decay = linear.pop(x, sympy.S.Zero)
    table = dict(table) | {d: axes_of(n, table) for n, d in names.items()}
    terms = []
    for node, dummy in names.items():
        if dummy not in linear:
            continue
        if isinstance(node, SumV):
            return RankOne(False, f"{state.name} is contracted over v: a transition on the value side")
        terms.append((linear[dummy], sympy.cancel(node.args[0] / x)))
    if len(terms) != 1:
        return RankOne(False, f"the transition has {len(terms)} outer products")
    erase, probe = terms[0]
    if "v" in axes_of(probe, table) or "v" in axes_of(erase, table) or "v" in axes_of(decay, table):
        return RankOne(False, "the transition differs per value channel: one factorisation for each would be needed")
    note = f"diagonal {decay}, outer product of {erase} and {probe}, both free of v"
    return RankOne(True, note, state.name, decay, erase, probe, write)


def _pull_out(expr: sympy.Expr, x: sympy.Symbol, table) -> sympy.Expr | None:
    """Contractions of ``x`` as a linear combination of plain ``SumK(probe * x)``; None if one is not linear."""
    swap = {}
    for node in state_sums(expr, frozenset([x])):
        body = node.args[0]
        if state_sums(body, frozenset([x])):
            return None
        found = coefficients(body, [x])
        if found is None:
            return None
        linear, rest = found
        value = node.func(rest) if rest != 0 else sympy.S.Zero
        part = factors(linear.get(x, sympy.S.Zero), table)
        if isinstance(node, SumK):
            if part["kv"] != 1:
                return None
            value += part[""] * part["v"] * SumK(part["k"] * x)
        else:
            value += part[""] * part["k"] * SumV(part["v"] * part["kv"] * x)
        swap[node] = value
    return expr.xreplace(swap)

"""One hash for one mathematics: variants that differ in names and spelling only have the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy

from dspace.math.ir import Recurrence, State, Variable
from dspace.math.proofs import canonical
from dspace.math.simplify import MAX_RATIONAL_OPS, atomise

MAX_ORDERS = 720
"""Most ways of naming that are compared; beyond, names are taken as they are given."""


@dataclass(frozen=True)
class CanonicalForm:
    """A recurrence without its names: ``hash`` of its mathematics; ``variables`` and ``states`` in the order in which
    two recurrences of one hash correspond."""

    hash: str
    variables: tuple[str, ...]
    states: tuple[str, ...]


def canonical_hash(recurrence: Recurrence, labels: Mapping[str, str] | None = None) -> str:
    """The hash of :func:`canonical_form`."""
    return canonical_form(recurrence, labels).hash


def canonical_form(recurrence: Recurrence, labels: Mapping[str, str] | None = None) -> CanonicalForm:
    """``recurrence`` in normal coordinates, independent of the names of inputs, parameters and states.

    Equal hashes mean equal mathematics; the converse holds as far as rational simplification sees it. ``labels`` says
    of variables, by name, what else must agree between two recurrences for them to count as one: how a layer makes an
    input, where a parameter starts.
    """
    axes = {x.symbol: x.axes for x in recurrence.variables} | {s.symbol: s.axes for s in recurrence.states}
    names = [e for s in recurrence.states for e in (s.init, s.update)] + [recurrence.output]
    if recurrence.variance is not None:
        names.append(recurrence.variance)
    forms = [_normal(e, axes) for e in names]
    told = labels or {}
    spelled = ((_spelled(recurrence, forms, o, told), o) for o in _orders(recurrence, forms, told))
    text, (variables, states) = min(spelled, key=lambda found: found[0])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return CanonicalForm(digest, tuple(v.name for v in variables), tuple(s.name for s in states))


def _normal(expr: sympy.Expr, axes: dict[sympy.Symbol, str]) -> sympy.Expr:
    expr = canonical(expr, axes)
    rational, stands = atomise(expr)
    if sympy.count_ops(rational) > MAX_RATIONAL_OPS:
        return expr
    numerator, denominator = sympy.fraction(sympy.cancel(rational))
    return (sympy.expand(numerator) / sympy.expand(denominator)).xreplace(stands)


_Order = tuple[tuple[Variable, ...], tuple[State, ...]]


def _orders(recurrence: Recurrence, forms: list[sympy.Expr], labels: Mapping[str, str]) -> Iterator[_Order]:
    """Orders of variables and states to try: only what looks alike and is used alike changes places."""
    used = {x for e in forms for x in e.free_symbols}
    variables = [v for v in (*recurrence.inputs, *recurrence.parameters) if v.symbol in used]
    alike = {v.symbol: f"{v.role} {v.axes} {v.domain} {labels.get(v.name, '')}" for v in variables}
    alike |= {s.symbol: f"state {s.axes} {s.domain}" for s in recurrence.states}
    alike = _refined(alike, forms, {s.symbol: i for i, s in enumerate(recurrence.states)})
    groups = _groups(variables, lambda v: alike[v.symbol])
    state_groups = _groups(list(recurrence.states), lambda s: alike[s.symbol])
    every = itertools.product(*(itertools.permutations(g) for g in (*groups, *state_groups)))
    count = len(groups)
    for arrangement in itertools.islice(every, MAX_ORDERS):
        yield (
            tuple(v for group in arrangement[:count] for v in group),
            tuple(s for group in arrangement[count:] for s in group),
        )


def _refined(
    alike: Mapping[sympy.Symbol, str], forms: list[sympy.Expr], states: Mapping[sympy.Symbol, int]
) -> dict[sympy.Symbol, str]:
    """Marks that also say how each symbol is used: the forms with it marked, every other one known by its mark alone.

    Symbols of one mark stay alike under every renaming, so that few orders of them are left to compare.
    """
    marks = sorted(set(alike.values()))
    common = {x: sympy.Symbol(f"c{marks.index(m)}", **x.assumptions0) for x, m in alike.items()}
    refined = {}
    for x, mark in alike.items():
        one = {**common, x: sympy.Symbol("marked", **x.assumptions0)}
        uses = []
        for at, form in enumerate(forms):
            # Forms of states come in pairs, start and update; their order is the states' own, so marks name them.
            owner = next((alike[s] for s, i in states.items() if at // 2 == i), "readout")
            own = x in states and at // 2 == states[x]
            uses.append(f"{owner} {at % 2 if owner != 'readout' else at - 2 * len(states)} {own} {form.xreplace(one)}")
        refined[x] = "\n".join([mark, *sorted(uses)])
    return refined


def _groups(items: Sequence, key) -> list[list]:
    ordered = sorted(items, key=lambda x: (key(x), x.name))
    return [list(group) for _, group in itertools.groupby(ordered, key)]


def _spelled(recurrence: Recurrence, forms: list[sympy.Expr], order: _Order, labels: Mapping[str, str]) -> str:
    variables, states = order
    new: dict[sympy.Symbol, sympy.Symbol] = {}
    lines: list[str] = [recurrence.read]
    for i, v in enumerate(variables):
        new[v.symbol] = sympy.Symbol(f"x{i}", **v.symbol.assumptions0)
        lines.append(f"{v.role} {v.axes} {v.domain} {labels.get(v.name, '')}".rstrip())
    for i, s in enumerate(states):
        new[s.symbol] = sympy.Symbol(f"s{i}", **s.symbol.assumptions0)
        lines.append(f"state {s.axes}")
    for s in states:
        at = 2 * recurrence.states.index(s)
        lines += [str(forms[at].xreplace(new)), str(forms[at + 1].xreplace(new))]
    lines += [str(e.xreplace(new)) for e in forms[2 * len(states) :]]
    return "\n".join(lines)

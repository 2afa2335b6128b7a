"""The search for coordinates in which a recurrence is affine with states that start at zero.

Nothing here knows a variant. Each state ``x`` may be replaced by a product or quotient with another state, by its
reciprocal, logarithm or exponential; a finite list of such changes is tried in order of the number of states that
they change, and the first under which most updates are affine is taken. Then each affine state is shifted by its
initial value where that removes the part of the update that no input writes. Last, an axis along which a state
provably never varies is dropped.

The map is kept in both directions as expressions in the states and parameters, so that states can be translated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import sympy

from dspace.errors import CompilerBug
from dspace.math.affinity import coefficients
from dspace.math.ir import Analysis, Axes, Recurrence, State, SumK, SumV, axes_of, join_axes
from dspace.math.lowering import with_domains
from dspace.math.simplify import is_zero, simplify

Map = Mapping[str, sympy.Expr]


@dataclass(frozen=True)
class Change:
    """A change of coordinates: ``to_normal[new]`` in source states, ``to_source[old]`` in new states."""

    recurrence: Recurrence
    to_normal: Map
    to_source: Map
    note: str


def to_normal(analysis: Analysis) -> Map:
    """Each state of ``analysis.recurrence`` as an expression in source states and parameters."""
    return normalise(analysis.source).to_normal


def to_source(analysis: Analysis) -> Map:
    """Each state of ``analysis.source`` as an expression in normal states and parameters."""
    return normalise(analysis.source).to_source


_KNOWN: dict[Recurrence, Change] = {}


def normalise(source: Recurrence) -> Change:
    """The best coordinates found for ``source``."""
    if source not in _KNOWN:
        if len(_KNOWN) > 64:
            _KNOWN.clear()
        _KNOWN[source] = _narrow(_shift(_search(source)))
    return _KNOWN[source]


@dataclass(frozen=True)
class _Candidate:
    """New state per old one: its expression in old symbols, and how it is told."""

    name: str
    axes: Axes
    forward: sympy.Expr
    doc: str
    solve: sympy.Expr
    """The old state in terms of ``y`` (the new one) and the other *old* states."""


_Y = sympy.Symbol("y", real=True)


def _candidates(recurrence: Recurrence, state: State, taken: set[str]) -> list[_Candidate]:
    x = state.symbol
    found = [_Candidate(state.name, state.axes, x, state.doc, _Y)]
    for other in recurrence.states:
        if other.name == state.name:
            continue
        z, axes = other.symbol, join_axes(state.axes, other.axes)
        if other.domain in ("positive", "negative"):
            name = "M" if {state.name, other.name} == {"mean", "precision"} else f"{state.name}_{other.name}"
            found.append(_Candidate(_free(name, taken), axes, x * z, f"{state.name} * {other.name}", _Y / z))
            name = _free(f"{state.name}_per_{other.name}", taken)
            found.append(_Candidate(name, axes, x / z, f"{state.name} / {other.name}", _Y * z))
    if state.domain in ("positive", "negative"):
        found.append(_Candidate(_free(f"inv_{state.name}", taken), state.axes, 1 / x, f"1 / {state.name}", 1 / _Y))
    if state.domain == "positive":
        name = _free(f"log_{state.name}", taken)
        found.append(_Candidate(name, state.axes, sympy.log(x), f"log({state.name})", sympy.exp(_Y)))
    name = _free(f"exp_{state.name}", taken)
    found.append(_Candidate(name, state.axes, sympy.exp(x), f"exp({state.name})", sympy.log(_Y)))
    return found


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _names(recurrence: Recurrence) -> set[str]:
    return {v.name for v in recurrence.variables} | {s.name for s in recurrence.states}


def _search(source: Recurrence) -> Change:
    """Try changes, fewest changed states first; the first that makes every state affine, else the best."""
    symbols = [s.symbol for s in source.states]
    identity = Change(
        source, {s.name: s.symbol for s in source.states}, {s.name: s.symbol for s in source.states}, "identity"
    )
    best, best_score = identity, _affine_states(source)
    if best_score == len(source.states) or any(_contracted(s, symbols) for s in source.states):
        return best
    tried = 0
    for choice in _choices(source):
        tried += 1
        change = _apply(source, choice)
        if change is None:
            continue
        score = _affine_states(change.recurrence)
        if score > best_score:
            best, best_score = change, score
        if best_score == len(source.states):
            break
    return Change(
        best.recurrence, best.to_normal, best.to_source, f"{best.note} ({tried} changes of coordinates tried)"
    )


def _contracted(state: State, symbols: list[sympy.Symbol]) -> bool:
    return any(c.free_symbols & set(symbols) for c in state.update.atoms(SumK, SumV))


def _choices(source: Recurrence) -> Iterator[tuple[_Candidate, ...]]:
    taken = _names(source)
    lists = [_candidates(source, s, taken) for s in source.states]
    if len(source.states) > 3:  # the product would be long: change one state at a time
        for i, options in enumerate(lists):
            for option in options[1:]:
                yield tuple(option if j == i else lists[j][0] for j in range(len(lists)))
        return
    every = [c for c in product(*lists) if any(o is not lists[j][0] for j, o in enumerate(c))]
    yield from sorted(every, key=lambda c: sum(o is not lists[j][0] for j, o in enumerate(c)))


def _apply(source: Recurrence, choice: tuple[_Candidate, ...]) -> Change | None:
    """The recurrence in the chosen coordinates; None where the map cannot be inverted by substitution in turn."""
    new = {s.name: sympy.Symbol(c.name, real=True) for s, c in zip(source.states, choice, strict=True)}
    inverse: dict[sympy.Symbol, sympy.Expr] = {}
    waiting = dict(zip(source.states, choice, strict=True))
    old = {s.symbol for s in source.states}
    while waiting:
        ready = [s for s, c in waiting.items() if (c.solve.free_symbols & old) <= set(inverse)]
        if not ready:
            return None
        for s in ready:
            inverse[s.symbol] = waiting.pop(s).solve.xreplace({_Y: new[s.name]} | inverse)
    updates = {s.symbol: s.update for s in source.states}
    inits = {s.symbol: s.init for s in source.states}
    table = source.axes_table() | {new[s.name]: c.axes for s, c in zip(source.states, choice, strict=True)}
    states = []
    for c in choice:
        update = c.forward.xreplace(updates).xreplace(inverse)
        init = c.forward.xreplace(inits)
        if init.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo):
            return None
        states.append(State(c.name, c.axes, simplify(init, table), simplify(_cancel(update), table), "real", c.doc))
    recurrence = source.replace(
        states=tuple(states),
        output=source.output.xreplace(inverse),
        variance=None if source.variance is None else source.variance.xreplace(inverse),
    )
    changed = [c for s, c in zip(source.states, choice, strict=True) if c.name != s.name]
    return Change(
        recurrence,
        {c.name: c.forward for c in choice},
        {s.name: inverse[s.symbol] for s in source.states},
        ", ".join(f"{c.name} = {c.doc}" for c in changed),
    )


def _cancel(expr: sympy.Expr) -> sympy.Expr:
    """Undo ``exp(log(x))`` and ``log(exp(x))``, which a change to and from logarithms leaves behind."""
    return expr.replace(sympy.log, lambda a: a.args[0] if isinstance(a, sympy.exp) else sympy.log(a))


def _affine_states(recurrence: Recurrence) -> int:
    symbols = [s.symbol for s in recurrence.states]
    return sum(coefficients(s.update, symbols) is not None for s in recurrence.states)


def _shift(change: Change) -> Change:
    """Shift each affine, decoupled state by its initial value if it then starts at zero and drifts nowhere."""
    recurrence = change.recurrence
    symbols = [s.symbol for s in recurrence.states]
    constants = {p.symbol for p in recurrence.parameters}
    table = recurrence.axes_table()
    taken = _names(recurrence)
    states, moves, notes = [], {}, []
    for s in recurrence.states:
        found = coefficients(s.update, symbols)
        if s.init == 0 or found is None or set(found[0]) - {s.symbol} or not s.init.free_symbols <= constants:
            states.append(s)
            continue
        decay = found[0].get(s.symbol, sympy.S.Zero)
        drift = simplify(found[1] - (1 - decay) * s.init, table)
        # A state that forgets nothing starts at zero for free; another is moved where that is cheaper.
        spared = sympy.count_ops(simplify(found[1], table)) - sympy.count_ops(drift)
        if spared < 0 or (spared == 0 and decay != 1):
            states.append(s)
            continue
        name = _free(
            "Ibar" if s.name == "precision" else s.name if s.name == "M" else f"{s.name}_bar", taken - {s.name}
        )
        new = sympy.Symbol(name, real=True)
        axes = join_axes(s.axes, axes_of(s.init, table))
        doc = f"{s.doc if s.doc and s.name != 'precision' else s.name} - {_told(s.init)}"
        states.append(State(name, axes, sympy.S.Zero, decay * new + drift, "real", doc))
        moves[s.symbol] = (new, s.init)
        notes.append(f"{name} = {doc}")
    if not moves:
        return change
    back = {x: new + init for x, (new, init) in moves.items()}
    shifted = recurrence.replace(
        # A moved state's update is in its new symbol already, which may be spelt like the old one.
        states=tuple(
            s if old.symbol in moves else State(s.name, s.axes, s.init, s.update.xreplace(back), s.domain, s.doc)
            for old, s in zip(recurrence.states, states, strict=True)
        ),
        output=recurrence.output.xreplace(back),
        variance=None if recurrence.variance is None else recurrence.variance.xreplace(back),
    )
    forward = {}
    for old, new in zip(recurrence.states, shifted.states, strict=True):
        value = change.to_normal[old.name]
        forward[new.name] = value - moves[old.symbol][1] if old.symbol in moves else value
    to_source_ = {name: e.xreplace(back) for name, e in change.to_source.items()}
    return Change(shifted, forward, to_source_, "; ".join([change.note, *notes]))


def _told(expr: sympy.Expr) -> str:
    return f"({expr})" if expr.is_Add else str(expr)


def _narrow(change: Change) -> Change:
    """Drop axes along which states provably never vary: neither start nor update carries them.

    Then settle the signs of the states, and declare every symbol with them.
    """
    recurrence, notes = change.recurrence, []
    axes = {s.symbol: s.axes for s in recurrence.states}
    base = {v.symbol: v.axes for v in recurrence.variables}
    trial = {x: "" for x in axes}
    while True:  # the least fixed point: axes that initial values and updates bring in
        table = base | trial
        grown = {
            s.symbol: join_axes(trial[s.symbol], axes_of(s.init, table), axes_of(s.update, table))
            for s in recurrence.states
        }
        if grown == trial:
            break
        trial = grown
    forward = dict(change.to_normal)
    states = []
    for s in recurrence.states:
        kept = trial[s.symbol]
        lost = "".join(a for a in s.axes if a not in kept)
        if lost:
            notes.append(f"{s.name} never varies along {lost}: kept on {kept or 'one number'}")
            forward[s.name] = _mean_over(forward[s.name], lost)
        states.append(State(s.name, kept, s.init, s.update, "real", s.doc))
    narrowed = with_domains(recurrence.replace(states=tuple(states)))
    swap = {sympy.Symbol(s.name, real=True): s.symbol for s in narrowed.states}
    swap |= {s.symbol: n.symbol for s, n in zip(recurrence.states, narrowed.states, strict=True)}
    return Change(
        narrowed,
        forward,
        {name: e.xreplace(swap) for name, e in change.to_source.items()},
        "; ".join([change.note, *notes]),
    )


def _mean_over(expr: sympy.Expr, axes: Axes) -> sympy.Expr:
    """The value that ``expr`` has at every place along ``axes`` (their mean: it does not vary)."""
    for axis in axes:
        total = SumK if axis == "k" else SumV
        expr = total(expr) / total(sympy.S.One)
    return expr


def check(change: Change, source: Recurrence) -> None:
    """Raise CompilerBug unless the two maps undo each other."""
    for s in source.states:
        there = {sympy.Symbol(n, real=True): e for n, e in change.to_normal.items()}
        there |= {n.symbol: change.to_normal[n.name] for n in change.recurrence.states}
        back = change.to_source[s.name].xreplace(there)
        if not back.has(SumK, SumV) and not is_zero(back - s.symbol):
            raise CompilerBug(f"coordinates: {s.name} of {source.name} comes back as {back}")

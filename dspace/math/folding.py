"""Small states as given signals: what a variant computes once something else carries them.

A state that is not on ``kv`` and follows from the inputs and itself alone can be carried beside the large ones, and
its value at each token handed over as an input. If another variant becomes what is left under a substitution for all
values of that input, it becomes the whole under the same one: a precision per key channel divides the query of a
variant without precision, a normaliser divides its output. That is a fold.
"""

from __future__ import annotations

import sympy

from dspace.math.affinity import coefficients
from dspace.math.ir import Recurrence, State, Variable
from dspace.math.simplify import simplify


def carried(recurrence: Recurrence) -> tuple[State, ...]:
    """The states of ``recurrence`` that can be carried beside it."""
    symbols = {s.symbol for s in recurrence.states}
    small = [s for s in recurrence.states if s.axes != "kv" and not (s.update.free_symbols & symbols) - {s.symbol}]
    return tuple(small) if len(small) < len(recurrence.states) else ()


def freed(recurrence: Recurrence) -> Recurrence | None:
    """``recurrence`` with its small states as inputs, their values at the token as it is read; None if it has none,
    or where what they were before the token enters in a way that their values after it do not tell."""
    small = carried(recurrence)
    if not small:
        return None
    table = recurrence.axes_table()
    before: dict[sympy.Symbol, sympy.Expr] = {}
    if recurrence.read == "after":  # updates are in the values before the token: these follow from those after it
        for s in small:
            form = coefficients(s.update, [s.symbol])
            decay = None if form is None else form[0].get(s.symbol)
            if form is not None and decay is not None:
                before[s.symbol] = (s.symbol - form[1]) / decay
    left = []
    for s in recurrence.states:
        if s in small:
            continue
        if any(
            z.symbol in s.update.free_symbols and recurrence.read == "after" and z.symbol not in before for z in small
        ):
            return None
        update = simplify(s.update.xreplace(before), table) if before else s.update
        left.append(State(s.name, s.axes, s.init, update, s.domain, s.doc))
    told = tuple(Variable(s.name, s.axes, "input", s.domain, s.doc) for s in small)
    return recurrence.replace(inputs=(*recurrence.inputs, *told), states=tuple(left))

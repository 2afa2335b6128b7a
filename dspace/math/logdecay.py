"""Logarithm of a decay, exact and without a logarithm of anything that may be zero."""

from __future__ import annotations

import sympy

from dspace.math.functions import Sigmoid, Softplus
from dspace.math.intervals import domains_of, is_positive
from dspace.math.ir import Recurrence


def log_decay(decay: sympy.Expr, recurrence: Recurrence) -> sympy.Expr | None:
    """``log(decay)``; 0 for a decay of 1, None where the decay may be zero or its sign is not known.

    ``exp(g)`` gives ``g``, products give sums, ``sigmoid(x)`` gives ``-softplus(-x)``, and anything else that is
    provably positive (from the declared domains) gives its plain logarithm.
    """
    domains = domains_of(recurrence)

    def walk(e: sympy.Expr) -> sympy.Expr | None:
        if e == 1:
            return sympy.S.Zero
        if isinstance(e, sympy.exp):
            return e.args[0]
        if isinstance(e, Sigmoid):
            return -Softplus(-e.args[0])
        if e.is_Mul:
            parts = [walk(a) for a in e.args]
            return None if any(p is None for p in parts) else sympy.Add(*parts)
        if e.is_Pow and not e.base.is_number:
            inner = walk(e.base)
            return None if inner is None else e.exp * inner
        if e.is_Add:
            # 1 - sigmoid(x) = sigmoid(-x)
            rest = 1 - e
            if isinstance(rest, Sigmoid):
                return -Softplus(rest.args[0])
        return sympy.log(e) if is_positive(e, domains) else None

    return walk(decay)

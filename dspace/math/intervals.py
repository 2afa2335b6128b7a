"""Interval arithmetic on expressions: what is known of a value from the declared domains of its symbols.

Intervals are over the extended reals; an end that is an infinity is never attained. Correlations between
operands are not seen, with one exception that posteriors need: ``1 - x`` and ``x`` are each bounded on their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy

from dspace.math.functions import Sigmoid, Softplus
from dspace.math.ir import DOMAINS, Domain, Recurrence, SumK, SumV

INFINITY = math.inf
REAL = Domain()


def domains_of(recurrence: Recurrence) -> dict[sympy.Symbol, Domain]:
    """Domain of every symbol of a recurrence."""
    table = {v.symbol: DOMAINS[v.domain] for v in recurrence.variables}
    return table | {s.symbol: DOMAINS[s.domain] for s in recurrence.states}


def interval(expr: sympy.Expr, domains: Mapping[sympy.Symbol, Domain]) -> Domain:
    """An interval that contains ``expr`` for all values of its symbols in ``domains`` (real where unknown)."""
    if expr.is_Symbol:
        return domains.get(expr) or _assumed(expr)
    if expr.is_number:
        value = float(expr)
        return Domain(value, value)
    args = [interval(a, domains) for a in expr.args]
    if expr.is_Add:
        return _fold(_add, args)
    if expr.is_Mul:
        return _fold(_multiply, args)
    if expr.is_Pow:
        return _power(args[0], expr.args[1], args[1])
    if isinstance(expr, sympy.exp):
        return _strict(_monotone(args[0], _exp), 0.0, INFINITY)
    if isinstance(expr, sympy.log):
        low = -INFINITY if args[0].low <= 0 else math.log(args[0].low)
        high = INFINITY if args[0].high == INFINITY else -INFINITY if args[0].high <= 0 else math.log(args[0].high)
        return Domain(low, high, args[0].open_low, args[0].open_high)
    if isinstance(expr, Sigmoid):
        return _strict(_monotone(args[0], lambda x: 0.0 if x < -700 else 1 / (1 + math.exp(-x))), 0.0, 1.0)
    if isinstance(expr, Softplus):
        return _strict(_monotone(args[0], lambda x: x if x > 30 else math.log1p(_exp(x))), 0.0, INFINITY)
    if isinstance(expr, sympy.tanh):
        return _strict(_monotone(args[0], math.tanh), -1.0, 1.0)
    if isinstance(expr, sympy.Abs):
        return _absolute(args[0])
    if isinstance(expr, sympy.Max):
        return _fold(_maximum, args)
    if isinstance(expr, sympy.Min):
        return _negate(_fold(_maximum, [_negate(a) for a in args]))
    if isinstance(expr, sympy.sign):
        return Domain(-1.0 if args[0].low < 0 else 0.0, 1.0 if args[0].high > 0 else 0.0)
    if isinstance(expr, (SumK, SumV)):
        return _sum(args[0])
    return _assumed(expr)


def sign_domain(expr: sympy.Expr, recurrence: Recurrence) -> str:
    """The name in ``ir.DOMAINS`` of the strongest sign that ``expr`` provably has: "real" if none."""
    domains = domains_of(recurrence)
    sign = _sign(interval(expr, domains))
    if sign == "real" and expr.is_Add:
        # Terms that belong together, such as p - p * exp(g), may have been spelt apart.
        known = sorted((x for x in expr.free_symbols if _sign(domains.get(x, REAL)) != "real"), key=str)
        expanded = sympy.expand(expr)
        for x in known:
            sign = _sign(interval(sympy.collect(expanded, x), domains))
            if sign != "real":
                return sign
        sign = _sign(interval(sympy.collect(expanded, known), domains)) if known else "real"
    return sign


def _sign(found: Domain) -> str:
    if found.low > 0 or (found.low == 0 and found.open_low):
        return "positive"
    if found.low == 0:
        return "nonnegative"
    if found.high < 0 or (found.high == 0 and found.open_high):
        return "negative"
    return "nonpositive" if found.high == 0 else "real"


def is_positive(expr: sympy.Expr, domains: Mapping[sympy.Symbol, Domain]) -> bool:
    """Whether ``expr`` is provably greater than zero."""
    found = interval(expr, domains)
    return found.low > 0 or (found.low == 0 and found.open_low)


def excludes_zero(expr: sympy.Expr, domains: Mapping[sympy.Symbol, Domain]) -> bool:
    """Whether ``expr`` is provably never zero."""
    found = interval(expr, domains)
    return (
        found.low > 0 or found.high < 0 or (found.low == 0 and found.open_low) or (found.high == 0 and found.open_high)
    )


def _assumed(expr: sympy.Expr) -> Domain:
    if expr.is_positive:
        return Domain(0.0, INFINITY, open_low=True)
    if expr.is_nonnegative:
        return Domain(0.0)
    if expr.is_negative:
        return Domain(-INFINITY, 0.0, open_high=True)
    if expr.is_nonpositive:
        return Domain(-INFINITY, 0.0)
    return REAL


def _fold(op, args: list[Domain]) -> Domain:
    result = args[0]
    for arg in args[1:]:
        result = op(result, arg)
    return result


def _add(a: Domain, b: Domain) -> Domain:
    return Domain(a.low + b.low, a.high + b.high, a.open_low or b.open_low, a.open_high or b.open_high)


def _negate(a: Domain) -> Domain:
    return Domain(-a.high, -a.low, a.open_high, a.open_low)


def _times(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y


def _multiply(a: Domain, b: Domain) -> Domain:
    ends = []
    for x, x_open in ((a.low, a.open_low), (a.high, a.open_high)):
        for y, y_open in ((b.low, b.open_low), (b.high, b.open_high)):
            # Zero times anything is attained as soon as that zero is attained.
            attained_zero = (x == 0 and not x_open) or (y == 0 and not y_open)
            ends.append((_times(x, y), (x_open or y_open) and not attained_zero))
    low, high = min(e[0] for e in ends), max(e[0] for e in ends)
    return Domain(low, high, all(o for v, o in ends if v == low), all(o for v, o in ends if v == high))


def _power(base: Domain, exponent: sympy.Expr, exponents: Domain) -> Domain:
    positive = base.low > 0 or (base.low == 0 and base.open_low)
    if not exponent.is_Rational:
        return Domain(0.0, INFINITY, open_low=True) if positive else REAL
    if exponent < 0:
        return _reciprocal(_power(base, -exponent, _negate(exponents)))
    n = float(exponent)
    if exponent.is_Integer and exponent.p % 2 == 0:
        base = _absolute(base)
    return _monotone(base, lambda x: _raise(x, n))


def _raise(x: float, n: float) -> float:
    try:
        value = x**n
    except OverflowError:
        return INFINITY
    return 0.0 if isinstance(value, complex) else value


def _reciprocal(a: Domain) -> Domain:
    if a.low >= 0 and (a.low > 0 or a.open_low):
        low = 0.0 if a.high == INFINITY else 1 / a.high
        high = INFINITY if a.low == 0 else 1 / a.low
        return Domain(low, high, a.high == INFINITY or a.open_high, a.open_low)
    if a.low == 0:
        # The value at exactly zero is a division by zero, which ranges.py reports; elsewhere the sign holds.
        return Domain(0.0, INFINITY, open_low=True)
    if a.high <= 0:
        return _negate(_reciprocal(_negate(a)))
    return REAL


def _absolute(a: Domain) -> Domain:
    if a.low >= 0:
        return a
    if a.high <= 0:
        return _negate(a)
    high = max(-a.low, a.high)
    return Domain(0.0, high)


def _maximum(a: Domain, b: Domain) -> Domain:
    low = max(a.low, b.low)
    high = max(a.high, b.high)
    opens_low = any(x.open_low for x in (a, b) if x.low == low)
    opens_high = all(x.open_high for x in (a, b) if x.high == high)
    return Domain(low, high, opens_low, opens_high)


def _monotone(a: Domain, f) -> Domain:
    return Domain(f(a.low), f(a.high), a.open_low, a.open_high)


def _exp(x: float) -> float:
    # Ends of finite size only: an exponential is positive however small.
    if x == -INFINITY:
        return 0.0
    return INFINITY if x > 700 else math.exp(max(x, -700.0))


def _strict(a: Domain, low: float, high: float) -> Domain:
    """``a`` with the ends ``low`` and ``high`` excluded, where the function never attains them."""
    return Domain(a.low, a.high, a.open_low or a.low == low, a.open_high or a.high == high)


def _sum(a: Domain) -> Domain:
    """Sum of at least one term from ``a``."""
    low = a.low if a.low >= 0 else -INFINITY
    high = a.high if a.high <= 0 else INFINITY
    return Domain(low, high, a.open_low, a.open_high)

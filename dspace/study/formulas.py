"""SymPy expressions of a recurrence -> presentation MathML, with time written as subscripts.

MathML is typeset by the browser itself: the page needs no script, no font and no network.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

_GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eps": "ε", "eta": "η", "kappa": "κ", "lam": "λ",
    "mu": "μ", "nu": "ν", "phi": "φ", "psi": "ψ", "rho": "ρ", "sigma": "σ", "tau": "τ", "omega": "ω",
    "Lambda": "Λ", "Sigma": "Σ", "Omega": "Ω",
}  # fmt: skip
_FUNCTIONS = {
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "Sigmoid": "σ",
    "Softplus": "softplus",
    "Min": "min",
    "Max": "max",
}


def math(inner: str) -> str:
    """A whole formula, as large as one that stands alone but placed like text."""
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML" displaystyle="true">{inner}</math>'


def name(text: str, time: str = "") -> str:
    """A symbol: Greek words become letters, ``x_y`` a subscript, ``xbar`` a bar; ``time`` joins the subscript."""
    head, _, sub = text.partition("_")
    bar = head.endswith("bar") and len(head) > 3
    head = head[:-3] if bar else head
    letter = _GREEK.get(head, head)
    core = f"<mi>{html.escape(letter)}</mi>"
    if bar:
        core = f'<mover accent="false">{core}<mo accent="false" stretchy="false" lspace="0" rspace="0">¯</mo></mover>'
    parts = ([f"<mi>{html.escape(sub)}</mi>"] if sub else []) + ([time] if time else [])
    if not parts:
        return core
    return f"<msub>{core}<mrow>{'<mo>,</mo>'.join(parts)}</mrow></msub>"


NOW = "<mi>t</mi>"
BEFORE = "<mi>t</mi><mo>−</mo><mn>1</mn>"


def expression(expr: Any, times: Mapping[str, str]) -> str:
    """MathML of an expression; ``times`` gives each symbol's time subscript (none if absent)."""
    return _Printer(times).visit(expr)[0]


_SUM, _PRODUCT, _POWER, _ATOM = 1, 2, 3, 4


class _Printer:
    """Returns (markup, precedence) for every node."""

    def __init__(self, times: Mapping[str, str]) -> None:
        self.times = times

    def visit(self, e: Any) -> tuple[str, int]:
        kind = type(e).__name__
        if e.is_Symbol:
            return name(e.name, self.times.get(e.name, "")), _ATOM
        if e.is_Number:
            return self.number(e)
        if e.is_Add:
            return self.sum(e), _SUM
        if e.is_Mul:
            return self.product(e)
        if kind == "exp":
            return f"<msup><mi>e</mi><mrow>{self.visit(e.args[0])[0]}</mrow></msup>", _POWER
        if e.is_Pow:
            return self.power(e)
        if kind in ("SumK", "SumV"):
            body = self.wrapped(e.args[0], _PRODUCT)
            axis = kind[-1].lower()
            return f"<mrow><munder><mo>∑</mo><mi>{axis}</mi></munder>{body}</mrow>", _PRODUCT
        if kind == "Abs":
            return f"<mrow><mo>|</mo>{self.visit(e.args[0])[0]}<mo>|</mo></mrow>", _ATOM
        arguments = "<mo>,</mo>".join(self.visit(a)[0] for a in e.args)
        label = html.escape(_FUNCTIONS.get(kind, kind.lower()))
        return f"<mrow><mi>{label}</mi><mo>(</mo>{arguments}<mo>)</mo></mrow>", _ATOM

    def number(self, e: Any) -> tuple[str, int]:
        if e.is_negative:
            return f"<mrow><mo>−</mo>{self.visit(-e)[0]}</mrow>", _SUM
        if e.is_Rational and e.q != 1:
            if e.q > 100:  # a decimal that was spelled as such
                return f"<mn>{float(e):g}</mn>", _ATOM
            return f"<mfrac><mn>{e.p}</mn><mn>{e.q}</mn></mfrac>", _ATOM
        return f"<mn>{html.escape(str(e))}</mn>", _ATOM

    def wrapped(self, e: Any, least: int) -> str:
        markup, level = self.visit(e)
        return markup if level >= least else f"<mrow><mo>(</mo>{markup}<mo>)</mo></mrow>"

    def sum(self, e: Any) -> str:
        out = ""
        # Terms with the past first, then what the token adds: the order in which people read an update.
        for i, term in enumerate(sorted(e.as_ordered_terms(), key=lambda t: not self.is_past(t))):
            negative = term.could_extract_minus_sign()
            shown = self.wrapped(-term if negative else term, _PRODUCT)
            out += ("<mo>−</mo>" if negative else "<mo>+</mo>" if i else "") + shown
        return f"<mrow>{out}</mrow>"

    def is_past(self, term: Any) -> bool:
        return any(self.times.get(s.name) == BEFORE for s in term.free_symbols)

    def product(self, e: Any) -> tuple[str, int]:
        if e.could_extract_minus_sign():
            return f"<mrow><mo>−</mo>{self.wrapped(-e, _PRODUCT)}</mrow>", _SUM
        numerator, denominator = _fraction(e)
        if denominator != 1:
            top, bottom = self.visit(numerator)[0], self.visit(denominator)[0]
            return f"<mfrac><mrow>{top}</mrow><mrow>{bottom}</mrow></mfrac>", _ATOM
        factors = sorted(e.args, key=self.rank)
        return "<mrow>" + "<mspace width='0.14em'/>".join(
            self.wrapped(f, _PRODUCT) for f in factors
        ) + "</mrow>", _PRODUCT

    def rank(self, f: Any) -> tuple[int, str]:
        kind = type(f).__name__
        order = 0 if f.is_Number else 1 if getattr(f, "name", "") == "scale" else 2 if kind == "exp" else 4
        return (6 if kind in ("SumK", "SumV") else order, str(f))

    def power(self, e: Any) -> tuple[str, int]:
        base, exponent = e.args
        if exponent.is_negative:
            under = self.visit(base**-exponent)[0]
            return f"<mfrac><mn>1</mn><mrow>{under}</mrow></mfrac>", _ATOM
        if exponent.is_Rational and exponent.p == 1 and exponent.q == 2:
            return f"<msqrt>{self.visit(base)[0]}</msqrt>", _ATOM
        inner = self.wrapped(base, _ATOM)
        return f"<msup><mrow>{inner}</mrow><mrow>{self.visit(exponent)[0]}</mrow></msup>", _POWER


def _fraction(e: Any) -> tuple[Any, Any]:
    """Numerator and denominator that keep exp(-x) upstairs."""
    import sympy

    top, bottom = [], []
    for f in e.args:
        if f.is_Pow and type(f).__name__ != "exp" and f.exp.is_negative:
            bottom.append(1 / f)
        else:
            top.append(f)
    return sympy.Mul(*top), sympy.Mul(*bottom)


def recurrence(analysis: Any) -> list[tuple[str, str]]:
    """(what it is, MathML) of each state's update and of what is read out, in the coordinates that are emitted."""
    r = analysis.recurrence
    states = {s.name for s in r.states}
    inputs = {v.name: NOW for v in r.inputs}
    past = {**inputs, **dict.fromkeys(states, BEFORE)}
    lines = []
    for s in r.states:
        left = name(s.name, NOW)
        lines.append((s.doc or "state", math(f"<mrow>{left}<mo>=</mo>{expression(s.update, past)}</mrow>")))
    read = {**inputs, **dict.fromkeys(states, NOW if r.read == "after" else BEFORE)}
    lines.append(("output", math(f"<mrow>{name('o', NOW)}<mo>=</mo>{expression(r.output, read)}</mrow>")))
    if r.variance is not None:
        variance = expression(r.variance, read)
        lines.append(("predictive variance", math(f"<mrow>{name('var', NOW)}<mo>=</mo>{variance}</mrow>")))
    return lines

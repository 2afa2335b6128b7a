"""Recurrences built by hand, so that the tests of the mathematics need no spec files."""

from __future__ import annotations

import sympy

from dspace.math.functions import FUNCTIONS
from dspace.math.ir import SCALE, Recurrence, State, SumK, SumV, Variable
from dspace.math.lowering import with_domains
from dspace.runtime.tape import Tape as _Tape

DOMAINS = {"b": "nonnegative", "g": "nonpositive", "beta": "unit", "f": "unit"}


def build(
    name: str,
    states: dict[str, tuple[str, str, str]],
    output: str,
    variance: str | None = None,
    parameters: dict[str, str] | None = None,
    domains: dict[str, str] | None = None,
    read: str = "after",
    **inputs: str,
) -> Recurrence:
    """``states`` are ``name: (axes, init, update)``; ``inputs`` and ``parameters`` (positive) are ``name: axes``."""
    known = DOMAINS | (domains or {})
    ins = tuple(Variable(n, a, "input", known.get(n, "real")) for n, a in inputs.items())
    params = tuple(Variable(n, a, "parameter", known.get(n, "positive")) for n, a in (parameters or {}).items())
    zero = sympy.S.Zero
    symbols = {n: State(n, a, zero, zero, known.get(n, "real")).symbol for n, (a, _, _) in states.items()}
    scope = {v.name: v.symbol for v in (*ins, *params, SCALE)} | symbols | FUNCTIONS | {"sum_k": SumK, "sum_v": SumV}

    def parse(text: str) -> sympy.Expr:
        return sympy.sympify(text, locals=scope)

    made = tuple(State(n, a, parse(i), parse(u), known.get(n, "real")) for n, (a, i, u) in states.items())
    return with_domains(Recurrence(name, ins, params, made, parse(output), parse(variance) if variance else None, read))


PRECISION = "exp(g)*precision + (1 - exp(g))*I_p + b*k**2"
VARIANCE = "scale**2*sum_k(q**2/precision)"


def metaplastic(name: str = "metaplastic", precision_axes: str = "kv", b: str = "v", **more) -> Recurrence:
    """A posterior with a precision: mean and precision as a spec states them."""
    inputs = {"q": "k", "k": "k", "v": "v", "b": b, "g": ""} | more.pop("inputs", {})
    parameters = {"I_p": ""} | more.pop("parameters", {})
    states = {
        "mean": ("kv", "0", f"(exp(g)*precision*mean + v*k)/({PRECISION})"),
        "precision": (precision_axes, "I_p", PRECISION),
    }
    return build(name, states, "scale*sum_k(mean*q)", VARIANCE, parameters, **inputs, **more)


ALL = {
    r.name: r
    for r in (
        build("scalar", {"S": ("kv", "0", "exp(g)*S + v*k")}, "scale*sum_k(S*q)", q="k", k="k", v="v", g=""),
        build("vector", {"S": ("kv", "0", "exp(g)*S + v*k")}, "scale*sum_k(S*q)", q="k", k="k", v="v", g="k"),
        build("tied", {"S": ("kv", "0", "f*S + v*(1 - f)")}, "scale*sum_k(S*q)", q="k", f="k", v="v"),
        build(
            "before",
            {"S": ("kv", "0", "exp(g)*S + v*k")},
            "sum_k((S + u*k*v)*q)",
            parameters={"u": "k"},
            read="before",
            **{"q": "k", "k": "k", "v": "v", "g": "k"},
        ),
        build(
            "normalised",
            {"S": ("kv", "0", "S + v*k"), "z": ("k", "0", "z + k")},
            "sum_k(S*q)/maximum(abs(sum_k(z*q)), 1)",
            **{"q": "k", "k": "k", "v": "v"},
        ),
        metaplastic(),
        metaplastic("folded", "k", ""),
        metaplastic("folded_wide", "kv", ""),
        metaplastic("channelwise", inputs={"g": "k"}, parameters={"I_p": "k"}),
        build(
            "elementwise",
            {"S": ("kv", "0", "exp(-d*A)*S + d*x*k")},
            "sum_k(S*q)",
            parameters={"A": "kv"},
            domains={"d": "positive"},
            **{"q": "k", "k": "k", "x": "v", "d": "v"},
        ),
        build(
            "delta",
            {"S": ("kv", "0", "exp(g)*(S - beta*k*sum_k(k*S)) + beta*k*v")},
            "scale*sum_k(S*q)",
            **{"q": "k", "k": "k", "v": "v", "beta": "", "g": "k"},
        ),
        build(
            "kalman",
            {
                "P": ("kv", "1", "P/(a**2 + p*P) + b*k**2"),
                "m": ("kv", "0", "a*m/(a**2 + p*P) + v*b*k"),
            },
            "sum_k(m/P*q)",
            parameters={"a": "", "p": ""},
            **{"q": "k", "k": "k", "v": "v", "b": "v"},
        ),
        build(
            "momentum",
            {"S": ("kv", "0", "exp(g)*S + Z"), "Z": ("kv", "0", "eta*Z + v*k")},
            "sum_k(S*q)",
            parameters={"eta": ""},
            **{"q": "k", "k": "k", "v": "v", "g": ""},
        ),
        build(
            "nonlinear",
            {"S": ("kv", "W", "tanh(S + minimum(abs(v*k), 1)*sum_k(S*k)) - abs(S)*softplus(g)/2")},
            "sigmoid(sum_k(S*q)) + sum_k(maximum(S, 0)*q)*sqrt(1 + n**2)",
            variance="sum_k(S**2)*scale",
            parameters={"W": "kv"},
            **{"q": "k", "k": "k", "v": "v", "g": "", "n": ""},
        ),
        build(
            "coupled",
            {
                "S": ("kv", "0", "exp(g)*S + v*k - k*sum_k(S*k)*m"),
                "m": ("v", "1", "0.5*m + sum_k(S*q)/3"),
                "e": ("", "0", "0.9*e + sum_v(m*v)"),
            },
            "scale*sum_k(S*q) + m*e",
            **{"q": "k", "k": "k", "v": "v", "g": ""},
        ),
    )
}


class Tape(_Tape):
    """The oracle's interpreter, with values keyed by symbol."""

    def run(self, values, like):
        return super().run({s.name: x for s, x in values.items()}, like)

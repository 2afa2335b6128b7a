"""Recurrences of every shape the language can state, built by hand so that these tests need no spec and no analysis."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import sympy

from dspace.math.functions import Sigmoid, Softplus
from dspace.math.ir import SCALE, Analysis, Classification, Recurrence, State, SumK, SumV, Variable


@dataclass(frozen=True)
class Identity:
    """Stands for a spec in assembly."""

    name: str
    hash: str = "0" * 64


def inputs(**axes: str) -> tuple[Variable, ...]:
    domains = {"b": "nonnegative", "g": "nonpositive", "w": "nonpositive"}
    return tuple(Variable(name, a, "input", domains.get(name, "real")) for name, a in axes.items())


def parameter(name: str, axes: str, domain: str = "positive") -> Variable:
    return Variable(name, axes, "parameter", domain, init=1.0)


def build(name: str, ins, params, states: dict[str, tuple[str, str, str]], output: str, **extra) -> Recurrence:
    """States are ``name: (axes, init, update)``; formulas in the spelling of SymPy."""
    domains = extra.pop("domains", {})
    made = {
        n: State(n, a, sympy.Integer(0), sympy.Integer(0), domains.get(n, "real")) for n, (a, _, _) in states.items()
    }
    scope = {v.name: v.symbol for v in (*ins, *params, SCALE)} | {n: s.symbol for n, s in made.items()}
    scope |= {"sum_k": SumK, "sum_v": SumV, "sigmoid": Sigmoid, "softplus": Softplus}

    def read(text: str) -> sympy.Expr:
        return sympy.sympify(text, locals=scope)

    full = tuple(State(n, a, read(i), read(u), domains.get(n, "real")) for n, (a, i, u) in states.items())
    variance = extra.pop("variance", None)
    return Recurrence(
        name, tuple(ins), tuple(params), full, read(output), read(variance) if variance else None, **extra
    )


RECURRENCES = {
    r.name: r
    for r in (
        build(
            "scalar_decay",
            inputs(q="k", k="k", v="v", g=""),
            (),
            {"S": ("kv", "0", "exp(g)*S + v*k")},
            "scale*sum_k(S*q)",
        ),
        build(
            "key_decay",
            inputs(q="k", k="k", v="v", w="k"),
            (),
            {"S": ("kv", "0", "exp(w)*S + v*k")},
            "scale*sum_k(S*q)",
        ),
        build(
            "ratio",
            inputs(q="k", k="k", v="v", b="v", g=""),
            (parameter("I_p", ""),),
            {"M": ("kv", "0", "exp(g)*M + v*k"), "Ibar": ("kv", "0", "exp(g)*Ibar + b*k**2")},
            "scale*sum_k(q*M/(Ibar + I_p))",
            variance="scale**2*sum_k(q**2/(Ibar + I_p))",
            domains={"Ibar": "nonnegative"},
        ),
        build(
            "erase",
            inputs(q="k", k="k", v="v", beta="", g=""),
            (),
            {"S": ("kv", "0", "exp(g)*S + sigmoid(beta)*k*(v - sum_k(exp(g)*S*k))")},
            "scale*sum_k(S*q)",
        ),
        build(
            "bonus_before",
            inputs(q="k", k="k", v="v", w="k"),
            (parameter("u", "k", "real"),),
            {"S": ("kv", "0", "exp(w)*S + v*k")},
            "scale*sum_k((S + u*v*k)*q)",
            read="before",
        ),
        build(
            "normalised",
            inputs(q="k", k="k", v="v"),
            (parameter("eps", ""),),
            {"S": ("kv", "0", "S + v*softplus(k)"), "z": ("k", "eps", "z + softplus(k)")},
            "scale*sum_k(S*q)/(eps + sum_k(z*softplus(k)))",
        ),
        build(
            "coupled",
            inputs(q="k", k="k", v="v", g="", r="kv"),
            (parameter("A", "kv"), parameter("lam", "v"), parameter("c", "")),
            {
                "S": ("kv", "A", "exp(g)*S + tanh(P)*k + 0.1*r"),
                "P": ("kv", "0", "sigmoid(A)*P + 0.1*v*k - 0.2*k*sum_k(S*k)*lam"),
                "m": ("v", "lam", "0.5*m + sum_k(S*q)"),
                "z": ("k", "1", "0.9*z + c*sum_v(P*m)"),
                "e": ("", "c", "0.9*e + sum_k(z*k)*0.1"),
            },
            "scale*sum_k(S*q*z) + m*e + sum_v(sum_k(P))*0.01",
        ),
        build(  # names that generated code uses for itself
            "named",
            inputs(torch="k", i="k", range="v", zero="", sum0="v"),
            (parameter("size_k", ""), parameter("numpy", "v")),
            {
                "o": ("kv", "0", "sigmoid(zero)*o + size_k*range*i"),
                "past_o": ("kv", "0", "0.9*past_o + o*i*0.1"),
                "saved_o": ("v", "numpy", "0.5*saved_o + sum0*numpy"),
            },
            "scale*sum_k((o + past_o)*torch) + saved_o",
        ),
    )
}


def analysis_of(recurrence: Recurrence) -> Analysis:
    from dspace.math import adjoint
    from dspace.math.classes import affine_states

    letter = Classification("g", "other", "a recurrence of the tests", affine_states(recurrence))
    return Analysis(recurrence, recurrence, letter, adjoint(recurrence), (), {}, ())


def load(source: str, path: Path) -> ModuleType:
    """Import generated source from ``path``."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module

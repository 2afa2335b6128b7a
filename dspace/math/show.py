"""An analysis for people and machines: plain text, LaTeX, a dictionary."""

from __future__ import annotations

import textwrap
from typing import Any

import sympy

from dspace.math.ir import Analysis, Recurrence
from dspace.math.printing import axes_text, latex_name, latex_of, text_of
from dspace.math.separate import separable

WIDTH = 110

PLANS = {
    "a": "chunkwise: matmuls within and between chunks",
    "b": "chunkwise: matmuls within and between chunks, decay relative to the chunk",
    "fold": "chunkwise: small states first, then as the class that remains",
    "c": "every chunk in parallel, token by token in registers; chunk boundaries by matmul",
    "d": "sequential, token by token (the chunkwise plan, by triangular inverse, comes later)",
}
"""How each class runs."""
COMPOSED = (
    "every chunk in parallel, token by token in registers; chunk boundaries by composing what chunks do to states"
)
SEQUENTIAL = "sequential, token by token"
"""How the others run: with affine states, and without."""


def text(analysis: Analysis, *, passes: bool = False) -> str:
    """The mathematics of a variant as plain text: normal form, class, why, gradients, ranges, cost."""
    r, c = analysis.recurrence, analysis.classification
    out = [f"{r.name}: {r.title}" if r.title else r.name]
    if r.references:
        out.append("  " + ", ".join(r.references))
    out += ["", f"class {c.letter}: {c.name}", *_wrap("why: " + c.reason)]
    out += _wrap("runs: " + _runs(analysis))
    out += _section("inputs, one value per token and head", [_declared(v) for v in r.inputs])
    if r.parameters:
        out += _section("parameters, one value per head", [_declared(v) for v in r.parameters])
    out += _section("states and what one token does to them", _states(r))
    reading = "after" if r.read == "after" else "before"
    out += _section(f"readout, {reading} the update", _readout(r))
    out += _fold(analysis)
    if analysis.source != r:
        out += _section("as the spec states it", [*_states(analysis.source), *_readout(analysis.source)])
    out += _section("tests", list(c.steps))
    out += _section(
        "gradients of one token (d_x: cotangent of x; x_new: after the token)",
        [f"d {name} = {text_of(e)}" for name, e in analysis.adjoint.wrt.items()],
    )
    out += _stability(analysis)
    out += _section(
        "ranges", list(analysis.ranges) or ["no exponential overflows and no divisor is zero in the declared domains"]
    )
    cost = {name: text_of(e) for name, e in analysis.cost.items()}
    out += _section("cost per token and head (K, V channels, C tokens a chunk)", [f"{n}: {e}" for n, e in cost.items()])
    if passes:
        out += _section("passes", [_pass(p) for p in analysis.passes])
    return "\n".join(out) + "\n"


def _runs(analysis: Analysis) -> str:
    """The plan of a class; matmuls know no decay along v, save at chunk boundaries, and none that has no logarithm."""
    c, table = analysis.classification, analysis.recurrence.axes_table()
    for a in c.affine or ():
        known = separable(a, table) if a.decay_axes and c.letter == "c" else "v" not in a.decay_axes
        if c.letter not in PLANS or a.log_decay is None or not known:
            return COMPOSED
    return PLANS.get(c.letter, SEQUENTIAL)


def latex(analysis: Analysis) -> str:
    """The recurrence and its readout as an ``align*`` environment, with the class in a sentence before it."""
    r, c = analysis.recurrence, analysis.classification
    lines = [rf"{latex_name(s.name)}_t &= {_read(s.update, r, 't-1')}" for s in r.states]
    seen = "t" if r.read == "after" else "t-1"
    lines.append(rf"o_t &= {_read(r.output, r, seen)}")
    if r.variance is not None:
        lines.append(rf"s^2_t &= {_read(r.variance, r, seen)}")
    starts = ", ".join(f"${latex_name(s.name)}_0 = {latex_of(s.init)}$" for s in r.states)
    head = f"% {r.name}: {r.title}\n" if r.title else f"% {r.name}\n"
    body = " \\\\\n  ".join(lines)
    return (
        f"{head}Class {c.letter} ({c.name}), with {starts}.\n\\begin{{align*}}\n  {body}\n\\end{{align*}}\n"
        + _latex_gradients(analysis)
    )


def as_dict(analysis: Analysis) -> dict[str, Any]:
    """Everything of :func:`text` in plain types, formulas as text that SymPy and Python read."""
    r, c = analysis.recurrence, analysis.classification
    readout = {"read": r.read, "output": str(r.output), "variance": None if r.variance is None else str(r.variance)}
    return {
        "name": r.name,
        "title": r.title,
        "references": list(r.references),
        "class": c.letter,
        "class_name": c.name,
        "reason": c.reason,
        "plan": _runs(analysis),
        "steps": list(c.steps),
        "inputs": [_variable(v) for v in r.inputs],
        "parameters": [_variable(v) for v in r.parameters],
        "states": [_state(s) for s in r.states],
        "readout": readout,
        "source": {"states": [_state(s) for s in analysis.source.states], "output": str(analysis.source.output)},
        "gradients": {name: str(e) for name, e in analysis.adjoint.wrt.items()},
        "ranges": list(analysis.ranges),
        "cost": {name: str(e) for name, e in analysis.cost.items()},
        "passes": [
            {"name": p.name, "ops_before": p.ops_before, "ops_after": p.ops_after, "seconds": p.seconds, "note": p.note}
            for p in analysis.passes
        ],
    }


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(w for line in lines for w in _wrap(line))]


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_long_words=False)


def _declared(v) -> str:
    doc = f": {v.doc}" if v.doc else ""
    start = f", starts at {v.init:g}" if v.init is not None else ""
    return f"{v.name}{axes_text(v.axes)} {v.domain}{start}{doc}"


def _states(r: Recurrence) -> list[str]:
    lines = []
    for s in r.states:
        lines.append(f"{s.name}{axes_text(s.axes)} ← {text_of(s.update)}")
        sign = f", {s.domain}" if s.domain != "real" else ""
        lines.append(f"    starts at {text_of(s.init)}{sign}" + (f"; {s.name} = {s.doc}" if s.doc else ""))
    return lines


def _readout(r: Recurrence) -> list[str]:
    lines = [f"output = {text_of(r.output)}"]
    if r.variance is not None:
        lines.append(f"variance = {text_of(r.variance)}")
    return lines


def _fold(analysis: Analysis) -> list[str]:
    readout = analysis.classification.readout
    if analysis.classification.letter != "fold" or readout is None:
        return []
    lines = []
    for read in readout.reads:
        for state, query in (read.queries or {}).items():
            lines.append(f"{read.symbol} = Σₖ({state}·query) with query = {text_of(query)}")
    lines.append(f"output = {text_of(readout.output)}")
    return _section("the fold: small states leave the sum over the large one", lines)


def _stability(analysis: Analysis) -> list[str]:
    from dspace.math.stability import sentences

    found = sentences(analysis)
    return _section("stability and plasticity", list(found)) if found else []


def _pass(p) -> str:
    note = f"  {p.note}" if p.note else ""
    return f"{p.name:<12} {p.ops_before:>4} → {p.ops_after:>4} operations, {1e3 * p.seconds:.1f} ms{note}"


def _read(expr: sympy.Expr, r: Recurrence, when: str) -> str:
    return latex_of(expr.xreplace({s.symbol: sympy.Symbol(f"{s.name}@{when}") for s in r.states}))


def _latex_gradients(analysis: Analysis) -> str:
    lines = [
        rf"\frac{{\partial L}}{{\partial {latex_name(n)}}} &= {latex_of(e)}" for n, e in analysis.adjoint.wrt.items()
    ]
    body = " \\\\\n  ".join(lines)
    return f"Gradients of one token ($x^{{+}}$: after the token):\n\\begin{{align*}}\n  {body}\n\\end{{align*}}\n"


def _variable(v) -> dict[str, Any]:
    return {"name": v.name, "axes": v.axes, "domain": v.domain, "doc": v.doc, "init": v.init}


def _state(s) -> dict[str, Any]:
    return {
        "name": s.name,
        "axes": s.axes,
        "domain": s.domain,
        "doc": s.doc,
        "init": str(s.init),
        "update": str(s.update),
    }

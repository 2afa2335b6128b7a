"""A reduction told to people: the substitution, the proof equation by equation, LaTeX, a dictionary."""

from __future__ import annotations

from typing import Any

import sympy

from dspace.math.printing import latex_name, latex_of, text_of
from dspace.math.proofs import EPS, unread
from dspace.math.reductions import Answer, Reduction


def substitution_text(reduction: Reduction) -> str:
    """The substitution in a line, such as ``b = 0, q = I_p·q`` or ``I_p → ∞ with q = I_p·q``."""
    claim = reduction.claim
    axes = {v.name: v.axes for v in claim.source.variables}
    target = {v.name: v.axes for v in claim.target.variables}
    parts = []
    for name, e in reduction.substitution.items():
        if e.is_Symbol and e.name == name:
            lost = "".join(a for a in axes[name] if a not in target[name])
            parts.append(f"{name} equal along {' and '.join(lost)}")
        else:
            parts.append(f"{name} = {text_of(e)}")
    said = ", ".join(parts)
    if reduction.exact:
        return said or "the same recurrence"
    goal = "∞" if claim.direction == "infinity" else "0"
    return f"{claim.limit} → {goal}" + (f" with {said}" if said else "")


def proof(reduction: Reduction) -> tuple[str, ...]:
    """The proof, a line an equation; in a limit ``eps`` is ``1/p`` or ``p`` of the parameter ``p`` that moves."""
    claim, lines = reduction.claim, []
    source, target = claim.source, claim.target
    lines.append(f"{source.name} → {target.name}: {substitution_text(reduction)}")
    for s in source.states:
        value = claim.states[s.symbol]
        if value == unread(s):
            lines.append(f"{s.name} is read by nothing that remains" + ("" if reduction.exact else " in the limit"))
        else:
            lines.append(f"{s.name} = {text_of(value)}" + (f" of {target.name}" if value.free_symbols else " always"))
    if claim.limit is not None:
        lines.append(f"eps = {'1/' if claim.direction == 'infinity' else ''}{claim.limit} → 0")
    for e in reduction.verdict.equations:
        lines.append(f"{e.what}: {text_of(e.left)} {'=' if reduction.exact else '→'} {text_of(e.right)}")
    for what, error in reduction.verdict.errors.items():
        size = "not finite to first order" if error is None else f"eps·({text_of(error)}) + O(eps²)"
        lines.append(f"error of {what}: {size}")
    return tuple(lines)


def latex(reduction: Reduction) -> str:
    """The proof as an ``align*`` environment."""
    rows = []
    for x, e in reduction.claim.variables.items():
        if x.name in reduction.substitution:
            rows.append(rf"{latex_name(x.name)} &:= {latex_of(e)}")
    arrow = "=" if reduction.exact else r"\xrightarrow{\epsilon \to 0}"
    for equation in reduction.verdict.equations:
        rows.append(rf"{_latex_eps(equation.left)} &{arrow} {_latex_eps(equation.right)}")
    for error in reduction.verdict.errors.values():
        if error is not None:
            rows.append(rf"\text{{error}} &= \epsilon \left({latex_of(error)}\right) + O(\epsilon^2)")
    body = " \\\\\n  ".join(rows)
    return f"\\begin{{align*}}\n  {body}\n\\end{{align*}}\n"


def _latex_eps(expr: sympy.Expr) -> str:
    return latex_of(expr.xreplace({EPS: sympy.Symbol("epsilon")})).replace(r"\mathrm{epsilon}", r"\epsilon")


def text(answer: Answer) -> str:
    """An answer in full: every reduction with its proof, or why there is none."""
    lines = []
    for kind, found in (("exact", answer.exact), ("limit", answer.limit)):
        if found is not None:
            lines += [f"{kind}: {answer.source} becomes {answer.target} under {substitution_text(found)}", "proof"]
            lines += [f"  {line}" for line in proof(found)[1:]] + [""]
    if answer.failure is not None:
        lines.append(f"no reduction of {answer.source} to {answer.target} was found: {answer.failure.what}")
        if answer.failure.counterexample:
            lines.append("the nearest attempt is false at")
            lines += [f"  {name} = {value}" for name, value in answer.failure.counterexample.items()]
    return "\n".join(lines).rstrip() + "\n"


def as_dict(answer: Answer) -> dict[str, Any]:
    """An answer in plain types."""

    def told(r: Reduction | None) -> dict[str, Any] | None:
        if r is None:
            return None
        return {
            "exact": r.exact,
            "text": substitution_text(r),
            "substitution": {name: str(e) for name, e in r.substitution.items()},
            "states": {x.name: str(e) for x, e in r.claim.states.items()},
            "limit": None if r.exact else [str(r.claim.limit), r.claim.direction],
            "order": None if r.exact else 1,
            "errors": {what: str(e) for what, e in r.verdict.errors.items()},
            "proof": list(proof(r)),
            "latex": latex(r),
        }

    failure = answer.failure
    return {
        "source": answer.source,
        "target": answer.target,
        "exact": told(answer.exact),
        "limit": told(answer.limit),
        "failure": None if failure is None else {"what": failure.what, "counterexample": dict(failure.counterexample)},
        "seconds": answer.seconds,
    }

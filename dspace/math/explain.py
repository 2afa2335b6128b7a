"""A reduction told to people: the substitution, the proof equation by equation, LaTeX, a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from dspace.math.intervals import excludes_zero
from dspace.math.ir import DOMAINS, Axes, Recurrence, SumK, SumV, axes_of
from dspace.math.printing import latex_name, latex_of, text_of
from dspace.math.proofs import EPS, Claim, canonical, compared_outputs, unread
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
    if reduction.carried:
        return f"{said}, {' and '.join(reduction.carried)} carried beside"
    if reduction.exact:
        return said or "the same recurrence"
    goal = "∞" if claim.direction == "infinity" else "0"
    return f"{claim.limit} → {goal}" + (f" with {said}" if said else "")


def conditions(reduction: Reduction) -> tuple[str, ...]:
    """Where the substitution is defined, if not everywhere: what it divides by or takes the logarithm of."""
    claim = reduction.claim
    domains = {v.symbol: DOMAINS[v.domain] for v in (*claim.source.variables, *claim.target.variables)}
    found: dict[str, None] = {}
    for e in reduction.substitution.values():
        for divisor in sympy.Mul.make_args(sympy.fraction(sympy.together(e))[1]):
            base = divisor.base if divisor.is_Pow else divisor
            if base != claim.limit and not excludes_zero(base, domains):
                found[f"{text_of(base)} ≠ 0"] = None
        for logarithm in e.atoms(sympy.log):
            found[f"{text_of(logarithm.args[0])} > 0"] = None
    return tuple(found)


def proof(reduction: Reduction) -> tuple[str, ...]:
    """The proof, a line an equation; in a limit ``ε`` is ``1/p`` or ``p`` of the parameter ``p`` that moves."""
    claim, lines = reduction.claim, []
    source, target = claim.source, claim.target
    lines.append(f"{source.name} → {target.name}: {substitution_text(reduction)}")
    if conditions(reduction):
        lines.append(f"defined where {', '.join(conditions(reduction))}")
    if reduction.carried:
        lines.append(f"{', '.join(reduction.carried)} of {target.name}, whatever their values, are given at each token")
    for s in source.states:
        value = claim.states[s.symbol]
        if value == unread(s):
            lines.append(f"{s.name} is read by nothing that remains" + ("" if reduction.exact else " in the limit"))
        else:
            lines.append(
                f"{s.name} = {text_of(value)}" + (f" of {target.name}" if _of_target(reduction, value) else "")
            )
            lines[-1] += "" if _of_target(reduction, value) else " always"
    if claim.limit is not None:
        lines.append(f"ε = {'1/' if claim.direction == 'infinity' else ''}{claim.limit} → 0")
    for e in reduction.verdict.equations:
        lines.append(f"{e.what}: {text_of(_named(e.left, claim))} {'=' if reduction.exact else '→'} {text_of(e.right)}")
    for what, error in reduction.verdict.errors.items():
        order = reduction.verdict.orders.get(what)
        small = "ε" if order == 1 else f"ε^{order}"
        rest = f"O(ε^{(order or 0) + 1})"
        size = (
            "of an order that cancellation does not give"
            if error is None
            else f"{small}·({text_of(_named(error, claim))}) + {rest}"
        )
        lines.append(f"error of {what}: {size}")
    lines.append(_induction(reduction))
    return tuple(lines)


def _of_target(reduction: Reduction, value: sympy.Expr) -> bool:
    return any(t.symbol in value.free_symbols for t in reduction.claim.target.states)


def _induction(reduction: Reduction) -> str:
    if reduction.exact:
        return "the states agree at the start and after each token if before it: so do the outputs, token by token"
    return (
        "the states agree at the start and stay within a multiple of ε of each other from token to token, and every "
        "equation holds at ε = 0 however far they are off in units of ε: so do the outputs in the limit"
    )


def latex(reduction: Reduction) -> str:
    """The claim, both recurrences, the substitution, every equation and the conclusion, for a paper that has amsmath."""
    claim = reduction.claim
    source, target = claim.source, claim.target
    goal = r"\infty" if claim.direction == "infinity" else "0"
    beside = " and ".join(f"${latex_name(name)}$" for name in reduction.carried)
    kept = f", {beside} carried beside" if beside else ""
    way = f"exactly{kept}" if reduction.exact else rf"in the limit ${latex_name(str(claim.limit))} \to {goal}$"
    lines = [rf"\paragraph{{Claim.}} {_words(source.name)} becomes {_words(target.name)} {way}."]
    for r in (source, target):
        lines += [rf"The recurrence of {_words(r.name)}, read {r.read} the update:", _align(_recurrence_rows(r))]
    lines += [*_latex_substitution(reduction), r"\paragraph{Proof.} With this,", _align(_equation_rows(reduction))]
    if reduction.verdict.errors:
        lines += ["where the two sides differ by", _align(_error_rows(reduction))]
    words = _induction(reduction).replace("ε = 0", r"$\epsilon = 0$").replace("ε", r"$\epsilon$")
    lines.append(rf"{words[0].upper()}{words[1:]}. \hfill$\square$")
    return "\n".join(lines) + "\n"


def _latex_substitution(reduction: Reduction) -> list[str]:
    claim = reduction.claim
    table: dict[sympy.Symbol, Axes] = {**claim.source.axes_table(), **claim.target.axes_table()}
    rows, ties = [], []
    names = {v.name: v.axes for v in claim.source.variables}
    for name, e in reduction.substitution.items():
        lost = [a for a in names[name] if a not in axes_of(e, table)] if e.free_symbols <= set(table) else []
        if e.is_Symbol and e.name == name:
            ties.append(f"${latex_name(name)}$ equal along ${'$ and $'.join(lost)}$")
        else:
            rows.append(rf"{latex_name(name)} &:= {latex_of(e)}")
    unnamed = []
    for s in claim.source.states:
        value = claim.states[s.symbol]
        if value == unread(s):
            unnamed.append(f"${latex_name(s.name)}$")
        else:
            rows.append(rf"{latex_name(s.name)} &\equiv {latex_of(value)}")
    if claim.limit is not None:
        inverse = latex_name(str(claim.limit))
        rows.append(rf"\epsilon &:= {'1/' + inverse if claim.direction == 'infinity' else inverse} \to 0")
    lines = ["Substitute, on the right the symbols of " + _words(claim.target.name) + ":", _align(rows)]
    if ties:
        lines.append("with " + ", ".join(ties) + ".")
    if unnamed:
        lines.append(f"Nothing that remains reads {', '.join(unnamed)}.")
    where = [c.replace("≠", r"\neq").replace("·", r" \cdot ") for c in conditions(reduction)]
    if where:
        lines.append("It is defined where $" + "$, $".join(where) + "$.")
    return lines


def _recurrence_rows(r: Recurrence) -> list[str]:
    rows = [
        rf"{latex_name(s.name)} &\leftarrow {latex_of(s.update)}, & {latex_name(s.name)}_0 &= {latex_of(s.init)}"
        for s in r.states
    ]
    return [*rows, rf"o &= {latex_of(r.output)}"]


def _equation_rows(reduction: Reduction) -> list[str]:
    """Each equation: what the source does after the substitution, the same with contractions sorted, the target's."""
    claim = reduction.claim
    table: Mapping[sympy.Symbol, Axes] = {
        **{unread(s): s.axes for s in claim.source.states},
        **claim.source.axes_table(),
        **claim.target.axes_table(),
        EPS: "kv",
    }
    before = _unsubstituted(reduction)
    rows = []
    for e in reduction.verdict.equations:
        steps = [e.left]
        sorted_ = canonical(e.left, table) if e.left.has(SumK, SumV) else e.left
        if sorted_ not in (e.left, e.right) and sympy.count_ops(sorted_) < 60:
            steps.append(sorted_)
        chain = " = ".join(_latex_eps(_named(x, claim)) for x in steps)
        if reduction.exact:
            chain += "" if steps[-1] == e.right else rf" = {_latex_eps(e.right)}"
        elif e.left != e.right:
            chain += rf" \xrightarrow{{\epsilon \to 0}} {_latex_eps(e.right)}"
        start = before.get(e.what)
        given = "" if start is None or start == e.left else rf"{latex_of(start)} \;\mapsto\; "
        rows.append(rf"&\text{{{_words(e.what)}:}} && {given}{chain}")
    return rows


def _unsubstituted(reduction: Reduction) -> dict[str, sympy.Expr]:
    """What each equation is about, in the source's own symbols."""
    source = reduction.claim.source
    told = {f"the update of {s.name}": s.update for s in source.states}
    told |= {f"the start of {s.name}": s.init for s in source.states}
    return (
        told
        | {"the output": compared_outputs(source, reduction.claim.target)[0]}
        | ({} if source.variance is None else {"the variance": source.variance})
    )


def _named(expr: sympy.Expr, claim: Claim) -> sympy.Expr:
    """``expr`` with states that nothing reads under their own names."""
    return expr.xreplace({unread(s): s.symbol for s in claim.source.states})


def _error_rows(reduction: Reduction) -> list[str]:
    rows = []
    for what, error in reduction.verdict.errors.items():
        order = reduction.verdict.orders.get(what)
        power = "" if order == 1 else f"^{{{order}}}"
        size = (
            r"\text{an unknown order}"
            if error is None or order is None
            else (
                rf"\epsilon{power} \left({latex_of(_named(error, reduction.claim))}\right) + O(\epsilon^{{{order + 1}}})"
            )
        )
        rows.append(rf"&\text{{{_words(what)}:}} && {size}")
    return rows


def _align(rows: list[str]) -> str:
    body = " \\\\\n  ".join(rows)
    return f"\\begin{{align*}}\n  {body}\n\\end{{align*}}"


def _words(name: str) -> str:
    return name.replace("_", r"\_")


def _latex_eps(expr: sympy.Expr) -> str:
    return latex_of(expr.xreplace({EPS: sympy.Symbol("epsilon")})).replace(r"\mathrm{epsilon}", r"\epsilon")


def text(answer: Answer) -> str:
    """An answer in full: every reduction with its proof, or why there is none."""
    lines = []
    for kind, found in (("exact", answer.exact), ("limit", answer.limit), ("fold", answer.fold)):
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
            "conditions": list(conditions(r)),
            "carried": list(r.carried),
            "states": {x.name: str(e) for x, e in r.claim.states.items()},
            "limit": None if r.exact else [str(r.claim.limit), r.claim.direction],
            "order": r.order,
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
        "fold": told(answer.fold),
        "failure": None if failure is None else {"what": failure.what, "counterexample": dict(failure.counterexample)},
        "seconds": answer.seconds,
    }

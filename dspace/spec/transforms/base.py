"""What transforms share: their error, how a write factorises, how a state is retained, how tables become a spec."""

from __future__ import annotations

from typing import Any

import sympy

from dspace.errors import SpecError, UserError
from dspace.math.ir import SumK, SumV, Write, axes_of
from dspace.spec.model import Spec
from dspace.spec.printing import formula
from dspace.spec.syntax import Name, walk


class TransformError(UserError):
    """A transform does not apply to a spec; ``cure`` says what would."""

    def __init__(self, message: str, cure: str) -> None:
        super().__init__(f"{message}\n  cure: {cure}")
        self.message = message
        self.cure = cure


def query_of(output: sympy.Expr, state: sympy.Symbol) -> tuple[sympy.Expr, sympy.Expr] | None:
    """``(c, q)`` of an output ``c * sum_k(q * state)`` exactly of that shape, else None."""
    sums = [n for n in output.atoms(SumK) if state in n.free_symbols]
    if len(sums) != 1:
        return None
    coefficient = sympy.diff(output.subs(sums[0], _HOLE), _HOLE)
    inner = sums[0].args[0]
    query = sympy.diff(inner, state)
    if coefficient.has(state, _HOLE) or query.has(state) or sympy.expand(inner - query * state) != 0:
        return None
    return coefficient, query


_HOLE = sympy.Dummy("hole", real=True)


def factorise(write: sympy.Expr, spec: Spec) -> Write:
    """Write term as ``value * key``: factors that carry ``k`` make the key, all others the value."""
    factors = sympy.Mul.make_args(sympy.factor_terms(write))
    if any(axes_in(f, spec) == "kv" for f in factors):
        factors = sympy.Mul.make_args(sympy.factor(write))
    key, value = sympy.Integer(1), sympy.Integer(1)
    for factor in factors:
        axes = axes_in(factor, spec)
        if axes == "kv":
            raise TransformError(
                f"the write {formula(write)} does not factorise into f(v) * g(k)",
                "write one outer product per token, such as v * k",
            )
        if "k" in axes:
            key *= factor
        else:
            value *= factor
    return Write(key=key, value=value)


def axes_in(expr: sympy.Expr, spec: Spec) -> str:
    table = {v.symbol: v.axes for v in spec.variables.values()}
    table |= {s: (spec.state[n].axes if n in spec.state else "kv") for n, s in spec.state_symbols.items()}
    return axes_of(expr, table)


def free_name(spec: Spec, wanted: str, table: str) -> str:
    """``wanted``, unless the formulas already use that name for something else."""
    used = spec.meanings.used
    candidates = [wanted, f"{wanted}_meta", f"{wanted}_meta2"]
    taken = {*spec.inputs, *spec.parameters, *spec.define, *spec.state, *spec.layer}
    for name in candidates:
        if name in getattr(spec, table) and name not in used:
            return name  # declared for the transform
        if name not in taken and name not in used:
            return name
    raise TransformError(f"the names {', '.join(candidates)} are taken", "rename one of them")


def retention(update: sympy.Expr, state: sympy.Symbol) -> sympy.Expr | None:
    """Factor by which ``update`` keeps ``state`` outside of contractions; None where it is not linear in it."""
    holes = {n: sympy.Dummy(real=True) for n in update.atoms(SumK, SumV) if state in n.free_symbols}
    # The outermost contractions first: what stands inside of them goes with them.
    bare = update.subs(dict(sorted(holes.items(), key=lambda item: -sympy.count_ops(item[0]))))
    kept = sympy.simplify(sympy.diff(bare, state))
    return None if kept.has(state, *holes.values()) or kept.is_zero else kept


def towards(update: sympy.Expr, state: sympy.Symbol, kept: sympy.Expr, target: sympy.Expr) -> sympy.Expr:
    """``update`` with what is forgotten of ``state`` replaced by ``target``: ``kept * S`` gains ``(1 - kept) * target``."""
    moved = update.xreplace({state: state + (1 / kept - 1) * target})
    for kind in (SumK, SumV):
        moved = moved.replace(kind, lambda inner, kind=kind: kind(sympy.expand(inner)))
    return sympy.expand(moved)


def rebuild(spec: Spec, tables: dict[str, Any]) -> Spec:
    """The spec of ``tables``, less what ``spec`` used and they use no more.

    What nothing used before is left alone: it may be declared for a transform to come. Raises TransformError where
    the tables do not hold together.
    """
    from dspace.spec.check import Report, check
    from dspace.spec.reader import Source, locator, validate

    def made() -> Spec:
        report = Report(locator([Source(f"<{spec.name}>")]))
        result = validate(tables, report)
        result.__dict__["meanings"] = check(result, report, unused=False)
        return result

    try:
        result = made()
        lost = {n for n in spec.meanings.used - result.meanings.used if n in spec.variables}
        if not lost:
            return result
        for table in ("inputs", "parameters"):
            tables[table] = {n: d for n, d in tables.get(table, {}).items() if n not in lost}
        tables["layer"] = _without(spec, tables.get("layer", {}), tables["inputs"], lost)
        return made()
    except SpecError as error:
        first = error.problems[0]
        raise TransformError(
            f"the result would not hold together: {first.where}: {first.message}", first.cure or "change the base"
        ) from None


def _without(spec: Spec, layer: dict[str, str], inputs: dict[str, Any], lost: set[str]) -> dict[str, str]:
    """Recipes less those of lost inputs and the shared definitions that only they used."""
    kept = {key: text for key, text in layer.items() if key not in lost}
    while True:
        named = {
            n.id
            for key in kept
            if key in spec.meanings.layer
            for n in walk(spec.meanings.layer[key])
            if isinstance(n, Name)
        }
        fewer = {key: text for key, text in kept.items() if key in inputs or key in named}
        if len(fewer) == len(kept):
            return kept
        kept = fewer

"""Whether the formulas of a spec hold together: names, axes, domains, structure, layer. All problems at once."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from dspace.errors import Problem, SpecError
from dspace.math.ir import ALL_AXES, DOMAINS, SCALE, Axes, join_axes
from dspace.spec.domains import counterexample
from dspace.spec.expressions import ARITY, Meaning, Scope, interpret, listed
from dspace.spec.layer import check_layer
from dspace.spec.model import STRUCTURES, Spec
from dspace.spec.syntax import FormulaError, Name, Node, Number, parse, walk

RESERVED = {
    "mean": "it is the posterior's mean",
    "precision": "it is the posterior's precision",
    "scale": "it is the readout scale, always present",
    "initial_state": "it is an argument of every generated function",
    "output_final_state": "it is an argument of every generated function",
    "output_variance": "it is an argument of every generated function",
    "cu_seqlens": "it is an argument of every generated function",
    "variance": "it is a result of every generated function",
    "output": "it is a result of every generated function",
}


@dataclass(frozen=True)
class Meanings:
    """What the formulas of a spec mean, by dotted place; ``axes`` of ``mean`` and ``precision`` themselves."""

    formulas: Mapping[str, Meaning]
    axes: Mapping[str, Axes]
    layer: Mapping[str, Node]
    used: frozenset[str] = frozenset()
    """Names that the formulas spell out."""


@dataclass
class Report:
    """Collects problems by dotted place; ``locate`` turns a place and a column into a place in a file."""

    locate: Callable[[str, int | None], dict] = lambda place, column: {}
    problems: list[Problem] = field(default_factory=list)

    def __call__(self, place: str, message: str, column: int | None = None, cure: str = "", suggestion: str = ""):
        at = self.locate(place, column)
        problem = Problem(message, where=place, cure=cure, suggestion=suggestion, **at)
        if problem not in self.problems:
            self.problems.append(problem)

    def at(self, place: str) -> Callable[..., None]:
        """A reporter for the formula at one place."""
        return lambda message, column, cure="", suggestion="": self(place, message, column, cure, suggestion)

    def finish(self) -> None:
        if self.problems:
            raise SpecError(sorted(self.problems, key=lambda p: (p.file, p.line, p.column)))


def check(spec: Spec, report: Report | None = None, *, unused: bool = True, domains: bool = True) -> Meanings:
    """Meanings of all formulas. Raises SpecError with every problem found.

    ``unused`` names are problems too; without ``domains`` no formula is searched for forbidden values.
    """
    report = report or Report()
    return _Checker(spec, report, domains).run(unused)


class _Checker:
    def __init__(self, spec: Spec, report: Report, domains: bool) -> None:
        self.spec = spec
        self.domains = domains
        self.report = report
        self.formulas: dict[str, Meaning] = {}
        self.axes: dict[str, Axes] = {}
        self.defines: dict[str, Node] = {}
        self.extents: dict[str, tuple[int, int]] = {}
        self.broken: set[str] = set()
        self.used: set[str] = set()

    def run(self, unused: bool) -> Meanings:
        spec = self.spec
        self.check_names()
        self.check_form()
        self.parse_defines()
        if spec.is_posterior:
            self.check_posterior()
        self.check_states()
        self.check_readout()
        if unused and not self.report.problems:
            self.check_use()
        layer = check_layer(spec, self.report)
        self.check_inits()
        self.report.finish()
        return Meanings(self.formulas, self.axes, layer, frozenset(self.used))

    # Names ------------------------------------------------------------------------------------------------

    def check_names(self) -> None:
        spec = self.spec
        seen: dict[str, str] = {}
        tables: dict[str, Iterable[str]] = {
            "inputs": spec.inputs,
            "parameters": spec.parameters,
            "define": spec.define,
            "state": spec.state,
        }
        for table, entries in tables.items():
            for name in entries:
                place = f"{table}.{name}"
                if not name.isascii() or not name.isidentifier() or name.startswith("_") or len(name) > 40:
                    self.report(
                        place,
                        f"{name[:40]!r} is not a name",
                        cure="use letters, digits and _, start with a letter, at most 40 characters",
                    )
                elif keyword.iskeyword(name):
                    self.report(place, f"{name!r} is a word of Python", cure=f"rename it, for example {name}_")
                elif name in RESERVED:
                    self.report(place, f"{name!r} is reserved: {RESERVED[name]}", cure="choose another name")
                elif name in ARITY:
                    self.report(place, f"{name!r} is a function of the language", cure="choose another name")
                elif name.startswith("d_") or name.endswith("_new"):
                    self.report(place, f"{name!r} is reserved for gradients and updates", cure="choose another name")
                if name in seen:
                    self.report(
                        place, f"{name!r} is declared in [{seen[name]}] already", cure="rename or remove one of them"
                    )
                seen.setdefault(name, table)
        if not spec.inputs:
            self.report("inputs", "the variant has no inputs", cure='declare them, for example q = "k"')

    def check_form(self) -> None:
        spec = self.spec
        posterior = [t for t in ("prior", "forgetting", "precision", "mean") if getattr(spec, t) is not None]
        if spec.state and posterior:
            self.report(
                "state",
                f"a spec is a posterior ([{'], ['.join(posterior)}]) or a recurrence ([state.NAME]), not both",
                cure="remove one of the two forms",
            )
        elif posterior and not spec.is_posterior:
            self.report(posterior[0], "a posterior needs the table [mean]", cure='add [mean] with evidence = "v * k"')
        elif not spec.state and not posterior:
            self.report(
                "",
                "the variant has no state, so nothing of finite size carries the past",
                cure='state a posterior ([mean] evidence = "v * k") or a recurrence ([state.S] with update)',
            )

    # Scopes -----------------------------------------------------------------------------------------------

    def parse_defines(self) -> None:
        for name, text in self.spec.define.items():
            place = f"define.{name}"
            node = self.parse(place, text)
            if node is not None:
                symbols = self.symbols("input", "parameter", "state", "scale")
                later = {n: "a definition may use those above it only: change the order" for n in self.spec.define}
                hidden = {n: cure for n, cure in later.items() if n not in self.defines}
                scope = Scope(symbols, self.defines, hidden, self.broken, self.extents)
                clash = name in symbols or name in ("mean", "precision")  # reported with the names
                if interpret(node, scope, self.report.at(place)) is None or clash:
                    self.broken.add(name)
            else:
                self.broken.add(name)
            self.defines[name] = node if node is not None and name not in self.broken else Number(0, 1)

    def symbols(self, *roles: str) -> dict[str, tuple[sympy.Symbol, Axes]]:
        spec = self.spec
        table: dict[str, tuple[sympy.Symbol, Axes]] = {}
        for variable in spec.variables.values():
            if variable.role in roles:
                table[variable.name] = (variable.symbol, variable.axes)
        if "state" in roles:
            for name, symbol in spec.state_symbols.items():
                axes = self.axes.get(name, ALL_AXES) if spec.is_posterior else spec.state[name].axes
                table[name] = (symbol, axes)
        if "scale" in roles:
            table["scale"] = (SCALE.symbol, "")
        return table

    def scope(self, *roles: str) -> Scope:
        visible = self.symbols(*roles)
        hidden = {}
        for role, cure in _HIDDEN.items():
            for name in self.symbols(role):
                if name not in visible:
                    hidden[name] = cure
        if self.spec.is_posterior and "state" not in roles:
            hidden["mean"] = hidden["precision"] = _HIDDEN["posterior"]
        if not self.spec.is_posterior:
            for name in ("mean", "precision"):
                hidden[name] = "it exists in a posterior only; a recurrence uses the names of its states"
        if self.spec.structure == "full" and "state" in roles:
            hidden["precision"] = "under structure = 'full' it is a K x K matrix; read the mean only"
            visible.pop("precision", None)
        return Scope(visible, self.defines, hidden, self.broken, self.extents)

    def parse(self, place: str, text: str) -> Node | None:
        try:
            return parse(text)
        except FormulaError as error:
            self.report(place, error.message, error.column, error.cure, error.suggestion)
            return None

    def formula(self, place: str, *roles: str) -> Meaning | None:
        node = self.parse(place, self.spec.formulas[place])
        meaning = None if node is None else interpret(node, self.scope(*roles), self.report.at(place))
        if node is not None and meaning:
            self.formulas[place] = meaning
            self.mention(node)
        return meaning

    def mention(self, node: Node) -> None:
        """Note the names that a formula spells out, itself or through definitions (even where they cancel)."""
        for part in walk(node):
            if isinstance(part, Name) and part.id not in self.used:
                self.used.add(part.id)
                if part.id in self.defines:
                    self.mention(self.defines[part.id])

    # Domains ----------------------------------------------------------------------------------------------

    def require(self, place: str, low: float, high: float, what: str, cure: str, *, open_low: bool = False) -> None:
        """Report values of the formula at ``place`` outside of an interval, with an example of them."""
        meaning = self.formulas.get(place)
        if meaning is None or not self.domains:
            return
        example = counterexample(meaning.expr, self.spec, low, high, open_low)
        if example is not None:
            self.report(place, f"{what}, but it is {example}", 1, cure=cure)

    # Tables -----------------------------------------------------------------------------------------------

    def check_posterior(self) -> None:
        prior_mean = self.formula("prior.mean", "parameter")
        prior_precision = self.formula("prior.precision", "parameter")
        retain = self.formula("forgetting.retain", "input", "parameter")
        evidence = self.formula("precision.evidence", "input", "parameter")
        mean = self.formula("mean.evidence", "input", "parameter")
        self.require(
            "prior.precision",
            0,
            float("inf"),
            "a precision must be positive",
            "declare domain = 'positive' for its parameter, or use softplus(...) or exp(...)",
            open_low=True,
        )
        self.require(
            "forgetting.retain",
            0,
            1,
            "retention must lie in [0, 1]",
            "use exp(g) with a nonpositive g, sigmoid(g), or a name declared with domain = 'unit'",
        )
        self.require(
            "precision.evidence",
            0,
            float("inf"),
            "evidence for a precision must be nonnegative",
            "declare domain = 'nonnegative', square it, or use softplus(...)",
        )
        if prior_precision and retain and evidence:
            self.check_structure(prior_precision, retain, evidence)
        found = [m.axes for m in (prior_precision, retain, evidence) if m]
        self.axes["precision"] = join_axes(*found)
        self.axes["mean"] = join_axes(*found, *(m.axes for m in (prior_mean, mean) if m))

    def check_structure(self, prior: Meaning, retain: Meaning, evidence: Meaning) -> None:
        structure = self.spec.structure
        place = "precision.structure" if self.spec.precision else "mean"
        if structure == "full":
            if evidence.axes:
                self.report(
                    "precision.evidence",
                    "under structure = 'full' the evidence is the weight of k k^T and has no axes,"
                    f" not {evidence.axes!r}",
                    1,
                    cure="give one number per token, for example evidence = 'beta'",
                )
            return
        if structure == "constant":
            if not evidence.expr.is_zero:
                right = _structure_of(join_axes(prior.axes, retain.axes, evidence.axes))
                self.report(
                    place,
                    "a constant precision takes no evidence",
                    cure=f"write structure = '{right}', or evidence = '0'",
                )
            return
        if evidence.expr.is_zero:
            self.report(place, "the precision has no evidence, so it is constant", cure="write structure = 'constant'")
            return
        total = join_axes(prior.axes, retain.axes, evidence.axes)
        allowed = STRUCTURES[structure]
        if total == allowed:
            return
        right = _structure_of(total)
        parts = f"evidence {evidence.axes!r}, retain {retain.axes!r}, prior {prior.axes!r}"
        surplus = [a for a in evidence.axes if a not in allowed]
        contraction = "(".join(f"sum_{a}" for a in surplus)
        cure = f"write structure = '{right}'"
        if surplus:
            text = self.spec.formulas["precision.evidence"]
            cure += f", or contract the evidence: {contraction}({text}{')' * len(surplus)}"
        self.report(
            place,
            f"structure = {structure!r} has axes {allowed!r}, but the precision lives on {total!r} ({parts})",
            cure=cure,
        )

    def check_states(self) -> None:
        for name, state in self.spec.state.items():
            init = self.formula(f"state.{name}.init", "parameter")
            update = self.formula(f"state.{name}.update", "input", "parameter", "state")
            for key, meaning in (("init", init), ("update", update)):
                if meaning is None:
                    continue
                surplus = [a for a in meaning.axes if a not in state.axes]
                if surplus:
                    self.report(
                        f"state.{name}.{key}",
                        f"it lives on {meaning.axes!r}, but the state has axes {state.axes!r}",
                        1,
                        cure=f"declare axes = {join_axes(state.axes, meaning.axes)!r}, or contract it: "
                        + "(".join(f"sum_{a}" for a in surplus)
                        + f"(...{')' * len(surplus)}",
                    )

    def check_readout(self) -> None:
        roles = ("input", "parameter", "state", "scale")
        output = self.formula("readout.output", *roles)
        if output and output.axes != "v":
            extra = "k" in output.axes
            self.report(
                "readout.output",
                f"the output must live on 'v', not on {output.axes!r}",
                1,
                cure="contract over the key channels: sum_k(... * q)" if extra else "read a quantity that carries v",
            )
        states = set(self.spec.state_symbols)
        if output and states and not states & {s.name for s in output.expr.free_symbols}:
            self.report(
                "readout.output",
                "the output uses no state, so nothing of the past is read",
                1,
                cure=f"read one of {listed(sorted(states))}",
            )
        if self.spec.readout.variance is None:
            return
        variance = self.formula("readout.variance", *roles)
        if variance and "k" in variance.axes:
            self.report(
                "readout.variance",
                f"the variance must live on 'v' (or be the same for all v), not on {variance.axes!r}",
                1,
                cure="contract over the key channels: sum_k(q**2 / precision)",
            )
        if variance and (variance.expr.is_negative or (variance.expr.is_nonpositive and not variance.expr.is_zero)):
            self.report("readout.variance", "a variance is never negative", 1, cure="check its sign")

    def check_use(self) -> None:
        """Nothing declared in vain: a name that no formula uses is most often a slip."""
        for table in ("inputs", "parameters"):
            for name in getattr(self.spec, table):
                if name not in self.used:
                    self.report(f"{table}.{name}", f"{name!r} is used by no formula", cure="use it or remove it")
        if self.spec.state:
            live = {s.name for p, m in self.formulas.items() if p.startswith("readout") for s in m.expr.free_symbols}
            todo = [n for n in live if n in self.spec.state]
            while todo:
                for symbol in self.formulas[f"state.{todo.pop()}.update"].expr.free_symbols:
                    if symbol.name in self.spec.state and symbol.name not in live:
                        live.add(symbol.name)
                        todo.append(symbol.name)
            for name in self.spec.state:
                if name not in live:
                    self.report(f"state.{name}", f"state {name!r} never reaches the readout", cure="read or remove it")

    def check_inits(self) -> None:
        for name, parameter in self.spec.parameters.items():
            domain = DOMAINS[parameter.domain]
            init = parameter.init
            if init is None:
                continue
            low = init < domain.low or (domain.open_low and init == domain.low)
            high = init > domain.high or (domain.open_high and init == domain.high)
            if low or high:
                self.report(
                    f"parameters.{name}.init",
                    f"init = {init:g} is not {parameter.domain}",
                    cure=f"choose an init that is {parameter.domain}, or another domain",
                )


_HIDDEN = {
    "input": "only parameters may be used here: the value is the same for every token",
    "state": "states cannot be used here",
    "scale": "scale belongs to the readout",
    "posterior": "use it in [readout]; an update that depends on it is stated as a recurrence ([state.NAME])",
}


def _structure_of(axes: Axes) -> str:
    return next(name for name, a in STRUCTURES.items() if a == axes)

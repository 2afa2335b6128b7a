"""Spec -> Recurrence: a posterior approximation, or a recurrence stated directly, as states with updates.

A posterior is forgotten by a power prior (the past is tempered towards the prior before each token)::

    precision' = retain * precision + (1 - retain) * prior.precision + precision.evidence
    mean'      = (retain * precision * mean + (1 - retain) * prior.precision * prior.mean + mean.evidence) / precision'

With ``forgetting.target = "zero"`` the terms with ``1 - retain`` are absent: the prior is forgotten with the past.
With ``structure = "constant"`` the precision stays at its prior and only the mean is a state. The result is in
*source* coordinates; :mod:`dspace.math.coordinates` finds better ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy

from dspace.math.intervals import sign_domain
from dspace.math.ir import Recurrence, State, Variable, axes_of

if TYPE_CHECKING:
    from dspace.spec import Spec

STRUCTURES: dict[str, str | None] = {"constant": None, "scalar": "", "key": "k", "value": "v", "key_value": "kv"}
"""Axes on which the precision of each structure lives (None: it is no state)."""


def lower(spec: Spec) -> Recurrence:
    """The recurrence that ``spec`` states, in its own coordinates.

    Raises SpecError for a posterior that has no finite elementwise state.
    """
    inputs, parameters = spec.input_variables, spec.parameter_variables
    states = _posterior(spec, (*inputs, *parameters)) if spec.is_posterior else _stated(spec)
    known = {}
    if spec.is_posterior and spec.structure == "constant":  # the readout may speak of it all the same
        known = {spec.state_symbols["precision"]: spec.expr("prior.precision")}
    recurrence = Recurrence(
        name=spec.name,
        inputs=inputs,
        parameters=parameters,
        states=states,
        output=spec.expr("readout.output").xreplace(known),
        variance=spec.expr("readout.variance").xreplace(known) if spec.readout.variance is not None else None,
        read=spec.readout.read,
        title=spec.title,
        references=tuple(spec.references),
    )
    return with_domains(recurrence)


def _stated(spec: Spec) -> tuple[State, ...]:
    return tuple(
        State(n, d.axes, spec.expr(f"state.{n}.init"), spec.expr(f"state.{n}.update"), d.domain, d.doc)
        for n, d in spec.state.items()
    )


def _posterior(spec: Spec, variables: tuple[Variable, ...]) -> tuple[State, ...]:
    structure = spec.structure
    if structure not in STRUCTURES:
        raise spec.error(
            "precision.structure",
            f"structure = {structure!r} keeps a matrix over two key channels, and the states that can be compiled have one",
            f"write one of {', '.join(STRUCTURES)}; 'key' is its diagonal",
        )
    retain = spec.expr("forgetting.retain")
    to_prior = spec.forgetting is None or spec.forgetting.target == "prior"
    returned = 1 - retain if to_prior else sympy.S.Zero
    prior_mean, prior_precision = spec.expr("prior.mean"), spec.expr("prior.precision")
    mean, evidence = spec.state_symbols["mean"], spec.expr("mean.evidence")
    doc = "posterior mean of the map from key to value"
    axes = STRUCTURES[structure]
    if axes is None:
        update = retain * mean + returned * prior_mean + evidence / prior_precision
        return (State("mean", "kv", prior_mean, update, doc=doc),)
    precision = spec.state_symbols["precision"]
    precision_new = retain * precision + returned * prior_precision + spec.expr("precision.evidence")
    table = {v.symbol: v.axes for v in variables} | {precision: axes}
    found = axes_of(precision_new, table)
    if set(found) - set(axes):
        raise spec.error(
            "precision.evidence",
            f"the precision has structure {structure!r} (axes {axes!r}), but what is added to it has axes {found!r}",
            f"contract the evidence with sum_k or sum_v, or choose a structure with axes {found!r}",
        )
    mean_new = retain * precision * mean + returned * prior_precision * prior_mean + evidence
    return (
        State("mean", "kv", prior_mean, mean_new / precision_new, doc=doc),
        State("precision", axes, prior_precision, precision_new, "positive", "posterior precision (importance)"),
    )


def with_domains(recurrence: Recurrence) -> Recurrence:
    """The same recurrence with the sign of each state declared where induction over tokens proves it.

    A sign is proven if the initial value has it and the update keeps it, whatever the inputs in their domains.
    """
    claims = {s.name: "positive" for s in recurrence.states if s.domain == "real"}
    weaker = {"positive": "nonnegative", "nonnegative": "real"}
    while claims:
        trial = redeclare(recurrence, claims)
        failed = [s for s in trial.states if claims.get(s.name, "real") != "real" and not _keeps(trial, s)]
        if not failed:
            return trial
        for state in failed:
            claims[state.name] = weaker[state.domain]
    return recurrence


def _keeps(recurrence: Recurrence, state: State) -> bool:
    rank = {"positive": 2, "nonnegative": 1}
    need = rank[state.domain]
    return all(rank.get(sign_domain(e, recurrence), 0) >= need for e in (state.init, state.update))


def redeclare(recurrence: Recurrence, domains: dict[str, str]) -> Recurrence:
    """The same recurrence with other domains for its states: their symbols change everywhere."""
    states = [State(s.name, s.axes, s.init, s.update, domains.get(s.name, s.domain), s.doc) for s in recurrence.states]
    symbols = {s.name: s.symbol for s in states}

    def respell(expr: sympy.Expr) -> sympy.Expr:
        return expr.xreplace({x: symbols[x.name] for x in expr.free_symbols if x.name in symbols})

    return recurrence.replace(
        states=tuple(State(s.name, s.axes, s.init, respell(s.update), s.domain, s.doc) for s in states),
        output=respell(recurrence.output),
        variance=None if recurrence.variance is None else respell(recurrence.variance),
    )

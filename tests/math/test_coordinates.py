"""The search for affine coordinates, and the translation of states."""

from __future__ import annotations

import sympy
from variants import ALL, build, metaplastic

from dspace.math import analyse
from dspace.math.affinity import affine_form, coefficients
from dspace.math.coordinates import check, normalise, to_normal, to_source
from dspace.math.ir import Recurrence
from dspace.math.lowering import with_domains


def symbol(recurrence: Recurrence, name: str) -> sympy.Symbol:
    return next(x.symbol for x in (*recurrence.variables, *recurrence.states) if x.name == name)


def test_mean_and_precision_become_numerator_and_excess_precision():
    source = metaplastic()
    assert affine_form(source.states[0].update, [s.symbol for s in source.states]) is None
    found = normalise(source).recurrence
    g, k, v, b, M, I = (symbol(found, n) for n in ("g", "k", "v", "b", "M", "Ibar"))
    assert [s.name for s in found.states] == ["M", "Ibar"]
    assert [s.init for s in found.states] == [0, 0]
    assert sympy.expand(found.states[0].update - (sympy.exp(g) * M + v * k)) == 0
    assert sympy.expand(found.states[1].update - (sympy.exp(g) * I + b * k**2)) == 0
    assert found.states[1].domain == "nonnegative"


def test_the_search_knows_no_names():
    """The same recurrence under other names is found affine too: 1/x of a stored variance, for instance."""
    r = build(
        "renamed",
        {"a": ("kv", "0", "(r*a/s + v*k)/(r/s + b*k**2)"), "s": ("kv", "w", "1/(r/s + b*k**2)")},
        "sum_k(a*q)",
        parameters={"w": ""},
        domains={"r": "positive", "s": "positive"},
        **{"q": "k", "k": "k", "v": "v", "b": "v", "r": ""},
    )
    found = normalise(r)
    check(found, r)
    symbols = [s.symbol for s in found.recurrence.states]
    assert all(coefficients(s.update, symbols) for s in found.recurrence.states), found.note


def test_a_state_kept_as_a_logarithm_is_found():
    r = build(
        "logarithm",
        {"l": ("k", "0", "log(exp(l)*exp(g) + k**2)"), "S": ("kv", "0", "S + v*k")},
        "sum_k(S*q/(1 + exp(l)))",
        **{"q": "k", "k": "k", "v": "v", "g": ""},
    )
    found = normalise(r).recurrence
    assert found.states[0].name == "exp_l"
    assert analyse(r).classification.letter == "fold"


def test_prior_mean_is_shifted_away():
    r = metaplastic("prior_mean")
    m = sympy.Symbol("m", positive=True)
    from dspace.math.ir import Variable

    I, g, P = symbol(r, "I_p"), symbol(r, "g"), symbol(r, "precision")
    mean = r.states[0]
    update = (mean.update * r.states[1].update + (1 - sympy.exp(g)) * I * m) / r.states[1].update
    del P
    shifted = with_domains(
        r.replace(
            parameters=(*r.parameters, Variable("m", "kv", "parameter", "positive")),
            states=(type(mean)("mean", "kv", m, update), r.states[1]),
        )
    )
    change = normalise(shifted)
    check(change, shifted)
    M = change.recurrence.states[0]
    assert M.init == 0 and m not in M.update.free_symbols
    assert m in change.recurrence.output.free_symbols
    assert analyse(shifted).classification.letter == "c"


def test_an_axis_along_which_nothing_varies_is_dropped():
    analysis = analyse(ALL["folded_wide"])
    assert [s.axes for s in analysis.recurrence.states] == ["kv", "k"]
    assert analysis.classification.letter == "fold"


def test_the_maps_undo_each_other():
    for r in ALL.values():
        check(normalise(r), r)


def test_maps_are_keyed_by_state_names():
    for r in ALL.values():
        analysis = analyse(r)
        assert list(to_normal(analysis)) == [s.name for s in analysis.recurrence.states]
        assert list(to_source(analysis)) == [s.name for s in r.states]


def test_what_is_affine_already_stays():
    r = ALL["vector"]
    assert normalise(r).recurrence == r

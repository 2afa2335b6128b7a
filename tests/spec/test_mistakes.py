"""Typical mistakes and the exact words with which they are met (golden text)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dspace.errors import SpecError
from dspace.spec import load, loads
from tests.spec.conftest import BASE

GOLDEN = Path(__file__).parent / "golden_mistakes.txt"

MISTAKES = {
    "name misspelt": ('"b * k**2"', '"B * k**2"'),
    "function misspelt": ('"exp(g)"', '"expp(g)"'),
    "habit of another library": ('"scale * sum_k(mean * q)"', '"scale * sum(mean * q)"'),
    "power as in C": ("k**2", "k^2"),
    "python in a formula": ('"exp(g)"', "\"__import__('os').system('ls')\""),
    "attribute": ('"exp(g)"', '"g.exp()"'),
    "parenthesis": ('"scale * sum_k(mean * q)"', '"scale * sum_k(mean * q"'),
    "missing operator": ('"v * k"', '"v k"'),
    "endless when multiplied out": ('"v * k"', '"(v + k + b + g + 1)**20"'),
    "unknown table": ("[forgetting]", "[forgeting]"),
    "unknown key": ("retain =", "retein ="),
    "unknown domain": ('"nonpositive"', '"nonpos"'),
    "unknown structure": ('"key_value"', '"keyvalue"'),
    "bad axes": ('q = "k"', 'q = "kx"'),
    "structure too small": ('"key_value"', '"key"'),
    "structure too large": ('"b * k**2"', '"sum_k(k**2)"'),
    "constant with evidence": ('"key_value"', '"constant"'),
    "retention may exceed one": ('g = { axes = "", domain = "nonpositive" }', 'g = ""'),
    "negative evidence": ('b = { axes = "v", domain = "nonnegative" }', 'b = "v"'),
    "precision not positive": ('domain = "positive", init = 1.0', "init = 1.0"),
    "init outside of the domain": ("init = 1.0", "init = -1.0"),
    "output keeps k": ("sum_k(mean * q)", "mean * q"),
    "output without a state": ("sum_k(mean * q)", "sum_k(q**2) * v"),
    "contraction of nothing": ('"exp(g)"', '"exp(sum_k(g))"'),
    "input where a parameter must be": ('precision = "I_p"', 'precision = "softplus(g)"'),
    "state in evidence": ('"v * k"', '"v * k - mean"'),
    "reserved name": ('q = "k"\n', 'q = "k"\nscale = ""\n'),
    "word of python": ('q = "k"\n', 'q = "k"\nlambda = ""\n'),
    "unused input": ('q = "k"\n', 'q = "k"\nspare = "v"\n'),
    "number instead of a string": ('v = "v"', "v = 3"),
    "not TOML": ("[mean]", "[mean"),
    "recipe function": ("l2norm(linear)", "l2nrom(linear)"),
    "recipe missing": ('b = "softplus(linear)"\n', ""),
    "no readout": ('[readout]\noutput = "scale * sum_k(mean * q)"\n', ""),
    "no state at all": ('[mean]\nevidence = "v * k"\n', ""),
    "wrong base": ('name = "mine"', 'name = "mine"\nextends = "palimpsaa"'),
    "wrong transform": ('name = "mine"', 'name = "mine"\ntransform = "metaplasitc"'),
    "division by zero": ('"v * k"', '"v * k / (1 - 1)"'),
    "complex power": ('"v * k"', '"v * k**0.5"'),
    "logarithm of a negative number": ('"v * k"', '"v * k * log(g)"'),
}


def message(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        loads(text, file="mine.toml")
    for problem in caught.value.problems:
        assert problem.cure, problem
        assert problem.line or "missing" in problem.message or "no state" in problem.message, problem
    return str(caught.value)


def test_messages_are_the_golden_ones():
    """Set DSPACE_ACCEPT=1 to accept changed words."""
    parts = []
    for title, (old, new) in MISTAKES.items():
        assert BASE.count(old) >= 1, title
        parts.append(f"== {title}\n{message(BASE.replace(old, new))}\n")
    text = "\n".join(parts)
    if os.environ.get("DSPACE_ACCEPT") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_base_is_valid(base):
    assert loads(base).is_posterior


def test_all_problems_at_once_in_file_order(base):
    broken = (
        base.replace('"b * k**2"', '"bb * k**2"')
        .replace("retain", "retein")
        .replace("sum_k(mean", "summ_k(mean")
        .replace("l2norm(linear)", "l2norm(liner)")
    )
    with pytest.raises(SpecError) as caught:
        loads(broken)
    problems = caught.value.problems
    assert [p.where for p in problems] == [
        "forgetting.retein",
        "precision.evidence",
        "readout.output",
        "layer.q",
        "layer.k",
    ]
    assert [p.suggestion for p in problems] == ["retain", "b", "sum_k", "linear", "linear"]
    for problem in problems:
        pointed = problem.source[problem.column - 1 :]
        assert pointed.startswith(("retein", "bb", "summ_k", "liner")), problem


@pytest.mark.parametrize(
    ("value", "column"),
    [
        ('"v * kk"', 17),
        ("'v * kk'", 17),
        ('"v\\t* kk"', 18),
        ('"v\\u0020* kk"', 22),
        ('"""v * kk"""', 19),
    ],
)
def test_columns_inside_every_kind_of_string(base, value, column):
    with pytest.raises(SpecError) as caught:
        loads(base.replace('"v * k"', value))
    (problem,) = caught.value.problems
    assert problem.source[problem.column - 1 :].startswith("kk")
    assert problem.column == column


@pytest.mark.parametrize("quote", ['"""', "'''"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_inside_long_strings(base, quote, newline):
    text = base.replace('"v * k"', f"{quote}\nv *\n  kk{quote}").replace("\n", newline)
    with pytest.raises(SpecError) as caught:
        loads(text)
    (problem,) = caught.value.problems
    assert problem.source.startswith("  kk")
    assert problem.column == 3


def test_a_line_continuation_is_no_character(base):
    with pytest.raises(SpecError) as caught:
        loads(base.replace('"v * k"', '"""v *\\\n   kk"""'))
    assert caught.value.problems[0].column == 4


def test_inherited_problems_name_the_file_they_are_in(base, tmp_path):
    (tmp_path / "parent.toml").write_text(base.replace('"v * k"', '"v * kk"'))
    (tmp_path / "child.toml").write_text('name = "child"\nextends = "parent"\n[readout]\noutput = "sum_k(meen * q)"\n')
    with pytest.raises(SpecError) as caught:
        load(tmp_path / "child.toml")
    places = {(Path(p.file).name, p.where, p.line) for p in caught.value.problems}
    assert places == {("parent.toml", "mean.evidence", 24), ("child.toml", "readout.output", 4)}

"""The parser: precedence, places, bounds, and a round trip for every tree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspace.spec.syntax import Binary, Call, FormulaError, Name, Number, Unary, parse, unparse, walk


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("-k**2", "-k**2"),
        ("(-k)**2", "(-k)**2"),
        ("a-(b-c)", "a - (b - c)"),
        ("(a-b)-c", "a - b - c"),
        ("a/b/c", "a / b / c"),
        ("a/(b/c)", "a / (b / c)"),
        ("a**b**c", "a**b**c"),
        ("(a**b)**c", "(a**b)**c"),
        ("2**-x", "2**-x"),
        ("+a*1.0e0", "a * 1"),
        ("f( a ,b+1 )", "f(a, b + 1)"),
        ("-(a+b)*c", "-(a + b) * c"),
        ("a\n + b", "a + b"),
    ],
)
def test_precedence(text, canonical):
    assert unparse(parse(text)) == canonical


def test_every_node_has_its_column():
    assert parse("a + f(-b, 2)") == Binary(
        "+", Name("a", 1), Call("f", (Unary("-", Name("b", 8), 7), Number(2, 11)), 5), 3
    )


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("", "empty", 1),
        ("a +", "ends", 4),
        ("a b", "operator is missing", 3),
        ("2k", "operator is missing", 2),
        ("(a", "never closed", 1),
        ("a)", "without its", 2),
        ("f(a b)", "operator is missing", 5),
        ("a,b", "comma", 2),
        ("a^2", "'^'", 2),
        ("a.b", "'.'", 2),
        ("a[0]", "'['", 2),
        ("lambda: 0", "':'", 7),
        ("α * k", "not ASCII", 1),
        ("1e99", "out of range", 1),
        ("1e-999", "out of range", 1),
        ("9" * 41, "out of range", 1),
        ("* a", "value is missing", 1),
        ("(" * 10_000 + "a" + ")" * 10_000, "nested more than", 1),
        ("(" * 500 + "a" + ")" * 500, "nested more than", 61),
        ("-" * 3_000 + "a", "nested more than", 61),
        ("+".join("a" * 1_500), "nested more than", 120),
        ("a" * 5_000, "characters", 1),
        ("f(" * 1_500, "nested more than", 121),
    ],
)
def test_problems_have_a_place(text, message, column):
    with pytest.raises(FormulaError) as caught:
        parse(text)
    assert message in caught.value.message
    assert caught.value.column == column
    assert caught.value.cure


def trees(names="abkv"):
    leaves = st.sampled_from(names).map(lambda n: Name(n, 0)) | st.sampled_from([0, 1, 2, 0.5, 1e-6, 3.25]).map(
        lambda x: Number(x, 0)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            inner.map(lambda x: Unary("-", x, 0))
            | st.builds(lambda op, a, b: Binary(op, a, b, 0), st.sampled_from(["+", "-", "*", "/", "**"]), inner, inner)
            | inner.map(lambda x: Call("exp", (x,), 0))
            | st.builds(lambda a, b: Call("maximum", (a, b), 0), inner, inner)
        ),
        max_leaves=12,
    )


@given(trees())
@settings(max_examples=300, deadline=None)
def test_unparse_is_the_inverse_of_parse(tree):
    text = unparse(tree)
    again = parse(text)
    assert unparse(again) == text
    kinds = [type(n) for n in walk(tree)]
    assert [type(n) for n in walk(again)] == kinds
    assert all(n.column >= 1 for n in walk(again))


@given(st.text(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused(text):
    try:
        parse(text)
    except FormulaError as error:
        assert 1 <= error.column <= len(text) + 1

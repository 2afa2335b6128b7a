"""Ten thousand broken files: a spec is read or refused with SpecError, and nothing else ever comes out."""

from __future__ import annotations

import random

import pytest

from dspace.errors import SpecError
from dspace.spec import from_dict, load, loads
from tests.spec.conftest import BASE

WORDS = """q k v b g I_p mean precision scale sum_k( sum_v( exp( log( sqrt( tanh( abs( maximum( ** * / + - ( ) , 0 1 2
0.5 1e30 64 -1 key full constant unit real [define] [state.S] axes update init = " ' ''' [ ] { } \\ # \n kv read before
extends transform metaplastic remove palimpsa mamba2 linear conv( l2norm( \u03b1 \x00 [layer] [mean] [readout]""".split(
    " "
)

OTHERS = """\
name = "other"
[inputs]
q = "k"
k = { axes = "k", doc = 'a "doc"' }
v = "v"
g = { axes = "", domain = "nonpositive" }
[define]
keep = "exp(g)"
[state.S]
axes = "kv"
update = \"\"\"keep * S
   + v * k\"\"\"
[state.z]
axes = "k"
domain = "nonnegative"
update = "keep * z + abs(k)"
[readout]
read = "before"
output = "scale * sum_k(S * q) / maximum(abs(sum_k(z * q)), 1)"
"""


def broken(rng: random.Random) -> str:
    """A valid file after a few random edits of characters, words, or whole lines."""
    text = rng.choice([BASE, OTHERS])
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(7)
        if kind == 0:
            text = text[:at] + text[at + rng.randrange(1, 6) :]
        elif kind == 1:
            text = text[:at] + rng.choice(WORDS) + text[at:]
        elif kind == 2:
            text = text[:at] + chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) + text[at + 1 :]
        elif kind == 3:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))
            text = "\n".join(lines)
        elif kind == 4:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            text = "\n".join(lines)
        elif kind == 5:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            text = " ".join(words)
        else:
            text = text[:at]
    return text


@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_broken_files(seed):
    rng = random.Random(seed)
    read = 0
    for _ in range(1_000):
        text = broken(rng)
        try:
            spec = loads(text, file="broken.toml")
        except SpecError as error:
            assert error.problems
            assert str(error)
            for problem in error.problems:
                assert problem.line <= text.count("\n") + 1, text
        else:
            read += 1
            assert spec.hash
    assert read < 600, "most of these files are broken"


@pytest.mark.parametrize("seed", range(2))
def test_random_tables(seed):
    """Tables that no TOML file would hold are refused as well."""
    rng = random.Random(seed)
    junk = [None, True, 0, -1, 1.5, float("nan"), "", "k", "v*k", [], ["k"], {}, {"axes": "k"}, object(), b"k"]
    names = ["name", "inputs", "parameters", "define", "state", "readout", "mean", "layer", "extends", "transform"]
    for _ in range(500):
        tables = {"name": "x", "inputs": {"k": "k", "v": "v"}, "mean": {"evidence": "v*k"}, "readout": {"output": "0"}}
        for _ in range(rng.randrange(4)):
            value = rng.choice(junk)
            tables[rng.choice(names)] = {rng.choice(["k", "S", "output", 3]): value} if rng.random() < 0.5 else value
        try:
            from_dict(tables)
        except SpecError as error:
            assert error.problems


def formula(text: str) -> str:
    return BASE.replace('"v * k"', f'"{text}"')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (formula("(" * 10_000 + "v" + ")" * 10_000), "nested more than"),
        (formula("exp(" * 900 + "v" + ")" * 900), "nested more than"),
        (formula("v" + " * k" * 900), "nested more than"),
        (formula("9**9**9**9"), "exponent"),
        (formula("(((v*2)**64)**64)**64"), "out of range"),
        (formula("exp(exp(exp(exp(9))))"), "out of range"),
        (formula("1.0000001**64 * (7/3)**64**64"), "out of range"),
        (formula("1e-30**64"), "out of range"),
        (formula("v * k / 1e-200"), "out of range"),
        (formula("log(0)"), "log of"),
        (BASE + "#" * 1_000_000, "bytes"),
        ("x = " + "[" * 50_000, "nested too deep"),
        ("x = " + "9" * 50_000, "too long"),
        (".".join("a" * 20_000) + " = 1", "too many dots"),
        ("", "missing"),
        ("\x00", "not TOML"),
    ],
)
def test_hostile_files(text, words):
    with pytest.raises(SpecError) as caught:
        loads(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 5_000 + 2 * 200 * len(caught.value.problems)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("exp(d{0}) + exp(-d{0})", "levels, once its defined names are replaced"),
        ("d{0} * (d{0} + 3)", "multiplied out"),
    ],
)
def test_definitions_cannot_explode(step, told):
    chain = "\n".join(f'd{i} = "{step.format(i - 1)}"' for i in range(1, 40))
    text = formula("v * k * d39") + f'[define]\nd0 = "v"\n{chain}\n'
    with pytest.raises(SpecError, match=told):
        loads(text)


@pytest.mark.parametrize("source", ["", "nope", "no/such.toml", "a\0b", "x" * 5_000, ".", "../palimpsa"])
def test_files_that_are_not_there(source):
    with pytest.raises(SpecError):
        load(source)


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'name = "x"\n\xff\xfe')
    with pytest.raises(SpecError, match=r"binary\.toml:2:1: not UTF-8"):
        load(binary)
    large = tmp_path / "large.toml"
    large.write_text("#" * 1_000_001)
    with pytest.raises(SpecError, match="at most"):
        load(large)
    marked = tmp_path / "marked.toml"
    marked.write_text("\ufeff" + BASE, encoding="utf-8")
    assert load(marked).name == "mine"

"""dspace space: counts, lists, samples, prints a point's spec, tells mistakes in words."""

from __future__ import annotations

import json

import pytest

from dspace.cli import main
from dspace.space import build, catalogue
from dspace.spec import loads

FEW = [
    "constant/none/token/prior/head/zero/none/mean",
    "constant/none/token_key/prior/head/zero/delta/mean",
    "key/energy/token/prior/head/zero/none/mean",
    "key_value/energy/token/prior/head/zero/none/mean",
]


@pytest.fixture(autouse=True)
def few_points(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPACE_CACHE", str(tmp_path))
    few = tuple(map(catalogue.parse_point, FEW))
    monkeypatch.setattr(catalogue, "candidates", lambda: few)
    monkeypatch.setattr(catalogue, "build", lambda progress=None: build(few, progress))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["space", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_counts_and_axes(capsys):
    assert run(capsys, "--count")[:2] == (0, "4\n")
    code, out, _ = run(capsys)
    assert code == 0 and "4 points of pairwise different mathematics" in out and "one precision per head" in out
    told = json.loads(run(capsys, "--json")[1])
    assert told["points"] == 4 and told["classes"] == {"a": 1, "d": 1, "fold": 1, "c": 1}


def test_list_with_costs(capsys):
    code, out, _ = run(capsys, "--list", "--gpu", "h100")
    assert code == 0 and "ms on H100" in out and all(p in out for p in FEW)
    rows = {r["point"]: r for r in json.loads(run(capsys, "--list", "--gpu", "H100", "-K", "32", "--json")[1])}
    assert rows[FEW[3]]["seconds"] > rows[FEW[0]]["seconds"] and rows[FEW[0]]["limit"] == "bandwidth"
    assert rows[FEW[3]]["state_bytes"] == 2 * rows[FEW[0]]["state_bytes"] == 2 * 16 * 32 * 64 * 4


def test_a_sample_is_repeatable(capsys):
    first = run(capsys, "--sample", "2", "--seed", "3", "--json")[1]
    assert first == run(capsys, "--sample", "2", "--seed", "3", "--json")[1]
    assert len(json.loads(first)) == 2


def test_a_point_is_printed_as_a_spec_file(capsys):
    code, out, _ = run(capsys, FEW[3])
    assert code == 0 and loads(out).expr("precision.evidence") is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--list", "--gpu", "H10"], "did you mean 'H100'"),
        (["constant/gain/token/prior/head/zero/none/mean"], "takes no evidence"),
        (["palimpsa"], "is not a point"),
    ],
)
def test_mistakes_are_told(capsys, arguments, words):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and words in err and "Traceback" not in err

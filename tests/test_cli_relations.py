"""dspace map and dspace reduce."""

from __future__ import annotations

import json

import pytest

from dspace.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPACE_CACHE", str(tmp_path / "cache"))


def test_map_of_chosen_variants(capsys, tmp_path):
    few = ["palimpsa", "simple_gla", "mamba2"]
    code, out, _ = run(capsys, "map", *few)
    assert code == 0 and "simple_gla → mamba2: scale = 1" in out
    told = json.loads(run(capsys, "map", *few, "--json")[1])
    assert {n["name"] for n in told["nodes"]} == set(few)
    assert run(capsys, "map", *few, "--dot")[1].startswith("digraph")
    code, out, _ = run(capsys, "map", *few, "--svg", str(tmp_path / "map.svg"))
    assert code == 0 and (tmp_path / "map.svg").read_text().lstrip().startswith("<?xml")


def test_reduce_proves_or_refutes(capsys):
    code, out, _ = run(capsys, "reduce", "palimpsa", "simple_gla")
    assert code == 0 and "exact: palimpsa becomes simple_gla under b = 0" in out and "I_p → ∞" in out
    assert "align" in run(capsys, "reduce", "gla", "simple_gla", "--latex")[1]
    assert json.loads(run(capsys, "reduce", "gla", "simple_gla", "--json")[1])["exact"]["exact"]
    code, out, _ = run(capsys, "reduce", "simple_gla", "gla")
    assert code == 1 and "false at" in out


def test_an_unknown_variant_is_told_without_traceback(capsys):
    code, _, err = run(capsys, "reduce", "palimpsa", "palimsa")
    assert code == 2 and "palimpsa" in err and "Traceback" not in err


def test_one_file_is_placed_among_the_built_in_variants(capsys, tmp_path, monkeypatch):
    """Recognised whatever its names are; here among few of them, for time."""
    import dspace.spec.library

    monkeypatch.setattr(dspace.spec.library, "builtin_names", lambda: ["palimpsa", "simple_gla"])
    monkeypatch.setattr(dspace.spec, "builtin_names", lambda: ["palimpsa", "simple_gla"], raising=False)
    path = tmp_path / "gla.toml"
    path.write_text('name = "palimpsa"\nextends = "simple_gla"\n[state.S]\nupdate = "k * v + exp(g) * S"\n')
    code, out, _ = run(capsys, "map", str(path))
    assert code == 0 and "palimpsa (built in) → simple_gla" in out or "palimpsa (built in) → palimpsa" in out
    assert "the same up to substitution: palimpsa, simple_gla" in out

"""A cache folder of its own for these tests, and small specs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspace.runtime import cache, compiler

AFFINE = """
name = "tiny_affine"
[inputs]
q = "k"
k = "k"
v = "v"
g = { axes = "", domain = "nonpositive" }
[state.S]
axes = "kv"
update = "exp(g) * S + v * k"
[readout]
output = "scale * sum_k(S * q)"
"""

RATIO = """
name = "tiny_ratio"
[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "v", domain = "nonnegative" }
g = { axes = "", domain = "nonpositive" }
[parameters]
I_p = { axes = "", domain = "positive", init = 1.0 }
[prior]
precision = "I_p"
[forgetting]
retain = "exp(g)"
[precision]
structure = "key_value"
evidence = "b * k**2"
[mean]
evidence = "v * k"
[readout]
output = "scale * sum_k(mean * q)"
variance = "scale**2 * sum_k(q**2 / precision)"
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing remembered from other tests."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.ENVIRONMENT, str(folder))
    monkeypatch.setattr(cache, "_fallback", None)
    monkeypatch.setattr(compiler, "_memory", {})
    monkeypatch.setattr(compiler, "_trusted", set())
    return folder


@pytest.fixture
def affine_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_affine.toml"
    path.write_text(AFFINE, encoding="utf-8")
    return path


@pytest.fixture
def ratio_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_ratio.toml"
    path.write_text(RATIO, encoding="utf-8")
    return path

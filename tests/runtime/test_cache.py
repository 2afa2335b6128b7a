"""The cache on disk: atomic, checked, shared, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspace.errors import SpecError, UserError
from dspace.runtime import cache, compiler
from dspace.runtime.cache import Cache, Entry, digest
from dspace.runtime.compiler import compile
from dspace.runtime.sources import files_of, raw_key
from dspace.runtime.versions import emitter_version


def test_modules_are_content_addressed_and_checked(own_cache: Path):
    store = Cache()
    entry, path = store.store_module("x", "0" * 64, "A = 1\n", ["one", "two"])
    assert store.entry("one") == store.entry("two") == entry
    assert store.module(entry) == path
    path.write_text("A = 2\n", encoding="utf-8")
    assert store.module(entry) is None
    (own_cache / "entries" / "one.json").write_text("{half", encoding="utf-8")
    assert store.entry("one") is None
    (own_cache / "entries" / "two.json").write_text('{"other": 1}', encoding="utf-8")
    assert store.entry("two") is None
    assert not list(own_cache.rglob("*.tmp"))


def test_digest_separates_its_parts():
    assert digest("ab", "c") != digest("a", "bc")
    assert "+" in emitter_version()


def test_second_compile_neither_parses_nor_emits(affine_file: Path, monkeypatch: pytest.MonkeyPatch):
    first = compile(affine_file, certify=False)
    monkeypatch.setattr(compiler, "_memory", {})
    monkeypatch.setattr(compiler, "_build", None)
    begin = time.perf_counter()
    assert compile(affine_file, certify=False) is first
    assert time.perf_counter() - begin < 0.3
    assert compile(str(affine_file), certify=False) is first


def test_comments_share_a_module_and_meaning_does_not(affine_file: Path):
    first = compile(affine_file, certify=False)
    text = affine_file.read_text(encoding="utf-8")
    affine_file.write_text("# a comment\n" + text, encoding="utf-8")
    assert compile(affine_file, certify=False).SPEC["hash"] == first.SPEC["hash"]
    affine_file.write_text(text.replace("v * k", "2 * v * k"), encoding="utf-8")
    assert compile(affine_file, certify=False).SPEC["hash"] != first.SPEC["hash"]


def test_key_covers_what_a_spec_extends(affine_file: Path, tmp_path: Path):
    child = tmp_path / "child.toml"
    child.write_text('name = "child"\nextends = "tiny_affine"\n', encoding="utf-8")
    before = raw_key(child)
    assert before is not None
    assert [p.name for p, _ in files_of(child) or []] == ["child.toml", "tiny_affine.toml"]
    affine_file.write_text(affine_file.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert raw_key(child) not in (None, before)
    child.write_text('name = "child"\nextends = "child"\n', encoding="utf-8")
    assert files_of(child) is None  # a circle: the spec loader tells the user
    with pytest.raises(SpecError, match="circle"):
        compile(child)
    with pytest.raises(SpecError):
        compile(tmp_path / "missing.toml")


def test_damaged_module_is_rebuilt(affine_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = Path(str(compile(affine_file, certify=False).__file__))
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"raise SystemExit\n"):
        path.write_bytes(bad)
        monkeypatch.setattr(compiler, "_memory", {})
        assert hasattr(compile(affine_file, certify=False), "chunk_tiny_affine")
        assert path.read_bytes() == good
    for record in (own_cache / "entries").iterdir():
        record.write_bytes(b"\0\0")
    monkeypatch.setattr(compiler, "_memory", {})
    assert hasattr(compile(affine_file, certify=False), "chunk_tiny_affine")


def test_unwritable_folder_falls_back_with_a_warning(tmp_path: Path, affine_file: Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot be written.*DSPACE_CACHE"):
        module = compile(affine_file, certify=False, cache_dir=blocked)
    assert hasattr(module, "chunk_tiny_affine")
    assert Path(str(module.__file__)).parent.parent == cache._fallback


def test_full_disk_falls_back_and_no_disk_is_a_clear_error(affine_file: Path, monkeypatch: pytest.MonkeyPatch):
    real = cache._replace

    def full(path: Path, data: bytes) -> Path:
        if cache._fallback is None or cache._fallback not in path.parents:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(cache, "_replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert hasattr(compile(affine_file, certify=False), "SPEC")

    def nothing(path: Path, data: bytes) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_replace", nothing)
    monkeypatch.setattr(compiler, "_memory", {})
    with pytest.raises(UserError, match="cure: free some space"):
        Cache().store_module("x", "0", "A = 1", ["k"])


def test_read_only_cache_is_still_read(affine_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    module = compile(affine_file, certify=False)
    monkeypatch.setattr(compiler, "_memory", {})
    monkeypatch.setattr(cache, "_replace", None)  # any write would fail loudly
    monkeypatch.setattr(cache, "writable", lambda folder: False)
    assert compile(affine_file, certify=False) is module


def test_interrupted_write_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Cache().store_module("x", "0", "A = 1", ["k"])
    assert not [p for p in own_cache.rglob("*") if p.is_file()]
    assert Cache().entry("k") is None and Cache().module(Entry("x", "0", "1")) is None


WORKER = """
import sys
from dspace.runtime import compiler
real = compiler.module_text
def counted(spec):
    open(sys.argv[2], "a").write("built\\n")
    return real(spec)
compiler.module_text = counted
module = compiler.compile(sys.argv[1], certify=False)
assert module.chunk_tiny_affine
print(module.__file__)
"""


def test_four_processes_build_once(affine_file: Path, own_cache: Path, tmp_path: Path):
    log = tmp_path / "built.log"
    command = [sys.executable, "-c", WORKER, str(affine_file), str(log)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [w.communicate(timeout=1500)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0, 0, 0]
    assert len(set(outputs)) == 1
    assert log.read_text(encoding="utf-8") == "built\n"

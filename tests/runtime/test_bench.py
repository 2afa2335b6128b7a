"""The bench: times beside a measured roofline, pictures, peers from a file, and no speed for what is wrong."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from dspace.errors import CertificationError, UserError
from dspace.runtime import bench as benches
from dspace.runtime.bench import Timing, bench
from dspace.runtime.peers import PLACES, find_peer

SMALL = {"batch": 1, "steps": 8, "heads": 1, "keys": 4, "values": 4, "repeats": 1, "device": "cpu"}


def test_times_shares_and_pictures(affine_file: Path, tmp_path: Path):
    result = bench(affine_file, **SMALL)
    assert [t.form for t in result.timings] == ["reference", "recurrent", "chunk"]
    for timing in result.timings:
        assert 0 < timing.forward < timing.first + 60 and timing.both > 0
        assert timing.roofline_share == pytest.approx(result.floor / timing.forward)
    assert result.timings[0].forward_speedup == 1.0
    assert result.roofs["bandwidth"] > 1e8 and result.limit in (
        "bytes",
        "flops_tensor",
        "flops_fp32",
        "special",
        *result.roofs,
    )
    assert json.loads(json.dumps(result.as_dict()))["mode"] == "train"
    assert result.table().row_count == 3
    assert result.picture(tmp_path / "b.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert result.picture(tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"\.svg"):
        result.picture(tmp_path / "b.nonsense")


def test_decoding_is_a_matter_of_bytes(affine_file: Path):
    result = bench(affine_file, **{**SMALL, "batch": 3}, mode="decode")
    (timing,) = result.timings
    assert timing.form == "recurrent" and timing.both is None and "T=1" in result.shape
    moved = 2 * 3 * 16 * 4 + 3 * 4 * (4 + 4 + 4 + 1) + 3 * 4 * 4  # states, inputs, output
    assert result.floor == pytest.approx(moved / result.roofs["bandwidth"])


def test_no_speed_at_sizes_where_the_kernel_is_wrong(affine_file: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise CertificationError("wrong at these sizes")

    monkeypatch.setattr(benches, "certify_sizes", refused)
    with pytest.raises(CertificationError, match="wrong at these sizes"):
        bench(affine_file, **SMALL)


@pytest.mark.parametrize("wrong", [{"keys": 0}, {"keys": 300}, {"dtype": "int8"}, {"mode": "x"}, {"device": "tpu"}])
def test_impossible_requests_are_told_in_words(affine_file: Path, wrong: dict):
    with pytest.raises(UserError, match="cure"):
        bench(affine_file, **{**SMALL, **wrong})


def test_peers_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "peers.toml"
    file.write_text('[mine]\npackage = "p"\nchunk = "theirs:run"\narguments = { a = "q" }\noptions = { scale = 2.0 }\n')
    peer = find_peer("mine", file)
    assert peer is not None and find_peer("other", file) is None
    assert peer.function("recurrent", ["q"]) is None and peer.function("chunk", ["q"]) is None  # not installed
    theirs = types.ModuleType("theirs")
    theirs.run = lambda a, scale, initial_state, output_final_state: (scale * a, initial_state)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    function = peer.function("chunk", ["q", "g"])
    assert function is not None and function(torch.ones(2), None, initial_state=[3])[0].sum() == 4
    file.write_text('[mine]\npackage = "p"\narguments = {}\nnonsense = 1\n')
    with pytest.raises(UserError, match="nonsense"):
        find_peer("mine", file)
    assert any(place.is_file() for place in PLACES)


def test_a_peer_that_fails_or_differs_has_a_note_and_no_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = benches._Clock("cpu", 1, None, 4)
    x, base = torch.ones(4), Timing("chunk", forward=1.0)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("refuses this compiler\nand more")

    row = clock.peer("p", broken, lambda y: (y, None), [x], 1.0, base)
    assert row.forward is None and row.note == "RuntimeError: refuses this compiler"
    row = clock.peer("p", lambda y: (2 * y, None), lambda y: (y, None), [x], 1.0, base)
    assert row.forward is None and "differs" in row.note
    row = clock.peer("p", lambda y: (y * 1.0, None), lambda y: (y, None), [x], 1.0, base)
    assert row.forward is not None and row.both is not None and not row.note

"""Choices of configurations: proposed by the module, measured once, kept without T, shared, and never required."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dspace.runtime import offline, tuned, tuning, versions
from dspace.runtime.cache import Cache
from dspace.runtime.compiler import compile
from dspace.runtime.load import load_file

pytest.importorskip("triton")


@pytest.fixture
def module(affine_file: Path) -> ModuleType:
    return compile(affine_file, certify=False)


def call(module: ModuleType, steps: int = 65, size: int = 64) -> None:
    offline.launches_of(module, "chunk", T=steps, K=size, V=size)


def test_the_first_proposal_is_used_and_keys_hold_no_length(module: ModuleType):
    call(module)
    keys = set(module._CONFIGS)
    assert keys and all(module._CONFIGS[k] == module._PROPOSALS[k][0] for k in keys)
    call(module, steps=200)
    assert set(module._CONFIGS) == keys
    assert all(len(proposals) <= 8 for proposals in module._PROPOSALS.values())


def test_the_fastest_proposal_wins_and_others_read_it(
    module: ModuleType, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(versions, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(offline, "present_target", lambda: "sm_80")
    call(module)
    (key,) = (k for k in module._CONFIGS if len(module._PROPOSALS[k]) > 1)
    times = {config: 1.0 + i for i, config in enumerate(reversed(module._PROPOSALS[key]))}
    (choice,) = tuning.tune_call(module, lambda: call(module), lambda run: times[module._CONFIGS[key]])
    assert choice.config == module._PROPOSALS[key][-1] and choice.milliseconds == 1.0
    assert [t for _, t in choice.tried] == [times[c] for c in module._PROPOSALS[key]]
    # What is known is not measured again, noise changes nothing, and a candidate that fails is left out.
    assert tuning.tune_call(module, lambda: call(module), lambda run: 1 / 0, {choice.key}) == []
    (same,) = tuning.tune_call(module, lambda: call(module), lambda run: 1.0 - 0.001 * len(str(module._CONFIGS[key])))
    assert same.config == module._PROPOSALS[key][0]
    assert tuning.tune_call(module, lambda: call(module), lambda run: 1 / 0) == []

    cache = Cache()
    cache.store_tuning(tuned.record_of("cuda"), {choice.key: choice.config, "gone 1": [1]})
    tuned.apply(module, cache)
    call(module, steps=1000)
    assert module._CONFIGS[key] == choice.config
    call(module, size=32)  # other sizes keep their first proposal
    other = next(k for k in module._CONFIGS if k[:1] == key[:1] and k != key)
    assert module._CONFIGS[other] == module._PROPOSALS[other][0]


def test_a_choice_that_is_no_proposal_any_more_is_ignored(module: ModuleType):
    call(module)
    key = next(iter(module._CONFIGS))
    module._TUNED[" ".join(map(str, key))] = ("something", "old")
    module._CONFIGS.clear()
    call(module)
    assert module._CONFIGS[key] == module._PROPOSALS[key][0]


def test_the_shipped_table_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    table = tmp_path / "tuned.json"
    table.write_text('{"a GPU": {"family 64": [64, [32, 4]]}}')
    monkeypatch.setattr(tuned, "SHIPPED", table)
    monkeypatch.setattr(versions, "device_name", lambda device: "a GPU")
    tuned.shipped.cache_clear()
    assert tuned.shipped("cuda") == {"family 64": [64, [32, 4]]}
    Cache().store_tuning(tuned.record_of("cuda"), {"family 16": (32, (16, 2))})
    tuning.write_table(table)
    tuned.shipped.cache_clear()
    assert tuned.shipped("cuda") == {"family 16": [32, [16, 2]], "family 64": [64, [32, 4]]}
    tuned.shipped.cache_clear()


def test_a_gpu_that_was_not_measured_takes_the_choices_of_its_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "tuned.json"
    table.write_text(
        '{"one (sm_90)": {"family 64": 1}, "two (sm_80)": {"family 64": 2}, "three (sm_80)": {"family 16": 3}}'
    )
    monkeypatch.setattr(tuned, "SHIPPED", table)
    expected = {"two (sm_80)": {"family 64": 2}, "four (sm_80)": {"family 64": 2, "family 16": 3}, "five (sm_100)": {}}
    for name, choices in expected.items():
        monkeypatch.setattr(versions, "device_name", lambda device, name=name: name)
        tuned.shipped.cache_clear()
        assert tuned.shipped("cuda") == choices
    tuned.shipped.cache_clear()


def test_what_is_shipped_is_among_what_kernels_propose():
    """Else it would be dead weight: a choice that is no proposal any more is ignored."""
    proposals = {}
    for path in sorted((Path(__file__).parents[2] / "kernels").glob("[a-z]*.py")):
        made = load_file(path, path.stem)
        for function, family, own in re.findall(r"_chosen\((\w+), [\"'](\w+) ?[\"']( \+ _ID)?", path.read_text()):
            proposals[f"{family} {made._ID}" if own else family] = getattr(made, function)
    for table in json.loads(tuned.SHIPPED.read_text()).values():
        for key, config in table.items():
            family = max((f for f in proposals if key.startswith(f + " ")), key=len)
            words = key[len(family) + 1 :].split()
            sizes = [getattr(torch, w[6:]) if w.startswith("torch.") else json.loads(w.lower()) for w in words]
            assert tuned._tuples(config) in proposals[family](*sizes), key

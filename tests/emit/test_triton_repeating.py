"""Calls that are repeated do what they did, with other tensors; what cannot be repeated is not."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import operator
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspace.emit.triton.repeating import REPEAT

N = 24


def add_kernel(x: int, y: int, z: int, n: int, factor: float) -> None:
    """z = x + factor y, by address, as a compiled kernel does it."""
    a, b, c = ((ctypes.c_float * n).from_address(address) for address in (x, y, z))
    for i in range(n):
        c[i] = a[i] + factor * b[i]


class Launcher:
    """What stands between a compiled kernel and the driver: ``launch`` gets the arguments behind others, or as one."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, layout: str) -> None:
        self.packed = layout == "packed"
        self.launch: Callable[..., None] = self.drive

    def __call__(self, x: int, y: int, z: int, stream: int, rest: tuple[Any, ...], *args: Any) -> None:
        self.launch(x, y, z, stream, False, *rest, *((args,) if self.packed else args))

    def drive(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert (x, y, z, stream, rest[0]) == (3, 1, 1, 7, False)
        add_kernel(*(rest[-1] if self.packed else rest[-5:]))


class Compiled:
    """A kernel as Triton compiled it; ``through`` counts the calls that go through all of its Python."""

    def __init__(self, layout: str) -> None:
        self._run = Launcher(layout)
        self.module: int | None = 1
        self.through = 0
        self.unloaded: list[int] = []
        if layout == "other":
            del self._run.launch
            self._run = lambda x, y, z, stream, rest, *args: add_kernel(*args)  # type: ignore[assignment]

    @property
    def run(self) -> Launcher:
        return self._run

    def launch_metadata(self, *args: Any) -> object:
        return object()

    def __del__(self) -> None:
        if self.module is not None:
            self.unloaded.append(self.module)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def runner(*args: Any, stream: int = 7) -> None:
            self.through += 1
            self.run(*grid, stream, (self.launch_metadata(), HOOKS.launch_enter_hook, HOOKS.launch_exit_hook), *args)

        return runner


class Hook:
    """Those of profilers that were added."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


HOOKS = types.SimpleNamespace(launch_enter_hook=Hook(), launch_exit_hook=Hook())


@pytest.fixture(params=["flat", "packed", "other"])
def module(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The emitted text, with a driver that has one stream, and each layout of a launcher's arguments."""
    active = types.SimpleNamespace(get_current_stream=lambda index: 7)
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
    triton = types.SimpleNamespace(runtime=runtime, knobs=types.SimpleNamespace(runtime=HOOKS))
    names: dict[str, Any] = {"functools": functools, "threading": threading, "torch": torch, "triton": triton}
    names |= {"copy": copy, "operator": operator, "TorchDispatchMode": TorchDispatchMode, "times": 0}
    names["compiled"] = Compiled(request.param)
    exec(REPEAT, names)
    return names


def launch(module: dict[str, Any], x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, factor: float) -> None:
    compiled, grid, rest = module["compiled"], (3, 1, 1), (z.numel(), factor)
    compiled[grid](x.data_ptr(), y.data_ptr(), z.data_ptr(), *rest)
    tape = getattr(module["_recording"], "tape", None)
    if tape is not None:
        tape.launched(compiled, grid, (x, y, z), rest)


def repeated(module: dict[str, Any], extra: Callable[[torch.Tensor], Any] = lambda t: None) -> Callable[..., Any]:
    """A function with hidden and returned tensors, views, and operations on each of them."""

    def work(x: torch.Tensor, y: torch.Tensor, nothing: torch.Tensor | None, factor: float) -> tuple[Any, ...]:
        module["times"] += 1
        a, b = torch.empty(2 * N).split(N)
        launch(module, x, y, a, factor)
        launch(module, a, x, b, 1.0)
        out = torch.empty_like(x)
        launch(module, a, b, out, 2.0)
        shown = torch.empty(N)
        launch(module, out, y, shown, -1.0)
        extra(shown)
        rows = shown.view(4, N // 4)
        tail = torch.empty(N)
        launch(module, rows[1:], y, tail[: N // 2], 0.5)
        return out, rows.sum(0), nothing, torch.cat([b[N // 2 :], tail[: N // 2]]).to(torch.float64), x

    return module["_repeated"](work)


def expected(x: torch.Tensor, y: torch.Tensor, factor: float) -> tuple[torch.Tensor, ...]:
    a = x + factor * y
    b = a + x
    out = a + 2 * b
    shown = out - y
    rows = shown.view(4, N // 4)
    return out, rows.sum(0), torch.cat([b[N // 2 :], shown[N // 4 :][: N // 2] + 0.5 * y[: N // 2]]).double()


def same(found: tuple[Any, ...], x: torch.Tensor, y: torch.Tensor, factor: float) -> bool:
    out, sums, nothing, last, given = found
    pairs = zip((out, sums, last), expected(x, y, factor), strict=True)
    return nothing is None and given is x and all(torch.allclose(p, q, atol=1e-5) for p, q in pairs)


def test_the_third_call_of_a_kind_is_repeated_with_its_own_tensors(module: dict[str, Any]) -> None:
    work = repeated(module)
    for factor in (0.5, -2.0):
        for _ in range(5):
            x, y = torch.randn(N), torch.randn(N)
            assert same(work(x, y, None, factor), x, y, factor)
    assert module["times"] == 4
    x = torch.randn(N)
    for _ in range(4):  # a kind of its own: both are one tensor
        assert same(work(x, x, None, 0.5), x, x, 0.5)
    assert module["times"] == 6
    for _ in range(4):  # and so is other alignment
        x, y = torch.randn(N + 1)[1:], torch.randn(N)
        assert same(work(x, y, None, 0.5), x, y, 0.5)
    assert module["times"] == 8


@pytest.mark.parametrize(
    "extra",
    [
        lambda t: t.sum().item(),
        lambda t: t.clamp_(-9, 9),
        lambda t: len(t.nonzero()),
        lambda t: torch.searchsorted(t, t, sorter=torch.argsort(t)),
    ],
    ids=["value", "in place", "size", "tensor by name"],
)
def test_what_goes_by_values_is_done_anew(module: dict[str, Any], extra: Callable[[torch.Tensor], Any]) -> None:
    work = repeated(module, extra)
    for times in range(1, 6):
        x, y = torch.rand(N), torch.rand(N)
        assert same(work(x, y, None, 0.25), x, y, 0.25)
        assert module["times"] == times


def test_tensors_from_elsewhere_are_done_anew(module: dict[str, Any]) -> None:
    other = torch.zeros(N)

    def work(x: torch.Tensor) -> tuple[torch.Tensor]:
        module["times"] += 1
        out = torch.empty_like(x)
        launch(module, x, other, out, 1.0)
        return (out,)

    call = module["_repeated"](work)
    for _ in range(4):
        other.add_(1.0)
        x = torch.randn(N)
        assert torch.allclose(call(x)[0], x + other)
    assert module["times"] == 4


def test_other_configurations_and_too_much_memory_are_done_anew(module: dict[str, Any]) -> None:
    work, x = repeated(module), torch.randn(N)
    chosen = module["_Choices"]()
    for _ in range(3):
        work(x, x, None, 1.0)
    assert module["times"] == 2
    chosen["family", N] = 1
    work(x, x, None, 1.0)
    assert module["times"] == 3
    module["_TAPE_MEMORY"] = 4 * N
    for _ in range(3):
        work(x, x, None, 1.0)
    assert module["times"] == 6


def test_a_repeated_call_goes_past_the_python_of_triton(module: dict[str, Any]) -> None:
    work, compiled = repeated(module), module["compiled"]
    for times in range(5):
        before, (x, y) = compiled.through, torch.randn(2, N)
        assert same(work(x, y, None, 0.5), x, y, 0.5)
        assert compiled.through - before == (0 if times > 1 and hasattr(compiled.run, "launch") else 5)
    assert (
        not compiled.unloaded and compiled.module == 1 and compiled.launch_metadata.__self__ is compiled
    )  # the look left it as it was


def test_a_profiler_sees_every_launch(module: dict[str, Any]) -> None:
    work, compiled, (x, y) = repeated(module), module["compiled"], torch.randn(2, N)
    for _ in range(3):
        work(x, y, None, 0.5)
    HOOKS.launch_exit_hook.calls.append(print)
    try:
        before = compiled.through
        assert same(work(x, y, None, 0.5), x, y, 0.5)
        assert compiled.through == before + 5
    finally:
        HOOKS.launch_exit_hook.calls.clear()


def test_a_kernel_with_scratch_memory_gets_it_at_every_call(module: dict[str, Any]) -> None:
    compiled = module["compiled"]
    compiled._run.global_scratch_size = 8
    work = repeated(module)
    for _ in range(4):
        before, (x, y) = compiled.through, torch.randn(2, N)
        assert same(work(x, y, None, 0.5), x, y, 0.5)
        assert compiled.through == before + 5
    assert not compiled.unloaded


def test_no_tensor_waits_for_the_garbage_collector(module: dict[str, Any]) -> None:
    work = repeated(module)
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            found = work(torch.randn(N), torch.randn(N), None, 1.0)
            gone = [weakref.ref(t) for t in found if t is not None]
            del found
            assert not any(ref() is not None for ref in gone)
    finally:
        gc.enable()


def test_a_call_that_fails_while_it_is_recorded_fails_as_it_did(module: dict[str, Any]) -> None:
    def fail(t: torch.Tensor) -> None:
        if module["times"] == 2:
            raise MemoryError("no room")

    work = repeated(module, fail)
    x, y = torch.randn(N), torch.randn(N)
    work(x, y, None, 1.0)
    with pytest.raises(MemoryError, match="no room"):
        work(x, y, None, 1.0)
    assert getattr(module["_recording"], "tape", None) is None
    for _ in range(3):
        assert same(work(x, y, None, 1.0), x, y, 1.0)
    assert module["times"] == 3


def test_a_call_within_a_recorded_one_is_part_of_it(module: dict[str, Any]) -> None:
    inner = repeated(module)

    def outer(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, sums, _, last, _ = inner(x, y, None, 2.0)
        return out, sums, last

    call = module["_repeated"](outer)
    for _ in range(5):
        x, y = torch.randn(N), torch.randn(N)
        pairs = zip(call(x, y), expected(x, y, 2.0), strict=True)
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in pairs)
    assert module["times"] == 2


def test_kernels_may_be_given_empty_tensors_that_nothing_else_sees(module: dict[str, Any]) -> None:
    def work(x: torch.Tensor) -> tuple[torch.Tensor]:
        module["times"] += 1
        out, nothing = torch.empty_like(x), torch.empty(0)
        launch(module, x, x, nothing, 1.0)
        launch(module, x, x, out, 1.0)
        return (out,)

    call = module["_repeated"](work)
    for _ in range(4):
        x = torch.randn(N)
        assert torch.equal(call(x)[0], 2 * x)
    assert module["times"] == 2

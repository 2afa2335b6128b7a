"""Native loops on several threads: those of PyTorch's pool where that is safe, plain ones elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import RECURRENCES
from draw import arguments, gradients
from test_cpu import call, flat


@contextlib.contextmanager
def thread_count(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def large_call(module):
    """Output, states, gradients of a call with work for three threads in the loops, and for one in PyTorch itself."""
    args = arguments(RECURRENCES["ratio"], batch=4, steps=84, keys=40, values=40, dtype=torch.float32)
    result = call(module, "recurrent", "ratio", args)
    return [*result, *gradients(result, flat(args))]


def same(found, expected):
    return all((a.numpy() == b.numpy()).all() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pool", [True, False])
def test_runs_are_bitwise_repeatable_whatever_the_threads(native, monkeypatch, pool):
    module = native("ratio")
    if pool and not module._native_pool():
        pytest.skip("no OpenMP that may be called")
    found, helped = [], []
    helper, team = module._NativeHelper, module._native_team
    monkeypatch.setattr(module, "_NativeHelper", lambda work: helped.append(1) or helper(work))
    monkeypatch.setattr(module, "_native_team", lambda *x: helped.append(x[1] - 1) or team(*x))
    if not pool:
        monkeypatch.setattr(module, "_native_pool", lambda: None)
    for count in (1, 2, 3):
        with thread_count(count):
            found.append([x.detach() for x in large_call(module)])
    assert sum(helped) == 2 * (0 + 1 + 2), "forward and backward with one helper, then with two"
    assert all(same(other, found[0]) for other in found[1:])


def test_small_calls_wake_no_thread(native, monkeypatch):
    args = arguments(RECURRENCES["ratio"], batch=3, steps=20)
    for name in ("_NativeHelper", "_native_team"):
        monkeypatch.setattr(native("ratio"), name, None)
    with thread_count(3):
        result = call(native("ratio"), "recurrent", "ratio", args)
        assert all(g.isfinite().all() for g in gradients(result, flat(args)))


def test_a_call_with_fewer_tasks_than_threads_leaves_the_pool_alone(native, monkeypatch):
    monkeypatch.setattr(native("ratio"), "_native_team", None)
    with thread_count(12):  # there are 8 tasks
        large_call(native("ratio"))


def test_errors_of_helping_threads_reach_the_caller(native):
    """And work that no thread began is not waited for."""

    def fail():
        raise ArithmeticError("in a helper")

    module = native("ratio")
    helper = module._NativeHelper(fail)
    module._native_crew(os.getpid(), 1).put(helper)
    while not helper.claim.locked():
        time.sleep(0.001)
    with pytest.raises(ArithmeticError, match="in a helper"):
        helper.join()
    late = module._NativeHelper(fail)
    late.join()
    late()  # a thread that comes too late finds the work claimed


@pytest.fixture
def pool(native):
    return native("ratio")._native_pool() or pytest.skip("no OpenMP that may be called")


@pytest.mark.parametrize("here", [True, False])
def test_errors_in_the_pool_reach_the_caller(native, pool, here):
    caller, seen = threading.get_ident(), threading.Barrier(2, timeout=30)

    def fail():
        seen.wait()
        if (threading.get_ident() == caller) == here:
            raise ArithmeticError("in the pool")

    with thread_count(2), pytest.raises(ArithmeticError, match="in the pool"):
        native("ratio")._native_team(pool, 2, fail)
    large_call(native("ratio"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what ctypes prints where it is early
def test_an_interrupt_is_not_lost_in_the_pool(native, pool):
    """Wherever it comes: also before a line that could catch it, where ctypes can only print what was raised."""

    def interrupted():
        signal.raise_signal(signal.SIGINT)

    with thread_count(2), pytest.raises(KeyboardInterrupt):
        native("ratio")._native_team(pool, 2, interrupted)

    def unheard(share, *_):
        """A pool in which nothing of the caller's share has run."""

    with pytest.raises(KeyboardInterrupt):
        native("ratio")._native_team(unheard, 2, interrupted)


def test_calls_from_several_threads_at_once(native):
    module = native("ratio")
    with thread_count(2):
        expected = [x.detach() for x in large_call(module)]
        with ThreadPoolExecutor(4) as executor:
            for found in executor.map(lambda _: large_call(module), range(12)):
                assert same([x.detach() for x in found], expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_without_the_pool(native):
    """The parent's pool has no threads there: who waited for them would wait for ever."""
    module = native("ratio")
    with thread_count(2):
        expected = [x.detach() for x in large_call(module)]  # a parallel call before the fork
        child = os.fork()
        if child == 0:
            code = 1
            try:
                fresh = module._native_pool.__wrapped__()  # what a module imported only here would find
                found = [x.detach() for x in large_call(module)]
                code = 0 if fresh is None and module._native_pool() is None and same(found, expected) else 2
            finally:
                os._exit(code)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert same([x.detach() for x in large_call(module)], expected)

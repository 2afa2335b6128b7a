"""What Triton does once in a process, done in a thread while there is other work.

Before its first kernel Triton compiles and loads a helper in C, reads and hashes all of its own files (400 MB), asks its
assembler for a version and imports what it has for other languages: half a second to a second, and as much again in
every process that is forked before that. A kernel that does next to nothing brings it about.
"""

from __future__ import annotations

import contextlib
import threading

_thread: threading.Thread | None = None


def start() -> None:
    """Begin, once in a process: nothing is lost if no kernel follows."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_compile_one, name="dspace-warm-up")
        _thread.start()


def wait() -> None:
    """Until it is done, if it was begun: forked processes then have it from this one."""
    if _thread is not None:
        _thread.join()


def _compile_one() -> None:
    # Whatever goes wrong here goes wrong in earnest with the first kernel of use.
    with contextlib.suppress(Exception):
        import triton

        @triton.jit
        def nothing(x):
            pass

        nothing.warmup(1.0, grid=(1,))

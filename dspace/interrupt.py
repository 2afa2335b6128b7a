"""Ctrl-C while the command ``dspace`` still loads: it ends at once, in silence, with 130.

The package calls :func:`leave_at_once` before it imports anything. In a program that imports dspace it does nothing.
Only what the interpreter brings is used: each import here would be another moment in which Ctrl-C shows a traceback.
"""

from __future__ import annotations

import os
import sys
from _signal import SIGINT, default_int_handler, getsignal, signal

INTERRUPTED = 130


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)  # nothing is begun that would have to be ended


def _is_command() -> bool:
    """Whether this process is ``dspace ...`` or ``python -m dspace ...``."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # Python still looks for the module
        given = sys.orig_argv
        return "-m" in given and given[given.index("-m") + 1 :][:1] == ["dspace"]
    return os.path.splitext(os.path.basename(started))[0] == "dspace"


def leave_at_once() -> None:
    """Until :func:`heed` is called, Ctrl-C ends the command as it loads."""
    if _is_command() and getsignal(SIGINT) is default_int_handler:
        try:
            signal(SIGINT, _leave)
        except ValueError:  # not the main thread: somebody's program
            return


def heed() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if getsignal(SIGINT) is _leave:
        signal(SIGINT, default_int_handler)


def forget() -> None:
    """Let the exit code be the command's own.

    Python ends by the signal itself when KeyboardInterrupt came while it ran code from text (as ``dataclasses`` does),
    also where the exception was caught; running the next text clears that.
    """
    exec("")

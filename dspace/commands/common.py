"""What every command shares: errors without tracebacks, ``--json``, exit codes."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dspace.errors import CompilerBug, DspaceError
from dspace.interrupt import INTERRUPTED

BROKEN_PIPE = 141
_MAIN = threading.main_thread()

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


class Settings:
    """Options before the command."""

    debug = bool(os.environ.get("DSPACE_DEBUG"))
    interrupted = False
    """Ctrl-C came. An exception alone may be lost: libraries that probe things while they load swallow it, half loaded,
    and what follows is no finding."""


def _interrupt(number: int, frame: Any) -> None:
    Settings.interrupted = True
    signal.default_int_handler(number, frame)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: a mistake of the user's is told in words, never as a traceback, with its exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        Settings.interrupted = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is _MAIN:
            signal.signal(signal.SIGINT, _interrupt)
        try:
            try:
                function(*args, **kwargs)
            except Exception as error:
                told = getattr(error, "exit_code", None) == INTERRUPTED
                if Settings.interrupted and not told:
                    raise KeyboardInterrupt from error
                raise
            if Settings.interrupted:
                raise KeyboardInterrupt
            sys.stdout.flush()
        except KeyboardInterrupt:
            _finish("interrupted", INTERRUPTED, as_json)
        except BrokenPipeError:
            # The reader went away (as `head` does): leave quietly, and keep Python from complaining at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except DspaceError as error:
            if Settings.debug:
                traceback.print_exc()
            hint = "\nthis is a bug of dspace: please report it with the spec" if isinstance(error, CompilerBug) else ""
            _finish(f"{error}{hint}", error.exit_code, as_json)
        except RecursionError:
            _finish("the input is nested too deeply\n  cure: simplify it", 2, as_json)
        except OSError as error:
            if Settings.debug:
                traceback.print_exc()
            place = f"{error.filename}: " if error.filename else ""
            _finish(f"{place}{error.strerror or error}", 4, as_json)

    return guarded


def _finish(message: str, code: int, as_json: bool) -> None:
    try:
        if as_json:
            print(json.dumps({"error": message, "exit_code": code}), flush=True)
        else:
            complain(message)
    except OSError:  # standard output is what failed: a full disk behind a redirection, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        complain(message)
    raise typer.Exit(code)


def complain(message: str) -> None:
    """An error on standard error, its first line marked."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message))
    else:
        print(f"error: {message}", file=sys.stderr)


def show(text_or_table: Any) -> None:
    """Print a rich table (or text) to standard output."""
    if isinstance(text_or_table, str):
        print(text_or_table)
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(text_or_table)


def show_json(value: Any) -> None:
    """Print JSON; what it does not know becomes text."""
    print(json.dumps(value, indent=2, default=str))

"""The command line: ``dspace COMMAND ...``. Commands live in ``dspace/commands``; nothing heavy loads for help."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import dspace
from dspace.commands import relations, space, study, variants
from dspace.commands.common import BROKEN_PIPE, Settings
from dspace.interrupt import INTERRUPTED

app = typer.Typer(
    name="dspace",
    help="From a spec file to a certified kernel to a study. A spec is named by file or by a built-in name.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
studies = typer.Typer(help="Search a space of variants.", no_args_is_help=True, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dspace {dspace.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    Settings.debug = Settings.debug or debug


app.command("list")(variants.list_)
app.command("show")(variants.show_)
app.command("generate")(variants.generate)
app.command("verify")(variants.verify)
app.command("bench")(variants.bench)
app.command("tune")(variants.tune)
app.command("map")(relations.map_)
app.command("reduce")(relations.reduce)
app.command("space")(space.space)
app.add_typer(studies, name="study")
app.command("doctor")(variants.doctor)

studies.command("run")(study.run)
studies.command("work")(study.work)
studies.command("proxy")(study.proxy)
studies.command("report")(study.report)
studies.command("publish")(study.publish)
studies.command("export")(study.export)
studies.command("heal")(study.heal)
studies.command("list")(study.list_)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (0 success, 2 user's mistake, 3 refused kernel, 4 storage)."""
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""dspace study ...: run, report, export, heal, list."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dspace.commands.common import Json, command, complain, show, show_json
from dspace.errors import DspaceError, UserError
from dspace.interrupt import INTERRUPTED

Name = Annotated[str, typer.Argument(help="A study by name, by its folder, or by its file.", metavar="NAME")]
Dir = Annotated[Path | None, typer.Option("--dir", help="The study's folder; runs/NAME by default.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="SQLAlchemy URL, or grpc://HOST:PORT of a proxy, in place of the folder's journal.",
        envvar="OPTUNA_STORAGE",
    ),
]
Output = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.")]


@command
def run(
    file: Annotated[str, typer.Argument(help="A study file, or the name of a shipped one.", metavar="FILE")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Worker processes; each gets its share of the cores.")] = 1,
    trials: Annotated[int | None, typer.Option(help="Another budget than the file's.")] = None,
    folder: Dir = None,
    storage: Storage = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Place workers on the Ray cluster at this address; 'auto' finds it.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Place workers as Slurm jobs, through submitit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Run a study, or go on with it where it stopped (after Ctrl-C, kill -9, a full disk)."""
    from dspace.study.engine import run

    summary = run(
        file,
        jobs,
        folder=folder,
        storage=storage,
        trials=trials,
        quiet=quiet or as_json,
        ray=ray,
        slurm="slurm" if slurm else None,
    )
    if as_json:
        show_json({**asdict(summary), "folder": str(summary.folder)})
    else:
        counts = ", ".join(f"{n} {'failed' if state == 'fail' else state}" for state, n in summary.counts.items())
        show(
            f"{summary.name}: {counts or 'no trials'} in {summary.seconds / 60:.1f} min; all of it is in {summary.folder}"
        )
        for note in summary.notes:
            show(f"note: {note}")
        if summary.interrupted:
            show("stopped; the trials that were running will run again: give the same command to go on")
        else:
            show(f"next: dspace study report {summary.name}")
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)


@command
def work(
    name: Annotated[str, typer.Argument(help="The study's name.", metavar="NAME")],
    storage: Storage = None,
    folder: Dir = None,
) -> None:
    """Join a running study from this machine with one worker; its storage must be on a server."""
    import os

    from dspace.study.storage import home_of
    from dspace.study.worker import STOPPED, main

    home = home_of(name, folder, storage)
    if storage is None or not home.on_server:
        raise UserError("joining needs the study's server\n  cure: --storage grpc://HOST:PORT or postgresql://...")
    worker = f"{os.uname().nodename}-{os.getpid()}-0"
    code = main(["--dir", str(home.folder), "--url", storage, "--id", worker, "--alone"])
    if code == STOPPED:
        show("stopped; the trial that was running will run again")
        raise typer.Exit(INTERRUPTED)
    if code:
        raise typer.Exit(code)


@command
def proxy(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 13000,
) -> None:
    """Serve a database to many machines through Optuna's gRPC proxy, until interrupted."""
    from dspace.study.away import hidden
    from dspace.study.remote import run_proxy

    show(f"serving {hidden(storage or 'a journal')} at {host}:{port}; workers use --storage grpc://HOST:{port}")
    run_proxy(storage, host, port)


@command
def report(name: Name, out: Output = None, folder: Dir = None, storage: Storage = None, as_json: Json = False) -> None:
    """Write one self-contained HTML page about a study; prints its path."""
    from dspace.study.page import report

    path = report(name, out, folder=folder, storage=storage)
    show_json({"report": str(path)}) if as_json else show(str(path))


@command
def publish(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; studies/results by default.")] = None,
    folder: Dir = None,
    storage: Storage = None,
    ran: Annotated[str, typer.Option("--command", help="The command that was run, as it should be told.")] = "",
    as_json: Json = False,
) -> None:
    """Write raw numbers (JSON), a table (Markdown) and a figure (PNG) about a study; prints their paths."""
    from dspace.study.publish import publish

    paths = [str(p) for p in publish(name, out, folder=folder, storage=storage, command=ran)]
    show_json({"files": paths}) if as_json else show("\n".join(paths))


@command
def export(
    name: Name,
    best: Annotated[bool, typer.Option("--best", help="The best trial (the default).")] = False,
    trial: Annotated[int | None, typer.Option(help="This trial instead.")] = None,
    out: Output = None,
    folder: Dir = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write the winning spec as TOML, for `dspace generate`; prints its path."""
    from dspace.study.winner import export

    if best and trial is not None:
        raise UserError("give either --best or --trial, not both")
    path = export(name, out, trial=trial, folder=folder, storage=storage)
    show_json({"spec": str(path)}) if as_json else show(str(path))


@command
def heal(
    name: Name,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut a damaged journal where it stops being readable; a copy is kept.")
    ] = False,
    folder: Dir = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Mark the running trials of dead workers as failed and enqueue each once more; mend a damaged journal."""
    from dspace.study.engine import heal

    done, healed = heal(name, folder=folder, storage=storage, cut=cut)
    if as_json:
        cut_done = {"line": done[0].line, "lost": 1 + done[0].after, "copy": str(done[1])} if done else None
        show_json({"cut": cut_done, "healed": [asdict(h) for h in healed]})
        return
    if done:
        damage, copy = done
        show(f"cut {damage.path} at line {damage.line}: {1 + damage.after} records; the whole file is kept as {copy}")
    for h in healed:
        show(
            f"trial {h.number} of {h.study} ({h.worker}): {'will run again' if h.retried else 'failed twice, given up'}"
        )
    if not healed and not done:
        show("nothing to heal")


@command
def list_(
    name: Annotated[str, typer.Argument(help="One study, to list its trials.", metavar="[NAME]")] = "",
    folder: Dir = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """The studies of this folder, or the trials of one. Studies that cannot be read do not hide the others."""
    from dspace.study.results import collect, open_home

    failures: list[DspaceError] = []
    if name or folder:
        results = collect(open_home(name or str(folder), folder, storage))
        rows: list[dict[str, Any]] = [
            {"trial": t.number, "state": t.state, **t.params, **t.metrics, "seconds": round(t.seconds, 1)}
            for t in results.trials
        ]
    else:
        rows = []
        for definition in sorted(Path("runs").glob("*/study.toml")):
            try:
                rows.append(_line_of(definition.parent))
            except DspaceError as error:
                failures.append(error)
                told = {"error": str(error), "exit_code": error.exit_code} if as_json else {}
                rows.append({"study": definition.parent.name, "folder": str(definition.parent), **told})
    if as_json:
        show_json(rows)
    elif rows:
        _show_rows(rows)
    else:
        show("nothing here yet: dspace study run quickstart")
    sys.stdout.flush()  # before the complaints, where both go to one place
    if not as_json:
        for failure in failures:
            complain(str(failure))
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _line_of(folder: Path) -> dict[str, Any]:
    """A study in one line of the list."""
    from dspace.study.results import NoTrialsYet, collect, open_home

    try:
        results = collect(open_home(folder))
    except NoTrialsYet:
        return {"study": folder.name, "best": None, "folder": str(folder)}
    best, metric = results.best, results.study.best.by
    return {
        "study": results.study.name,
        **results.counts(),
        "best": best.number if best else None,
        metric: best.metrics[metric] if best else None,
        "folder": str(folder),
    }


def _show_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        values = (row.get(c) for c in columns)
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    show(table)

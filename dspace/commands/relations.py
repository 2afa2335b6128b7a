"""map, reduce: how variants relate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspace.commands.common import Json, command, show, show_json


@command
def map_(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Spec files or built-in names: of one, its place among the built-in specs; all by default."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--svg", help="Draw the map into this file (.svg, .pdf, .png).")
    ] = None,
    dot: Annotated[bool, typer.Option("--dot", help="Print the map for Graphviz.")] = False,
    as_json: Json = False,
) -> None:
    """Which variant reduces to which, each edge proven, and which a transform makes of which."""
    from dspace.math import analyse
    from dspace.math.drawing import draw
    from dspace.math.map import load_or_build
    from dspace.runtime.cache import default_dir, digest
    from dspace.spec import builtin_names, load

    specs = {spec.name: spec for spec in map(load, sources or builtin_names())}
    if sources is not None and len(sources) == 1:
        (own,) = specs
        # A file may have the name of a built-in spec without being it.
        specs = {n if n != own else f"{n} (built in)": load(n) for n in builtin_names() if n != sources[0]} | specs
    hashes = {name: spec.hash for name, spec in specs.items()}
    store = default_dir() / f"map-{digest(*sorted(hashes.values()))[:16]}.json"
    found = load_or_build(hashes, lambda: {name: analyse(spec) for name, spec in specs.items()}, store, specs)
    if picture is not None:
        try:
            draw(found, picture)
        except OSError as error:
            error.filename = error.filename or str(picture)
            raise
    if as_json:
        show_json(found.as_dict())
    elif dot:
        show(found.dot().rstrip())
    else:
        show(found.text() if picture is None else str(picture))


@command
def reduce(
    source: Annotated[str, typer.Argument(help="The more general variant: a file or a built-in name.", metavar="A")],
    target: Annotated[str, typer.Argument(help="What it is to become.", metavar="B")],
    latex: Annotated[bool, typer.Option("--latex", help="Print the proofs as LaTeX.")] = False,
    as_json: Json = False,
) -> None:
    """Whether A becomes B under a substitution or in a limit: the proof, or the point at which it fails."""
    from dspace.math import analyse, explain
    from dspace.math import reduce as search
    from dspace.spec import load

    answer = search(analyse(load(source)).recurrence, analyse(load(target)).recurrence)
    if as_json:
        show_json(explain.as_dict(answer))
    elif latex and answer.failure is None:
        show("\n".join(explain.latex(r) for r in (answer.exact, answer.limit) if r is not None).rstrip())
    else:
        show(explain.text(answer).rstrip())
    if answer.failure is not None:
        raise typer.Exit(1)

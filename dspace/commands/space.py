"""space: the points of the design space, their class and what they would cost."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Annotated, Any

import typer

from dspace.commands.common import Json, command, show, show_json


@command
def space(
    point: Annotated[
        str | None, typer.Argument(help="A point as --list prints it: prints its spec file.", metavar="[POINT]")
    ] = None,
    count: Annotated[bool, typer.Option("--count", help="How many points there are.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Every point: class, state, cost.")] = False,
    sample: Annotated[int | None, typer.Option("--sample", min=1, help="So many points at random.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sample.")] = 0,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Expected time on this GPU, such as H100.")] = None,
    key_channels: Annotated[int, typer.Option("-K", min=1, help="Key channels of a head.")] = 64,
    value_channels: Annotated[int, typer.Option("-V", min=1, help="Value channels of a head.")] = 64,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 16,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a batch.")] = 65_536,
    as_json: Json = False,
) -> None:
    """The structural axes, the valid points (pairwise different mathematics), and what they cost."""
    from dspace.math.roofline import Sizes, estimate, find_gpu
    from dspace.space import AXES, compose, load_or_build, parse_point

    if point is not None:
        spec = compose(parse_point(point))
        show_json(spec.to_dict()) if as_json else show(spec.to_toml().rstrip())
        return
    board = find_gpu(gpu) if gpu is not None else None
    from dspace.runtime.cache import default_dir

    found = load_or_build(default_dir(), _progress)
    if sample is None and not list_:
        classes = dict(Counter(e.letter for e in found.entries).most_common())
        told = {"points": len(found.entries), "classes": classes, "same": len(found.same), "refused": found.refused}
        if as_json:
            show_json({**told, "axes": AXES})
        elif count:
            show(str(len(found.entries)))
        else:
            show(_summary(told, AXES))
        return
    sizes = Sizes(key_channels, value_channels, heads, tokens)
    entries = found.entries if sample is None else found.sample(sample, seed)
    rows: list[dict[str, Any]] = []
    for e in entries:
        row: dict[str, Any] = {"point": str(e.point), "class": e.letter, "hash": e.hash}
        cost = estimate(e.costs, board or find_gpu("H100"), sizes)
        row |= {"state_bytes": int(cost.state_bytes), "flops": cost.flops, "bytes": cost.bytes}
        rows.append(row | ({"seconds": cost.seconds, "limit": cost.limit} if board is not None else {}))
    if as_json:
        show_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("point", "class", "state KiB", "GFLOP", *((f"ms on {board.name}", "limit") if board else ())):
        table.add_column(column, no_wrap=True, justify="left" if column in ("point", "class", "limit") else "right")
    for row in rows:
        cells = [row["point"], row["class"], f"{row['state_bytes'] / 1024:.1f}", f"{row['flops'] / 1e9:.1f}"]
        table.add_row(*cells, *([f"{row['seconds'] * 1e3:.3f}", row["limit"]] if board else []))
    show(table)


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line} (once for this version)", end="", file=sys.stderr, flush=True)


def _summary(told: dict[str, Any], axes: dict[str, dict[str, str]]) -> str:
    lines = []
    for axis, choices in axes.items():
        lines.append(axis)
        lines += [f"  {name:<10} {meaning}" for name, meaning in choices.items()]
    by_class = ", ".join(f"{n} of class {letter}" for letter, n in told["classes"].items())
    lines += ["", f"{told['points']} points of pairwise different mathematics: {by_class}"]
    lines.append(f"{told['same']} more are one of these in another spelling; no variants are")
    lines += [f"  {n:>5}  {reason}" for reason, n in sorted(told["refused"].items(), key=lambda item: -item[1])]
    return "\n".join(lines)

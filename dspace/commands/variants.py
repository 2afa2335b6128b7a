"""list, show, generate, verify, bench, tune, doctor: everything about one variant or about this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dspace.commands.common import Json, command, show, show_json
from dspace.errors import UserError

Source = Annotated[str, typer.Argument(help="A spec file, or the name of a built-in spec.", metavar="SPEC")]


Gpu = Annotated[str | None, typer.Option("--gpu", help="Also the expected time on this GPU, such as H100.")]


def _expected(analysis: Any, gpu: str) -> dict[str, Any]:
    """What a variant costs on a named GPU, for the sizes that ``dspace space`` takes by default too."""
    from dspace.math.roofline import Sizes, costs_of, estimate, find_gpu

    sizes = Sizes()
    return {**estimate(costs_of(analysis), find_gpu(gpu), sizes).as_dict(), "sizes": asdict(sizes)}


@command
def list_(
    gpu: Gpu = None,
    as_json: Json = False,
) -> None:
    """Every built-in variant: class, state size, cost per token."""
    from dspace.math import analyse
    from dspace.spec import builtin_names, load

    rows: list[dict[str, Any]] = []
    for name in builtin_names():
        spec = load(name)
        analysis = analyse(spec)
        cost = {k: str(v) for k, v in analysis.cost.items()}
        kind = analysis.classification
        rows.append(
            {"name": name, "class": kind.letter, "kind": kind.name, "title": spec.title, "hash": spec.hash, **cost}
            | ({"expected": _expected(analysis, gpu)} if gpu is not None else {})
        )
    if as_json:
        show_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    timed = () if gpu is None else (f"ms on {rows[0]['expected']['gpu']}", "limit")
    for column in ("name", "class", "state bytes", "flops a token", *timed, "title"):
        table.add_column(column, no_wrap=column != "title")
    for row in rows:
        found = row.get("expected")
        times = [] if found is None else [f"{found['seconds'] * 1e3:.3f}", found["limit"]]
        table.add_row(row["name"], row["class"], row.get("state_bytes", ""), row.get("flops", ""), *times, row["title"])
    show(table)
    if gpu is not None:
        show(_sizes_text(rows[0]["expected"]["sizes"]))


def _sizes_text(sizes: dict[str, int]) -> str:
    return (
        f"a lower bound from counted work and peak rates, for {sizes['tokens']} tokens, {sizes['heads']} heads, "
        f"K = {sizes['K']}, V = {sizes['V']}; dspace space takes other sizes"
    )


@command
def show_(
    source: Source,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX.")] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Also what each pass did.")] = False,
    gpu: Gpu = None,
    as_json: Json = False,
) -> None:
    """The mathematics of a variant: normal form, class and why, gradients, ranges, cost."""
    from dspace import math
    from dspace.spec import load

    analysis = math.analyse(load(source))
    expected = _expected(analysis, gpu) if gpu is not None else None
    if as_json:
        show_json(math.show.as_dict(analysis) | ({"expected": expected} if expected else {}))
    elif latex:
        show(math.show.latex(analysis))
    else:
        show(math.show.text(analysis, passes=passes).rstrip("\n"))
        if expected:
            show(f"\nexpected on {expected['gpu']}: {expected['seconds'] * 1e3:.3g} ms, limited by {expected['limit']}")
            show(f"  {_sizes_text(expected['sizes'])}")


@command
def generate(
    source: Annotated[str, typer.Argument(help="A spec file, or the name of a built-in spec.", metavar="[SPEC]")] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("kernels"),
    all_: Annotated[bool, typer.Option("--all", help="All built-in specs.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; compare the folder, exit 1 if it is stale.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the self-contained module of a variant: readable, importable, torch and triton only."""
    from dspace.runtime import generation

    if bool(source) == (all_ or (check and not source)):
        raise (
            UserError("give one SPEC, or --all\n  cure: dspace generate my_variant.toml")
            if not source
            else UserError("give either one SPEC or --all, not both")
        )
    if check:
        stale = generation.check(out, [source] if source else None)
        if as_json:
            show_json([{"path": str(d.path), "kind": d.kind, "diff": d.diff} for d in stale])
        else:
            for d in stale:
                show(f"{d.path}: {d.kind}\n{d.diff}".rstrip())
            show(
                f"{out}: {len(stale)} files differ from what the compiler writes now" if stale else f"{out}: up to date"
            )
        raise typer.Exit(1 if stale else 0)
    paths = generation.generate_all(out) if all_ else [generation.generate(source, out)]
    show_json([str(p) for p in paths]) if as_json else show("\n".join(str(p) for p in paths))


@command
def verify(
    source: Source,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU is taken where there is one.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds instead of the whole matrix.")] = False,
    dtype: Annotated[list[str] | None, typer.Option(help="Only these, e.g. --dtype float32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs; fresh ones each time by default.")] = None,
    as_json: Json = False,
) -> None:
    """Check every form of a variant, with all gradients, against the float64 oracle on this machine."""
    from dspace.runtime.compiler import default_device
    from dspace.runtime.verification import verify

    progress = None if as_json or not sys.stderr.isatty() else lambda line: print(f"  {line}", file=sys.stderr)
    certificate = verify(source, device or default_device(), dtype or None, quick, seed=seed, progress=progress)
    show_json(certificate.as_dict()) if as_json else show(certificate.table())
    raise typer.Exit(0 if certificate.passed else 3)


@command
def bench(
    source: Source,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 16,
    steps: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    heads: Annotated[int, typer.Option()] = 4,
    keys: Annotated[int, typer.Option(help="Key channels of a head.")] = 16,
    values: Annotated[int, typer.Option(help="Value channels of a head.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 on a GPU, float32 on a CPU by default.")] = "",
    repeats: Annotated[int, typer.Option()] = 5,
    mode: Annotated[str, typer.Option(help="train: whole sequences; decode: one token for each of them.")] = "train",
    peers: Annotated[Path | None, typer.Option(help="A file like benchmarks/peers.toml, the default.")] = None,
    with_peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Time the peer beside, if installed.")] = True,
    picture: Annotated[
        list[Path] | None, typer.Option("--picture", "--svg", "--png", help="Also draw it: FILE.svg or FILE.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a variant beside its roofline and its peer, after certifying it: no speed for a kernel whose check is red."""
    from dspace.runtime.bench import bench
    from dspace.runtime.compiler import default_device

    device = device or default_device()
    result = bench(
        source,
        batch=batch,
        steps=steps,
        heads=heads,
        keys=keys,
        values=values,
        device=device,
        dtype=dtype or ("bfloat16" if device == "cuda" else "float32"),
        repeats=repeats,
        mode=mode,  # type: ignore[arg-type]  # checked there
        peers=peers,
        with_peer=with_peer,
    )
    for path in picture or ():
        result.picture(path)
    show_json(result.as_dict()) if as_json else show(result.table())


@command
def tune(
    source: Source,
    keys: Annotated[int, typer.Option(help="Key channels of a head.")] = 128,
    values: Annotated[int, typer.Option(help="Value channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    again: Annotated[bool, typer.Option("--again", help="Measure what was measured before, too.")] = False,
    table: Annotated[
        Path | None, typer.Option(help="Merge this GPU's choices into FILE, as dspace/runtime/tuned.json ships.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the fastest configuration of each kernel on this GPU: once, for all lengths and processes."""
    from dspace.runtime.tuning import tune, write_table

    found = tune(source, keys=keys, values=values, dtype=dtype, again=again)
    if table is not None:
        write_table(table)
    if as_json:
        show_json([c.as_dict() for c in found])
        return
    for choice in found:
        show(f"{choice.key}: {choice.config}  {choice.milliseconds:.3f} ms of {len(choice.tried)} tried")
    show(f"{len(found)} choices made" if found else "nothing to tune: all choices are known or have one proposal")


@command
def doctor(
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Run small kernels on the GPU.")] = True,
    as_json: Json = False,
) -> None:
    """What this machine can run, what is broken in it, what to do."""
    from dspace.runtime import doctor

    report = doctor(probe)
    show_json(report.as_dict()) if as_json else show(report.table())
    raise typer.Exit(0 if report.healthy else 1)

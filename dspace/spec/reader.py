"""Files, texts and tables -> checked :class:`~dspace.spec.model.Spec`."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dspace.errors import Problem, SpecError
from dspace.spec import model
from dspace.spec.check import Report, check
from dspace.spec.compose import resolve_tables
from dspace.spec.expressions import listed, nearest
from dspace.spec.library import builtin_names, find_builtin
from dspace.spec.model import Spec
from dspace.spec.positions import Positions
from dspace.spec.syntax import FormulaError, Name, parse, walk

MAX_BYTES = 100_000
"""Largest spec file; the longest built-in one has about 2,000 bytes."""


_LONG_KEY = re.compile(r"(?:[A-Za-z0-9_'\"-]{1,40}[ \t]{0,4}\.[ \t]{0,4}){32}")


@dataclass(frozen=True)
class Source:
    """One text that contributed tables to a spec."""

    file: str
    positions: Positions | None = None


def load(source: str | Path) -> Spec:
    """Read a spec by file path or by the name of a built-in one. Raises SpecError with every problem."""
    path = find(source)
    tables, sources = read(path)
    spec = build(tables, sources)
    spec._path = path
    return spec


def loads(text: str, file: str = "<string>") -> Spec:
    """Read a spec from its text; ``extends`` finds built-ins and paths from the working folder."""
    tables, source = parse_text(text, file)
    tables, sources = resolve_tables(tables, [source], Path.cwd(), (), read)
    return build(tables, sources)


def from_dict(tables: dict[str, Any], name: str | None = None, *, prune: bool = False) -> Spec:
    """A spec from plain tables, as :meth:`Spec.to_dict` gives them, for programs that compose variants.

    ``name`` overrides the tables' own. ``prune`` drops inputs and parameters (and their recipes) that no
    formula uses, so that a structural choice need not tidy up after itself.
    """
    tables = {**tables, **({"name": name} if name is not None else {})}
    origin = f"<{str(tables.get('name', 'dict'))[:64]}>"
    tables, sources = resolve_tables(tables, [Source(origin)], Path.cwd(), (), read)
    return build(tables, sources, prune=prune)


def find(source: str | Path) -> Path:
    """Path of a spec named by file or built-in name. Raises SpecError when there is none."""
    text = str(source)
    if "\0" in text or len(text) > 4_000:
        raise SpecError([Problem("this is not a file name", file=text[:40], cure="give a path or a built-in name")])
    path = Path(text)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise SpecError([Problem("this is a folder", file=text, cure="give the spec file itself")])
    except OSError as error:
        raise SpecError([Problem(f"cannot be read: {error.strerror}", file=text)]) from None
    if path.suffix != ".toml" and len(path.parts) == 1:
        builtin = find_builtin(text)
        if builtin is not None:
            return builtin
    known = builtin_names()
    raise SpecError(
        [
            Problem(
                "no such file, and no built-in spec of this name",
                file=text,
                suggestion=nearest(path.stem, known),
                cure=f"give a path ending in .toml, or one of {listed(known, 40)}",
            )
        ]
    )


def read(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Source]]:
    """Tables of a file with its ``extends`` and ``transform`` applied, and the sources they come from."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError([Problem(f"cannot be read: {error.strerror}", file=str(path))]) from None
    if len(raw) > MAX_BYTES:
        raise SpecError([_too_long(len(raw), str(path))])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        problem = Problem("not UTF-8 text", file=str(path), line=line, column=column, cure="save the file as UTF-8")
        raise SpecError([problem]) from None
    tables, source = parse_text(text, str(path))
    return resolve_tables(tables, [source], path.parent, (*chain, path.resolve()), read)


def _too_long(size: int, file: str) -> Problem:
    message = f"the spec has {size:,} bytes, at most {MAX_BYTES:,} are read"
    return Problem(message, file=file, cure="a spec is a page; check that this is the right file")


def parse_text(text: str, file: str) -> tuple[dict[str, Any], Source]:
    """TOML text -> tables and their source. Raises SpecError for what is not TOML."""
    if len(text) > MAX_BYTES:
        raise SpecError([_too_long(len(text), file)])
    dotted = _LONG_KEY.search(text)
    if dotted:  # tomllib takes a time quadratic in the number of dots
        line = text.count("\n", 0, dotted.start()) + 1
        problem = Problem("a key with too many dots", file, line, 1, cure="the deepest key is state.NAME.update")
        raise SpecError([problem])
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError([_toml_problem(error, text, file)]) from None
    except ValueError:
        raise SpecError([Problem("a number in it is too long", file=file, cure="use shorter numbers")]) from None
    except RecursionError:
        raise SpecError(
            [Problem("brackets are nested too deep", file=file, cure="a spec has tables of tables at most")]
        ) from None
    return tables, Source(file, Positions(text.replace("\r\n", "\n")))


def _toml_problem(error: tomllib.TOMLDecodeError, text: str, file: str) -> Problem:
    message = str(error)
    found = re.search(r"\(at line (\d+), column (\d+)\)", message)
    lines = text.split("\n")
    line, column = (int(found[1]), int(found[2])) if found else (len(lines), len(lines[-1]) + 1)
    message = re.sub(r"\s*\(at .*\)$", "", message)
    shown = lines[line - 1].rstrip("\r").replace("\t", " ") if line <= len(lines) else ""
    cure = 'see toml.io; a formula stands in quotes: output = "sum_k(S * q)"'
    return Problem(f"not TOML: {message[:200]}", file, line, column, source=shown[:200], cure=cure)


def build(tables: dict[str, Any], sources: list[Source], *, prune: bool = False) -> Spec:
    """Validate tables and check what they mean. Raises SpecError with every problem."""
    report = Report(locator(sources))
    try:
        spec = validate(tables, report)
    except SpecError:
        _report_formulas_too(tables, report)
        report.finish()
        raise
    if prune:
        spec = validate(pruned(spec, report), report)
    spec.__dict__["meanings"] = check(spec, report)
    spec.__dict__["locate"] = report.locate
    return spec


def validate(tables: dict[str, Any], report: Report) -> Spec:
    """Tables -> Spec by their shape alone; formulas are not looked at."""
    try:
        return Spec.model_validate(tables)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=True):
            _translate(item, report)
    except RecursionError:
        report("", "tables are nested too deep", cure="a spec has tables of tables at most")
    report.finish()
    raise AssertionError("a validation error without items")


def _report_formulas_too(tables: dict[str, Any], report: Report) -> None:
    """A file of the wrong shape: what is wrong in its formulas is reported in the same go, as far as it is known.

    Unknown keys and unknown choices are set aside and the rest is checked in full; where more is broken only
    the syntax of the formulas is, since names and axes could then be wrong through no fault of their own.
    """
    try:
        Spec.model_validate(tables)
    except ValidationError as error:
        items = error.errors(include_url=False)
        if all(item["type"] in ("extra_forbidden", "literal_error") for item in items):
            rest = copy.deepcopy(tables)
            for item in items:
                *above, key = item["loc"]
                inner: Any = rest
                for part in above:
                    inner = inner[part]
                inner.pop(key, None)
            chosen = any(item["loc"] == ("precision", "structure") for item in items)
            undeclared = any(item["loc"][-1] == "domain" for item in items)
            problems = Report(report.locate)
            try:
                check(validate(rest, problems), problems, unused=False, domains=not undeclared)
            except SpecError:
                wrong = ("precision.structure", "precision.evidence") if chosen else ()
                report.problems += [p for p in problems.problems if p.where not in wrong]
            return
    for place, text in _formula_texts(tables):
        try:
            parse(text)
        except FormulaError as error:
            report(place, error.message, error.column, error.cure, error.suggestion)


def _formula_texts(tables: dict[str, Any]) -> Iterator[tuple[str, str]]:
    keys = {
        "prior": ("mean", "precision"),
        "forgetting": ("retain",),
        "precision": ("evidence",),
        "mean": ("evidence",),
    }
    keys["readout"] = ("output", "variance")
    found = [(table, key, tables.get(table)) for table, wanted in keys.items() for key in wanted]
    for table in ("define", "layer"):
        entries = tables.get(table)
        found += [(table, key, entries) for key in entries] if isinstance(entries, dict) else []
    states = tables.get("state")
    for name, state in states.items() if isinstance(states, dict) else ():
        found += [(f"state.{name}", key, state) for key in ("init", "update")]
    for table, key, entries in found:
        text = entries.get(key) if isinstance(entries, dict) else None
        if isinstance(text, str):
            yield f"{table}.{key}", text


def pruned(spec: Spec, report: Report) -> dict[str, Any]:
    """Tables of ``spec`` without the inputs, parameters and recipes that nothing uses."""
    meanings = check(spec, report, unused=False)
    used = meanings.used
    tables = spec.to_dict()
    for table in ("inputs", "parameters"):
        tables[table] = {n: d for n, d in tables.get(table, {}).items() if n in used}
    dropped = set(spec.inputs) - used
    layer = {k: t for k, t in tables.get("layer", {}).items() if k not in dropped}
    while True:
        needed = {n.id for k in layer for n in walk(meanings.layer[k]) if isinstance(n, Name)}
        kept = {k: t for k, t in layer.items() if k in tables["inputs"] or k in needed}
        if len(kept) == len(layer):
            break
        layer = kept
    tables["layer"] = layer
    return tables


@dataclass(frozen=True)
class Locator:
    """Places of dotted paths: in the first source that has the key, else at the nearest key above it."""

    sources: tuple[Source, ...]

    def __call__(self, place: str, column: int | None) -> dict[str, Any]:
        """The fields of a Problem that say where ``place`` stands; ``column`` counts the characters of its value."""
        path = tuple(place.split(".")) if place else ()
        while path:
            for source in self.sources:
                positions = source.positions
                at = positions and (positions.key(path) if column is None else positions.character(path, column))
                if positions and at:
                    return {
                        "file": source.file,
                        "line": at[0],
                        "column": at[1],
                        "source": positions.line_text(at[0])[:200],
                    }
            path, column = path[:-1], None
        return {"file": self.sources[0].file}


def locator(sources: list[Source]) -> Locator:
    return Locator(tuple(sources))


_TABLES: dict[str, type[BaseModel]] = {
    "inputs": model.VariableDecl,
    "parameters": model.ParameterDecl,
    "state": model.StateDecl,
    "prior": model.Prior,
    "forgetting": model.Forgetting,
    "precision": model.Precision,
    "mean": model.Mean,
    "readout": model.Readout,
}
_COMPOSING = ("extends", "transform", "remove")


def _translate(item: Any, report: Report) -> None:
    """One pydantic error -> one problem."""
    path = tuple(str(part) for part in item["loc"] if part not in ("float", "int"))
    place, key = ".".join(path), path[-1] if path else ""
    kind = item["type"]
    if len(path) > 1 and path[0] in _TABLES:
        known = [*_TABLES[path[0]].model_fields]
    else:
        known = [*Spec.model_fields, *_COMPOSING]
    if kind == "extra_forbidden":
        inside = f"[{'.'.join(path[:-1])}]" if len(path) > 1 else "a spec"
        what = "key" if len(path) > 1 else "table or key"
        report(
            place,
            f"unknown {what} {key[:40]!r}",
            cure=f"{inside} has {', '.join(known)}",
            suggestion=nearest(key, known),
        )
    elif kind == "missing":
        what = f"the table [{key}]" if len(path) == 1 and key != "name" else f"the key {key!r}"
        report(place, f"{what} is missing", cure=f"add {_EXAMPLES.get(key, key + ' = ...')}")
    elif kind == "literal_error":
        wanted = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        given = str(item["input"])[:40]
        report(
            place,
            f"{given!r} is not known",
            1,
            cure=f"choose one of {', '.join(wanted)}",
            suggestion=nearest(given, wanted),
        )
    elif kind == "value_error":
        report(place, str(item["ctx"]["error"]), 1, cure=_CURES.get(key, "") or _CURES.get(path[0], ""))
    else:
        shape = _SHAPES.get(kind, "another value")
        if kind == "model_type" and len(path) == 2:
            shape = "axes in quotes, or a table,"
        report(place, f"{shape} is expected here", 1, cure=_CURES.get(path[0] if path else "", f"write {shape}"))


_SHAPES = {
    "string_type": "a string in quotes",
    "dict_type": "a table",
    "model_type": "a table",
    "tuple_type": "a list of strings",
    "float_type": "a number",
}


_EXAMPLES = {
    "name": 'name = "my_variant" at the top of the file',
    "inputs": '[inputs] with, for example, q = "k", k = "k", v = "v"',
    "readout": '[readout] with output = "scale * sum_k(mean * q)"',
    "output": 'output = "scale * sum_k(mean * q)"',
    "update": 'update = "exp(g) * S + v * k"',
    "axes": 'axes = "kv"',
    "evidence": 'evidence = "v * k"',
}
_CURES = {
    "name": 'for example name = "my_variant"',
    "inputs": 'write q = "k", or b = { axes = "v", domain = "nonnegative" }',
    "parameters": 'write I_p = { axes = "", domain = "positive", init = 1.0 }',
    "axes": "axes are k (key channels) and v (value channels)",
}

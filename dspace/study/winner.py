"""The answer of a study: its winning spec, as a file that ``dspace generate`` and ``dspace.compile`` take."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from dspace.errors import UserError
from dspace.study.artifacts import fetch
from dspace.study.results import Record, Results, collect, open_home
from dspace.study.space import Composer, identifier, merge
from dspace.study.storage import Home, storage_errors


def export(
    name: str | Path,
    output: str | Path | None = None,
    *,
    trial: int | None = None,
    folder: str | Path | None = None,
    storage: str | None = None,
) -> Path:
    """Write the spec of the best trial (or of ``trial``) and return its path, ``runs/NAME/NAME_best.toml`` by default.

    Raises UserError when no such trial is complete, StorageError when the file cannot be written.
    """
    results = collect(open_home(name, folder, storage))
    record = results.best
    if trial is not None:
        record = next((t for t in results.trials if t.number == trial and t.state == "complete"), None)
    if record is None:
        what = "trial of it" if trial is None else f"trial {trial}"
        raise UserError(f"study {results.study.name!r}: no {what} is complete\n  cure: dspace study list, then --trial")
    if Composer(results.study, results.root).compose(record.params).model.mixer != "spec":
        raise UserError(
            f"trial {record.number} is the ceiling, softmax attention: it has no spec\n"
            "  cure: dspace study list, then --trial with another one"
        )
    label = "best" if trial is None else f"trial_{trial}"
    path = Path(output) if output else results.home.folder / f"{identifier(results.study.name)}_{label}.toml"
    text = spec_text(results, record, identifier(f"{results.study.name}_{label}"))
    with storage_errors(Home(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


def artifact(results: Results, record: Record, name: str) -> Path | None:
    """The file that a trial left under this name, or None."""
    found = record.attributes.get("artifacts", {}).get(name)
    return fetch(results.home, results.study, found) if found else None


def stored_spec(results: Results, record: Record) -> dict[str, Any]:
    """The spec that the trial ran: its artifact, or composed anew from its parameters."""
    path = artifact(results, record, "spec")
    if path is not None:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return Composer(results.study, results.root).compose(record.params).spec


def spec_text(results: Results, record: Record, name: str) -> str:
    """The trial's spec as TOML under a new name; where it started its parameters becomes their ``init``."""
    from dspace.spec import from_dict

    tables = stored_spec(results, record)
    starts = Composer(results.study, results.root).compose(record.params).model.init
    for parameter, value in starts.items():
        declared = tables.get("parameters", {}).get(parameter)
        if isinstance(declared, str):
            tables["parameters"][parameter] = {"axes": declared, "init": value}
        elif isinstance(declared, dict):
            merge(declared, {"init": value})
    tables["name"] = name
    body = from_dict(tables, name=name).to_toml()
    scores = ", ".join(f"{k} {v:.4g}" for k, v in record.metrics.items())
    params = ", ".join(f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in record.params.items())
    header = f"# Trial {record.number} of the study {results.study.name}: {scores}\n# at {params}\n"
    return header + body


def model_settings(results: Results, record: Record) -> dict[str, Any]:
    """Keyword arguments of ``dspace.nn.Model`` that the trial used, defaults left out."""
    from dspace.study.schema import ModelTable

    point = Composer(results.study, results.root).compose(record.params)
    default = ModelTable().model_dump()
    sizes = ("hidden_size", "num_layers", "num_heads")
    return {k: v for k, v in point.model.model_dump().items() if k in sizes or v != default[k]}

"""Spec -> TOML text: complete, in the order of the language, re-parsable."""

from __future__ import annotations

import json
from typing import Any

from dspace.spec.model import Spec

_ORDER = ("inputs", "parameters", "define", "prior", "forgetting", "precision", "mean", "state", "readout", "layer")


def to_toml(spec: Spec) -> str:
    tables = spec.to_dict()
    lines = [f"{key} = {_value(tables[key])}" for key in ("name", "title", "doc", "references") if key in tables]
    for table in _ORDER:
        entries = tables.get(table)
        if entries is None:
            continue
        if table == "state":
            for name, state in entries.items():
                lines += ["", f"[state.{name}]", *(f"{k} = {_value(v)}" for k, v in state.items())]
            continue
        lines += ["", f"[{table}]"]
        for key, value in entries.items():
            lines.append(f"{key} = {_value(value['axes'] if _only_axes(value) else value)}")
    return "\n".join(lines) + "\n"


def _only_axes(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"axes"}


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return repr(value)

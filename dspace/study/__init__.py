"""Studies: a TOML file -> trials run by worker processes -> a report and the winning spec.

dspace.study.run("studies/quickstart.toml", jobs=2)     # or: go on where it stopped
dspace.study.report("quickstart")                       # path of one self-contained HTML page
dspace.study.export("quickstart")                       # the winning spec as TOML
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "run": "engine",
    "heal": "engine",
    "Summary": "engine",
    "load": "reading",
    "loads": "reading",
    "StudyFile": "schema",
    "collect": "results",
    "open_home": "results",
    "report": "page",
    "export": "winner",
    "publish": "publish",
    "Job": "trial",
    "Outcome": "trial",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"dspace.study.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dspace.study' has no attribute {name!r}")

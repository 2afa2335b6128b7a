"""What the compiler makes of a spec in memory, before any cache or machine comes in: its analysis and its text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspace.runtime.sources import as_spec

if TYPE_CHECKING:
    from dspace.math.ir import Analysis
    from dspace.spec import Spec

_analyses: dict[str, Analysis] = {}


def module_text(source: Any) -> str:
    """The source text of a variant's module: spec -> analysis -> text."""
    from dspace.emit import emit

    spec = as_spec(source)
    return emit(spec, analysis_of(spec))


def analysis_of(spec: Spec) -> Analysis:
    """The analysis of a spec; the last few are kept, since compiling and certifying both ask for it."""
    from dspace.math import analyse

    if spec.hash not in _analyses:
        while len(_analyses) >= 16:
            _analyses.pop(next(iter(_analyses)))
        _analyses[spec.hash] = analyse(spec)
    return _analyses[spec.hash]

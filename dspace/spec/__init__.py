"""TOML -> validated :class:`Spec`, with every problem of a file reported at once.

Names are loaded on first use, so that ``import dspace`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.spec.library import builtin_names, find_specs
    from dspace.spec.model import ParameterDecl, Spec, StateDecl, VariableDecl
    from dspace.spec.reader import from_dict, load, loads
    from dspace.spec.transforms import (
        TRANSFORMS,
        forget_to_prior,
        forget_to_zero,
        metaplastic,
        non_metaplastic,
        per_channel,
        prior_mean,
        variance_readout,
    )

_HOME = {
    "load": "reader",
    "loads": "reader",
    "from_dict": "reader",
    "builtin_names": "library",
    "find_specs": "library",
    "Spec": "model",
    "VariableDecl": "model",
    "ParameterDecl": "model",
    "StateDecl": "model",
    "TRANSFORMS": "transforms",
    "forget_to_prior": "transforms",
    "forget_to_zero": "transforms",
    "metaplastic": "transforms",
    "non_metaplastic": "transforms",
    "per_channel": "transforms",
    "prior_mean": "transforms",
    "variance_readout": "transforms",
}

__all__ = [
    "TRANSFORMS",
    "ParameterDecl",
    "Spec",
    "StateDecl",
    "VariableDecl",
    "builtin_names",
    "find_specs",
    "forget_to_prior",
    "forget_to_zero",
    "from_dict",
    "load",
    "loads",
    "metaplastic",
    "non_metaplastic",
    "per_channel",
    "prior_mean",
    "variance_readout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dspace.spec' has no attribute {name!r}")
    module = importlib.import_module(f"dspace.spec.{_HOME[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value

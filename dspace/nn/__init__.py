"""Layers and a small model from specs, and a trainer. PyTorch loads with the first name used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.nn.attention import SoftmaxAttention
    from dspace.nn.layer import Mixer, MixerState
    from dspace.nn.many import train_many
    from dspace.nn.model import Model
    from dspace.nn.operator import Operator
    from dspace.nn.stacked import stack, unstack
    from dspace.nn.surgery import convert
    from dspace.nn.training import Evaluation, Result, TrainConfig, iterate, predict, train

_HOMES = {
    "SoftmaxAttention": "attention",
    "Mixer": "layer",
    "MixerState": "layer",
    "Model": "model",
    "Operator": "operator",
    "convert": "surgery",
    "Evaluation": "training",
    "Result": "training",
    "TrainConfig": "training",
    "iterate": "training",
    "predict": "training",
    "train": "training",
    "train_many": "many",
    "stack": "stacked",
    "unstack": "stacked",
}

__all__ = [
    "Evaluation",
    "Mixer",
    "MixerState",
    "Model",
    "Operator",
    "Result",
    "SoftmaxAttention",
    "TrainConfig",
    "convert",
    "iterate",
    "predict",
    "stack",
    "train",
    "train_many",
    "unstack",
]


def __getattr__(name: str) -> Any:
    """Load a name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dspace.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dspace.nn.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

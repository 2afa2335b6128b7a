"""Plans to source text: one section a target, assembled into one self-contained module a variant."""

from dspace.emit.base import EMITTER_VERSION, Section, Target
from dspace.emit.module import emit

__all__ = ["EMITTER_VERSION", "Section", "Target", "emit"]

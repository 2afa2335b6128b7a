"""PyTorch chunkwise target: classes a, b and fold as matmuls over chunks."""

from dspace.emit.torch.section import section

__all__ = ["section"]

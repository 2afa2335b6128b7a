"""One training step as a whole, loss to new weights: compiled and recorded in a CUDA graph on a GPU, plain elsewhere."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dspace.nn.flat import FlatAdamW
from dspace.nn.model import Model, TiedEmbedding

Engine = Literal["auto", "graph", "compile", "eager"]
"""``compile``: formulas fused by torch.compile; ``graph``: no compiler, one CUDA graph; ``auto``: both on a GPU."""

ENVIRONMENT = "DSPACE_ENGINE"
"""Overrides ``auto``: one of the other names."""


class Step:
    """A training step of stacked trials on batches of one size.

    ``tokens`` ``[S * B, T]``, ``positions`` and ``targets`` ``[S * B, D]`` (int64), trial by trial. The loss of a trial
    is the mean over its own questions, so that its gradient is that of training alone.
    """

    def __init__(
        self,
        model: Model,
        optimizer: FlatAdamW,
        like: tuple[Tensor, Tensor, Tensor],
        precision: torch.dtype | None,
        engine: Engine = "auto",
    ) -> None:
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.trials = optimizer.trials
        self.device = like[0].device
        self.tokens, self.positions, self.targets = (t.clone() for t in like)
        self.control = torch.zeros(self.trials + 2, device=self.device)
        self.losses = torch.zeros(self.trials, device=self.device)
        """Sum of the losses of each trial since :meth:`take_losses`."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self._loss: Callable[..., Tensor] = self.loss
        self._update: Callable[[Tensor, tuple[Tensor | None, ...]], None] = optimizer.update
        for module in model.modules():
            if precision is not None and isinstance(module, TiedEmbedding):
                module.narrow = optimizer.narrow(module.weight, precision)
        self.engine = self._prepare(engine)

    def loss(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy ``[S]`` at the questions of each trial."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None, cache_enabled=False):
            each = self.model.losses(tokens, positions, targets)
        return each.view(self.trials, -1).mean(1)

    def compute(self) -> None:
        """The step on what the buffers hold."""
        losses = self._loss(self.tokens, self.positions, self.targets)
        grads = torch.autograd.grad(losses.sum(), self.optimizer.parameters, allow_unused=True)
        with torch.no_grad():
            self._update(self.control, grads)
            self.losses += losses.detach()

    def __call__(self, tokens: Tensor, positions: Tensor, targets: Tensor, control: Tensor) -> None:
        """Train on one batch; returns before the GPU is done."""
        for buffer, given in zip(
            (self.tokens, self.positions, self.targets, self.control),
            (tokens, positions, targets, control),
            strict=True,
        ):
            buffer.copy_(given)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.compute()

    def take_losses(self) -> Tensor:
        """The summed losses ``[S]`` on the CPU; the sum starts again at zero."""
        found = self.losses.to("cpu", copy=True)
        self.losses.zero_()
        return found

    # -- preparation -------------------------------------------------------------------------------------

    def _prepare(self, engine: Engine) -> str:
        """Compile and record as far as this machine can; says what is used."""
        if engine == "auto":
            engine = os.environ.get(ENVIRONMENT, "auto")  # type: ignore[assignment]
        cuda = self.device.type == "cuda"
        if engine == "eager" or (engine == "auto" and not cuda):
            return "eager"
        used = []
        if engine in ("auto", "compile") and self._attempt("torch.compile", self._compile):
            used.append("compile")
        if engine in ("auto", "graph") and cuda and self._attempt("a CUDA graph", self._record):
            used.append("graph")
        return "+".join(used) or "eager"

    def _attempt(self, what: str, action: Callable[[], None]) -> bool:
        saved = self.optimizer.snapshot()
        try:
            action()
            return True
        except Exception as error:  # compilers fail in many ways; the plain step is always there
            first = str(error).strip().split("\n")[0][:300]
            warnings.warn(f"training without {what}: {type(error).__name__}: {first}", stacklevel=2)
            self._loss, self._update, self.graph = (
                (self.loss, self.optimizer.update, None)
                if what == "torch.compile"
                else (self._loss, self._update, None)
            )
            return False
        finally:
            self.optimizer.restore(saved)
            self.losses.zero_()

    def _compile(self) -> None:
        torch._dynamo.reset()  # or the compiler takes each further model for one recompilation too many
        self._loss = torch.compile(self.loss, dynamic=False)
        self._update = torch.compile(self.optimizer.update, dynamic=False)
        self._warm(2)

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a graph may not do (tuning, compiling, allocating) is done before
            self._warm(3)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        self.graph = graph

    def _warm(self, times: int) -> None:
        self.control.copy_(torch.cat([torch.zeros(self.trials), torch.ones(2)]))
        for _ in range(times):
            self.compute()


def precision_of(name: str) -> torch.dtype | None:
    """The dtype of matmuls for ``precision`` of a training configuration; weights and state are float32 in any case."""
    return {"bfloat16": torch.bfloat16}.get(name)


def memory() -> dict[str, Any]:
    """Peak bytes on the GPU so far, where there is one."""
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}

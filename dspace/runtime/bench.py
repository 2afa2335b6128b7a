"""How fast a module is on this machine, against the token-by-token loop in the same run.

The module is certified first: no speed is printed for a kernel whose check is red.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dspace.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

FORMS = ("reference", "recurrent", "chunk")


@dataclass(frozen=True)
class Timing:
    """Median times of one form; ``forward`` and ``both`` (with backward) in seconds."""

    form: str
    forward: float
    both: float
    tokens_per_second: float
    """Tokens through forward and backward, all sequences together."""
    forward_speedup: float
    """How many times faster than the reference loop; 1 for the loop itself."""
    both_speedup: float


@dataclass(frozen=True)
class Bench:
    """One variant at one size."""

    name: str
    letter: str
    device: str
    device_name: str
    dtype: str
    shape: str
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """The bench as JSON sees it."""
        return asdict(self)

    def table(self) -> Table:
        """A table for the terminal."""
        from rich.table import Table

        table = Table(title=f"{self.name} (class {self.letter}), {self.shape}, {self.dtype} on {self.device_name}")
        for i, column in enumerate(("form", "forward", "x loop", "with backward", "x loop", "tokens/s")):
            table.add_column(column, justify="right" if i else "left")
        for t in self.timings:
            cells = [f"{1e3 * t.forward:.2f} ms", f"{t.forward_speedup:.1f}"]
            cells += [f"{1e3 * t.both:.2f} ms", f"{t.both_speedup:.1f}", f"{t.tokens_per_second:,.0f}"]
            table.add_row(t.form, *cells)
        return table


def bench(
    source: Any,
    *,
    batch: int = 16,
    steps: int = 256,
    heads: int = 4,
    keys: int = 16,
    values: int = 32,
    device: str | None = None,
    dtype: str = "float32",
    repeats: int = 5,
    forms: tuple[str, ...] = FORMS,
) -> Bench:
    """Time the forms of a variant, forward and forward with backward (gradients of everything).

    Raises:
        UserError: impossible sizes, an unknown device or dtype.
        CertificationError: the module is wrong on this machine, so its speed means nothing.
        SpecError: the spec cannot be compiled.
    """
    import torch

    from dspace.math import analyse
    from dspace.runtime.budgets import gates
    from dspace.runtime.cases import Case, Shape, draw_arguments
    from dspace.runtime.compiler import compile, default_device
    from dspace.runtime.sources import as_spec
    from dspace.runtime.versions import device_name

    if min(batch, steps, heads, keys, values, repeats) < 1:
        raise UserError("all sizes and repeats must be at least 1\n  cure: see dspace bench --help")
    if max(keys, values) > 256:
        raise UserError(f"keys = {keys}, values = {values}: heads have at most 256 channels\n  cure: --keys 128")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}\n  cure: float32, bfloat16 or float16")
    device = device or default_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no GPU here\n  cure: --device cpu")
    spec = as_spec(source)
    module = compile(spec)
    analysis = analyse(spec)
    case = Case("bench", Shape(batch, steps, heads, heads, keys, values))
    drawn = draw_arguments(analysis.recurrence, gates(analysis.recurrence), case, kind, device, seed=0)
    leaves = [*drawn.inputs.values(), *drawn.parameters.values()]
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    timings: list[Timing] = []
    base: dict[str, float] = {}
    for form in forms:
        function = getattr(module, f"{form}_{spec.name}")

        def forward(function: Callable[..., Any] = function) -> None:
            with torch.no_grad():
                function(*leaves)

        def both(function: Callable[..., Any] = function) -> None:
            output = function(*leaves)[0]
            torch.autograd.grad(output.float().square().sum(), leaves, allow_unused=True)

        times = {"forward": _median(forward, repeats, synchronize), "both": _median(both, repeats, synchronize)}
        base = base or times
        speedups = {k: base[k] / times[k] for k in times}
        rate = batch * steps / times["both"]
        timings.append(Timing(form, times["forward"], times["both"], rate, speedups["forward"], speedups["both"]))
    shape = f"B={batch} T={steps} H={heads} K={keys} V={values}"
    letter = analysis.classification.letter
    return Bench(spec.name, letter, device, device_name(device), dtype, shape, tuple(timings))


def _median(run: Callable[[], None], repeats: int, synchronize: Callable[[], None]) -> float:
    """Median seconds after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

"""How fast a module is on this machine: beside its roofline, and beside the peer in the same run.

The module is certified first, at the head sizes that are timed: no speed is given for a kernel whose check is red.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from dspace.errors import CertificationError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from dspace.math.ir import Analysis
    from dspace.math.roofline import Gpu

FORMS = ("reference", "recurrent", "chunk")

Mode = Literal["train", "decode"]
"""``train``: whole sequences, forward and with gradients; ``decode``: one token that carries the states on."""


@dataclass(frozen=True)
class Timing:
    """Median times of one form, ours or the peer's, in seconds; None where nothing was timed, and ``note`` says why.

    ``forward_speedup`` and ``both_speedup`` compare with the first form of the table.
    """

    form: str
    forward: float | None = None
    both: float | None = None
    """Forward with backward: gradients of everything."""
    tokens_per_second: float | None = None
    """Tokens through forward and backward (decoding: forward), all sequences together."""
    forward_speedup: float | None = None
    both_speedup: float | None = None
    first: float | None = None
    """Seconds to the first result of forward and backward: compilation of whatever was in no cache included."""
    peak_bytes: int | None = None
    """Most bytes that forward and backward had allocated at one time, beyond inputs."""
    roofline_share: float | None = None
    """The least time that counted work takes at measured rates, over the time of the forward pass."""
    device_time: float | None = None
    """Decoding: time of the GPU alone, replayed from a CUDA graph."""
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """One variant at one size. ``roofs`` are the measured rates, ``floor`` the seconds that they allow one forward pass."""

    name: str
    letter: str
    device: str
    device_name: str
    dtype: str
    shape: str
    mode: Mode
    roofs: dict[str, Any]
    floor: float
    limit: str
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """The bench as JSON sees it."""
        return asdict(self)

    def table(self) -> Table:
        """A table for the terminal."""
        from rich.table import Table

        rates = f"copies {self.roofs['bandwidth'] / 1e9:.3g} GB/s, matmuls {self.roofs['tensor'] / 1e12:.3g} TFLOP/s"
        table = Table(
            title=f"{self.name} (class {self.letter}), {self.mode}, {self.shape}, {self.dtype} on {self.device_name}",
            caption=f"floor of one forward pass {_ms(self.floor)}, set by {self.limit} ({rates}, as measured)",
        )
        backward = () if self.mode == "decode" else ("with backward", "x")
        columns = ("form", "forward", "x", "of roofline", *backward, "tokens/s", "peak", "first result", "")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if 0 < i < len(columns) - 1 else "left")
        for t in self.timings:
            share = "" if t.roofline_share is None else f"{t.roofline_share:.0%}"
            cells = [_ms(t.forward), _number(t.forward_speedup), share]
            if backward:
                cells += [_ms(t.both), _number(t.both_speedup)]
            cells += ["" if t.tokens_per_second is None else f"{t.tokens_per_second:,.0f}"]
            cells += ["" if t.peak_bytes is None else f"{t.peak_bytes / 2**20:,.0f} MiB"]
            cells += ["" if t.first is None else f"{t.first:.1f} s", t.note]
            table.add_row(t.form, *cells)
        return table

    def picture(self, path: str | Path) -> Path:
        """Bars of every form with the floor as a line, as SVG, PNG or whatever else the file's ending says."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        timed = [t for t in self.timings if t.forward is not None]
        figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.6 * len(timed)), layout="constrained")
        for row, t in enumerate(reversed(timed)):
            for shift, value, colour in ((0.2, t.forward, "#4477aa"), (-0.2, t.both, "#ee6677")):
                if value is not None:
                    axes.barh(row + shift, 1e3 * value, height=0.36, color=colour)
                    axes.annotate(
                        _ms(value), (1e3 * value, row + shift), (3, 0), textcoords="offset points", va="center"
                    )
        axes.axvline(1e3 * self.floor, color="#222222", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(timed)), [t.form for t in reversed(timed)])
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel("ms; blue: forward, red: with backward, dashed: floor of the forward pass")
        axes.set_title(f"{self.name}, {self.mode}, {self.shape}, {self.dtype}\n{self.device_name}", fontsize=10)
        file = Path(path)
        try:
            figure.savefig(file)
        except ValueError as error:  # an ending that matplotlib does not know
            raise UserError(f"{file}: {error}\n  cure: a file that ends in .svg or .png") from error
        finally:
            pyplot.close(figure)
        return file


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
    forms: tuple[str, ...] | None = None,
    mode: Mode = "train",
    peers: str | Path | None = None,
    with_peer: bool = True,
) -> Bench:
    """Time the forms of a variant, forward and forward with backward (gradients of everything), or decoding.

    Args:
        source: path of a spec file, name of a built-in spec, or a Spec.
        forms: of the module; on a GPU without the reference loop by default, which would take minutes.
        mode: "train", or "decode": one token for each of ``batch`` sequences, ``steps`` is ignored.
        peers: a file like ``benchmarks/peers.toml``, which is the default.
        with_peer: time the peer too where the file names one that is installed.

    Raises:
        UserError: impossible sizes, an unknown device, dtype, mode or form.
        CertificationError: the module is wrong on this machine, so its speed means nothing.
        SpecError: the spec cannot be compiled.
    """
    from dspace.runtime.analysis import analysis_of
    from dspace.runtime.compiler import compile, default_device
    from dspace.runtime.peers import find_peer
    from dspace.runtime.sources import as_spec
    from dspace.runtime.timing import arguments, measured_roofs
    from dspace.runtime.versions import device_name

    steps = 1 if mode == "decode" else steps
    device = device or default_device()
    _check_arguments((batch, steps, heads, keys, values, repeats), keys, values, device, dtype, mode)
    if forms is None:
        forms = ("recurrent",) if mode == "decode" else FORMS[1:] if device == "cuda" else FORMS
    if not set(forms) <= set(FORMS):
        raise UserError(f"unknown form among {', '.join(forms)}\n  cure: {', '.join(FORMS)}")
    spec = as_spec(source)
    begin = time.perf_counter()
    module = compile(spec, certify=False)
    analysis, sizes = analysis_of(spec), (batch, steps, heads, keys, values)
    leaves, states = arguments(module.SPEC, sizes, dtype, device)
    clock = _Clock(device, repeats, states if mode == "decode" else None, batch * steps)
    functions = {form: getattr(module, f"{form}_{spec.name}") for form in forms}
    first = {}
    for form, function in functions.items():  # before the certificate, which compiles the same kernels
        first[form] = clock.first(function, leaves, begin)
        begin = time.perf_counter()
    compile(spec)
    certify_sizes(spec, module, device, dtype, keys, values)

    timings: list[Timing] = []
    # What one token moves at least: states read and written, inputs, the output.
    moved = 2 * sum(s.nbytes for s in states) + sum(x.nbytes for x in leaves)
    moved += batch * heads * values * leaves[0].element_size()
    roofs = measured_roofs(device, moved if mode == "decode" else 1 << 30)
    floor, limit = _floor(analysis, roofs, sizes, mode, moved)
    for form, function in functions.items():
        base = timings[0] if timings else None
        timings.append(clock.time(form, function, leaves, first[form], floor, base))
    peer = find_peer(spec.name, peers) if with_peer and device == "cuda" else None
    if peer is not None:
        names = [v["name"] for v in (*module.SPEC["inputs"], *module.SPEC["parameters"])]
        form = "recurrent" if mode == "decode" else "chunk"
        theirs = peer.function(form, names)
        label = f"{peer.package} {form}"
        if theirs is None:
            timings.append(Timing(label, note=f"not installed: pip install {peer.package}, or no such form"))
        else:
            timings.append(clock.peer(label, theirs, functions.get(form), leaves, floor, timings[0]))
    shape = f"B={batch} T={steps} H={heads} K={keys} V={values}"
    letter = analysis.classification.letter
    return Bench(
        spec.name, letter, device, device_name(device), dtype, shape, mode, asdict(roofs), floor, limit, tuple(timings)
    )


class _Clock:
    """Times functions with the signature of a generated module's, whole sequences or one token with ``states``."""

    def __init__(self, device: str, repeats: int, states: list[Any] | None, tokens: int) -> None:
        self.device, self.repeats, self.states, self.tokens = device, repeats, states, tokens

    def calls(
        self, function: Callable[..., Any], leaves: list[Any]
    ) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
        """The forward pass, and with its backward pass unless this is decoding."""
        from dspace.runtime.timing import both_of, forward_of

        if self.states is not None:
            return forward_of(function, leaves, initial_state=tuple(self.states), output_final_state=True), None
        return forward_of(function, leaves), both_of(function, leaves)

    def first(self, function: Callable[..., Any], leaves: list[Any], begin: float) -> float:
        """Seconds from ``begin`` to the end of the first call."""
        import torch

        forward, both = self.calls(function, leaves)
        (both or forward)()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def time(
        self, form: str, function: Callable[..., Any], leaves: list[Any], first: float | None, floor: float,
        base: Timing | None, backward: bool = True,
    ) -> Timing:  # fmt: skip
        from dspace.runtime.timing import clock, graphed, peak_memory

        run, both_run = self.calls(function, leaves)
        forward = clock(run, self.device, self.repeats)
        both = clock(both_run, self.device, self.repeats) if both_run is not None and backward else None
        alone = graphed(run) if both_run is None and self.device == "cuda" else None
        whole = both if both_run is not None else forward
        return Timing(
            form=form,
            forward=forward,
            both=both,
            tokens_per_second=None if whole is None else self.tokens / whole,
            forward_speedup=base.forward / forward if base and base.forward else 1.0 if base is None else None,
            both_speedup=(base.both / both if base and base.both else 1.0 if base is None else None) if both else None,
            first=first,
            peak_bytes=peak_memory(both_run if both_run is not None and backward else run, self.device),
            roofline_share=floor / (alone or forward),
            device_time=alone,
            note="" if alone is None else f"{1e6 * alone:.1f} us of the GPU's time, which is what the share is of",
        )

    def peer(
        self, label: str, theirs: Callable[..., Any], ours: Callable[..., Any] | None, leaves: list[Any], floor: float,
        base: Timing,
    ) -> Timing:  # fmt: skip
        """Time a peer if its result is ours; what it raises is a note in its row, never the end of the bench."""
        import torch

        from dspace.runtime.compare import relative_error

        try:
            begin = time.perf_counter()
            result = self.calls(theirs, leaves)[0]()
            torch.cuda.synchronize()
            first = time.perf_counter() - begin
            if ours is not None:
                error = relative_error(self.calls(ours, leaves)[0]()[0], result[0])
                if not error < 2e-2:
                    return Timing(label, note=f"not timed: differs from ours by {error:.1e}")
        except Exception as error:  # a peer that does not run here is a finding
            return Timing(label, note=f"{type(error).__name__}: {_line(error)}")
        try:
            return self.time(label, theirs, leaves, first, floor, base)
        except Exception as error:
            timing = self.time(label, theirs, leaves, first, floor, base, backward=False)
            return Timing(**{**asdict(timing), "note": f"backward: {type(error).__name__}: {_line(error)}"})


def _check_arguments(sizes: tuple[int, ...], keys: int, values: int, device: str, dtype: str, mode: str) -> None:
    import torch

    if min(sizes) < 1:
        raise UserError("all sizes and repeats must be at least 1\n  cure: see dspace bench --help")
    if max(keys, values) > 256:
        raise UserError(f"keys = {keys}, values = {values}: heads have at most 256 channels\n  cure: --keys 128")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}\n  cure: float32, bfloat16 or float16")
    if mode not in ("train", "decode"):
        raise UserError(f"unknown mode {mode!r}\n  cure: train or decode")
    if device not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}\n  cure: cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here\n  cure: --device cpu")


def certify_sizes(spec: Any, module: ModuleType, device: str, dtype: str, keys: int, values: int) -> None:
    """Check the kernels that will be timed: head sizes and dtype decide what is compiled. Raises CertificationError."""
    from dspace.runtime.cases import Case, Shape
    from dspace.runtime.certificate import refusal
    from dspace.runtime.certify import certify_module

    if (device, dtype) == ("cpu", "float32"):  # one loop serves all sizes, and it was checked by compile
        return
    cases = [Case("bench", Shape(1, 130 if device == "cuda" else 17, 2, 2, keys, values), initial=False)]
    certificate = certify_module(spec, module, device=device, dtypes=(dtype,), cases=cases, seed=0)
    if not certificate.passed:
        raise CertificationError(refusal(certificate))


def _floor(
    analysis: Analysis, roofs: Gpu, sizes: tuple[int, int, int, int, int], mode: Mode, moved: int
) -> tuple[float, str]:
    """Least seconds of one forward pass at the measured rates, and the resource that sets them."""
    from dspace.math.roofline import Sizes, costs_of, estimate

    if mode == "decode":
        return moved / roofs.bandwidth, "bandwidth"
    B, T, H, K, V = sizes
    found = estimate(costs_of(analysis), roofs, Sizes(K=K, V=V, heads=H, tokens=B * T, chunk=min(64, T)))
    return found.seconds, found.limit


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:100]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

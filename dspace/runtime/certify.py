"""Certification: every form of a generated module against the float64 oracle, on this machine, with fresh inputs."""

from __future__ import annotations

import datetime
import functools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from dspace.errors import UserError
from dspace.runtime import versions
from dspace.runtime.budgets import Kind, budget
from dspace.runtime.cases import Arguments, Case, full_cases, quick_cases
from dspace.runtime.certificate import FORMS, Certificate
from dspace.runtime.compare import Check, compare
from dspace.runtime.expected import Expected, Results, with_gradients
from dspace.runtime.narrow import Narrow

PLAIN = " without gradients"
"""Ends the names of results that differ where nothing is differentiated."""

REPEATED = " of a later call"
"""Ends the names of results that differ at a later call with the same arguments, which a GPU's forms repeat."""

DTYPES: dict[str, tuple[str, ...]] = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
"""What a full certificate tries unless told otherwise; a quick one takes the first, on a GPU the first two."""


def certify_module(
    spec: Any,
    module: ModuleType,
    *,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
    seed: int | None = None,
    cases: Sequence[Case] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Certify a module that is at hand against the spec that it claims to implement (see :func:`dspace.verify`)."""
    if device not in DTYPES:
        raise UserError(f"unknown device {device!r}; cure: one of {', '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no usable GPU here (torch.cuda.is_available() is False); cure: device='cpu'")
    names = tuple(dtypes) if dtypes is not None else DTYPES[device][: {"cpu": 1, "cuda": 2}[device] if quick else None]
    for name in names:
        if name not in ("float16", "bfloat16", "float32", "float64"):
            raise UserError(f"unknown dtype {name!r}; cure: float32, bfloat16, float16 or float64")
    begin = time.perf_counter()
    seed = secrets.randbits(31) if seed is None else seed  # torch.seed() would seed the caller's generator
    todo = tuple(cases) if cases is not None else quick_cases(device) if quick else full_cases(device)
    examiner = Examiner(spec, module, device)
    checks: list[Check] = []
    # Every dtype is a set of kernels that the first use of a module waits for: quickly, the first is run in one case.
    few = quick and len(names) > 1
    runs = [(c, d) for n, c in enumerate(todo) for d in names if not few or n == 0 or d != names[0]]
    if device == "cuda":
        from dspace.runtime import ahead

        def prepare() -> None:
            for case, dtype in runs if quick else ():  # all of the others would not fit in memory at once
                examiner.prepare(case, dtype, seed + todo.index(case))

        ahead.compile_calls(module, certificate_calls(examiner, runs), meanwhile=prepare)
    for number, case in enumerate(todo):
        if progress is not None:
            progress(str(case))
        for dtype in (d for c, d in runs if c is case):
            checks += examiner.examine(case, dtype, seed + number)
    # The reference in float64 shows that the formulas are the same, to the last digits.
    checks += examiner.examine(todo[0], "float64", seed, forms=("reference",))
    return Certificate(
        name=spec.name,
        spec_hash=spec.hash,
        emitter_version=versions.emitter_version(),
        libraries=versions.library_versions(),
        device=device,
        device_name=versions.device_name(device),
        letter=module.SPEC["class"],
        quick=quick,
        seed=seed,
        seconds=time.perf_counter() - begin,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        checks=tuple(checks),
    )


def bare(case: Case) -> Case:
    """``case`` as a model that only runs asks for it: without variance, on which a shorter way may depend."""
    return replace(case, variance=False)


def certificate_calls(examiner: Examiner, runs: Sequence[tuple[Case, str]]) -> list[Callable[[], object]]:
    """Calls that launch what a certificate does: every (case, dtype) and form, with and without gradients, from zeros."""

    def one(case: Case, dtype: str, form: str) -> None:
        arguments = examiner.expected.blank_arguments(case, getattr(torch, dtype))
        with torch.no_grad():
            examiner.call(form, bare(case), arguments)
        results = examiner.call(form, case, arguments)
        outputs = [r for r in results.values() if r.requires_grad]
        if outputs:
            leaves = list(arguments.leaves().values())
            torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs], allow_unused=True)

    forms = [f for f in FORMS if f != "reference"]
    return [functools.partial(one, c, d, f) for c, d in runs if c.shape.T for f in forms]


class Examiner:
    """Runs the forms of one module and the oracle on the same arguments, and compares."""

    def __init__(self, spec: Any, module: ModuleType, device: str) -> None:
        self.name, self.module = spec.name, module
        self.expected = Expected(spec, device)
        self.repeats = device == "cuda"
        self.letter = str(module.SPEC["class"])
        self.has_variance = bool(module.SPEC["variance"])
        self.prepared: dict[tuple[Case, str, int], tuple[Arguments, Results, Results]] = {}

    def prepare(self, case: Case, dtype: str, seed: int) -> tuple[Arguments, Results, Results]:
        """Arguments, what the oracle makes of them, and the cotangents of that: kept until they are examined."""
        key = (case, dtype, seed)
        if key not in self.prepared:
            arguments = self.expected.arguments(case, getattr(torch, dtype), seed)
            self.prepared[key] = (arguments, *self.expected.results(case, arguments, seed))
        return self.prepared[key]

    def examine(self, case: Case, dtype: str, seed: int, forms: Sequence[str] = FORMS) -> Iterator[Check]:
        """All checks of one case in one dtype."""
        arguments, expected, cotangents = self.prepare(case, dtype, seed)
        del self.prepared[case, dtype, seed]  # memory: a full certificate has hundreds
        narrow = Narrow(self.expected, case, arguments, seed)
        for form in forms:
            found = self._run(form, case, arguments, cotangents)
            if isinstance(found, str):
                yield Check(form, str(case), dtype, "call", float("nan"), 0.0, "failed", found)
                continue
            for label in (*expected, *(n for n in found if n.endswith((PLAIN, REPEATED)))):
                quantity = label.removesuffix(PLAIN).removesuffix(REPEATED)
                reference = expected[quantity]
                accepted = budget(dtype, self._kind(quantity), form, self.letter)
                error, status, note = compare(reference, found.get(label), accepted, dtype)
                if status == "failed" and error == error and dtype != "float64":
                    allowed, errs = narrow.allowed(quantity, reference, form, accepted)
                    if error <= allowed:
                        note = f"merely evaluated at this precision, the recurrence itself errs by {errs:.1e}"
                        status = "ok"
                elif status == "failed" and label in found and narrow.overflows(quantity, found[label].dtype):
                    status, note = "undefined", "the recurrence itself overflows here"
                yield Check(form, str(case), dtype, label, error, accepted, status, note)

    def _kind(self, quantity: str) -> Kind:
        if not quantity.startswith("d "):
            return "output"
        return "gate gradient" if quantity[2:] in self.expected.gates_and_parameters else "gradient"

    def _run(self, form: str, case: Case, arguments: Arguments, cotangents: Results) -> Results | str:
        """The same quantities from the module, or the error that it raised, in one line.

        A form may go another way where nothing is differentiated, and no variance asked for: results that differ then are
        added, with PLAIN. So may a later call with the same arguments: with REPEATED.
        """
        try:
            found: Results = {}
            apart: Results = {}
            for turn in range(3 if self.repeats and form != "reference" else 1):
                results = with_gradients(self.call(form, case, arguments), cotangents, arguments)
                with torch.no_grad():
                    plain = self.call(form, bare(case), arguments)
                found = found or results
                apart |= {n + PLAIN: x for n, x in plain.items() if not torch.equal(x, found[n])}
                apart |= {n + REPEATED: x for n, x in results.items() if turn and not torch.equal(x, found[n])}
            return found | apart
        except Exception as error:  # whatever a kernel raises is a finding, not a crash of the examiner
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = next(iter(str(error).splitlines()), "")
            return f"raised {type(error).__name__}: {first[:200]}"

    def call(self, form: str, case: Case, arguments: Arguments) -> Results:
        """Output, variance and final states of one form, in one call or in pieces with carried states."""
        function = getattr(self.module, f"{form}_{self.name}")
        bounds = [0, *case.splits, case.shape.T]
        want_variance = case.variance and self.has_variance
        state: Any = arguments.states
        outputs, variances = [], []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            last = stop == case.shape.T
            result = function(
                *(x[:, start:stop] for x in arguments.inputs.values()),
                *arguments.parameters.values(),
                initial_state=state,
                output_final_state=case.final or not last,
                output_variance=want_variance,
                cu_seqlens=arguments.cu_seqlens,
            )
            state = result[-1]
            outputs.append(result[0])
            variances += result[1:-1]
        results: Results = {"o": torch.cat(outputs, 1)}
        if want_variance:
            results["variance"] = torch.cat(variances, 1)
        if case.final:
            states = (state,) if len(self.expected.state_names) == 1 else state
            results |= {f"state {n}": s for n, s in zip(self.expected.state_names, states, strict=True)}
        return results

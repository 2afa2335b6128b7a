"""Assembly: the sections of one variant become the source of one self-contained module."""

from __future__ import annotations

import ast
import importlib
import pprint
import textwrap
from importlib.util import find_spec
from typing import Any, Protocol

import sympy

from dspace.emit import frontdoor, reference
from dspace.emit.base import EMITTER_VERSION, Section, Target
from dspace.emit.naming import public_names
from dspace.errors import CompilerBug
from dspace.math.ir import Analysis, Recurrence, Variable

TARGETS = ("dspace.emit.cpu.section", "dspace.emit.torch.section", "dspace.emit.triton.section")
"""Where sections come from: each module has a function ``section(analysis) -> Section | None``. Of two targets for one
device the later one wins a form that both have."""

_LEAD = {"input": "B, T, H", "parameter": "HV", "state": "N, HV"}


NAMESPACE = '''
def _namespace(wish):
    """``wish`` for the PyTorch operators of this module, with a number behind if a copy that was loaded before has it.

    To register them by the same names again would take them away from that copy. All copies see ``sys.modules``.
    """
    name, copies = wish, 1
    while name in sys.modules:
        copies += 1
        name = f"{wish}_{copies}"
    sys.modules[name] = types.ModuleType(name, "Name of the PyTorch operators of a generated module.")
    return name


_OPS = _namespace(_ID)
'''


class Identity(Protocol):
    """What assembly needs of a spec."""

    name: str

    @property
    def hash(self) -> str: ...


def _shape(axes: str, kind: str) -> str:
    return "[" + ", ".join([_LEAD[kind], *axes.upper()]) + "]"


def _comment(text: str, width: int = 116) -> list[str]:
    lines: list[str] = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, width, subsequent_indent="    ") or [""]
    return lines


def _quotable(text: str) -> str:
    """``text`` as it stands in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _line(text: str) -> str:
    return _quotable(" ".join(text.split()))


def formulas(recurrence: Recurrence) -> list[str]:
    """The normal form, one line a formula: what a token does to each state, and what is read."""
    rows = [(f"{s.name}[{','.join(s.axes)}]", s) for s in recurrence.states]
    lines = []
    for label, s in rows:
        meaning = f"    ({s.doc})" if s.doc else ""
        lines.append(f"{label} <- {sympy.sstr(s.update)}{meaning}")
        lines.append(f"{' ' * len(label)}    starts at {sympy.sstr(s.init)}")
    lines.append(f"output[v] = {sympy.sstr(recurrence.output)}    (read {recurrence.read} the update)")
    if recurrence.variance is not None:
        lines.append(f"variance[v] = {sympy.sstr(recurrence.variance)}")
    return lines


def header(spec: Identity, analysis: Analysis) -> str:
    """The module's docstring: what it is, its mathematics, its class and why, where it came from."""
    r, c = analysis.recurrence, analysis.classification
    lines = [r.title or r.name, ""]
    if r.references:
        lines += ["References: " + ", ".join(r.references), ""]
    lines += ["One token, per head (k: key channel, v: value channel):", ""]
    for formula in formulas(r):
        lines += ["    " + line for line in _comment(formula, 110)]
    lines += ["", f"Class {c.letter}: {c.name}."]
    lines += _comment(c.reason)
    lines += ["", f"Generated from the spec {spec.name!r}, hash {spec.hash[:16]}, by emitter {EMITTER_VERSION}."]
    lines += ["Made by a program: change the spec and generate again rather than editing this file."]
    return f'"""{_quotable(chr(10).join(lines))}\n"""\n'


def spec_table(spec: Identity, analysis: Analysis, targets: dict[str, str]) -> dict[str, Any]:
    """The SPEC dictionary of the module."""
    r, c = analysis.recurrence, analysis.classification
    public = public_names(r)

    def variables(items: tuple[Variable, ...]) -> list[dict[str, Any]]:
        return [{"name": public[v.name], "axes": v.axes, "domain": v.domain, "doc": v.doc} for v in items]

    return {
        "name": r.name,
        "title": r.title,
        "references": list(r.references),
        "hash": spec.hash,
        "class": c.letter,
        "class_name": c.name,
        "reason": c.reason,
        "inputs": variables(r.inputs),
        "parameters": [d | {"init": v.init} for d, v in zip(variables(r.parameters), r.parameters, strict=True)],
        "states": [
            {"name": s.name, "axes": s.axes, "domain": s.domain, "doc": s.doc, "init": sympy.sstr(s.init)}
            for s in r.states
        ],
        "variance": r.variance is not None,
        "read": r.read,
        "forms": targets,
        "double_backward": ["reference"],
        "layer": dict(getattr(spec, "layer", {})),
        "versions": {"emitter": EMITTER_VERSION},
    }


def operators(spec: Identity) -> str:
    """Namespace of the module's PyTorch operators."""
    return f"dspace_{spec.name}_{spec.hash[:8]}"


def public_function(form: str, recurrence: Recurrence) -> str:
    """Source of ``chunk_NAME``, ``recurrent_NAME`` or ``reference_NAME``."""
    summary = {
        "chunk": "The fastest form for whole sequences: training and prefill.",
        "recurrent": "Token by token in a compiled loop, with its own backward: decoding, and a check of the other forms.",
        "reference": "Plain PyTorch, any dtype, differentiable any number of times: slow and simple.",
    }[form]
    names = public_names(recurrence)
    inputs = [names[v.name] for v in recurrence.inputs]
    parameters = [names[v.name] for v in recurrence.parameters]
    lines = [f"def {form}_{recurrence.name}("]
    lines += [f"    {name}," for name in (*inputs, *parameters)]
    lines += ["    *,", "    scale=None,", "    initial_state=None,", "    output_final_state=False,"]
    lines += ["    output_variance=False,", "    cu_seqlens=None,", "):"]
    lines += [f'    """{summary}', "", "    Args:"]
    for v in recurrence.inputs:
        domain = "" if v.domain == "real" else f", {v.domain}"
        lines += [f"        {names[v.name]}: ``{_shape(v.axes, 'input')}``{domain}. {_line(v.doc)}".rstrip()]
    for v in recurrence.parameters:
        domain = "" if v.domain == "real" else f", {v.domain}"
        lines += [f"        {names[v.name]}: ``{_shape(v.axes, 'parameter')}``{domain}. {_line(v.doc)}".rstrip()]
    held = ", ".join(f"{s.name} ``{_shape(s.axes, 'state')}``" for s in recurrence.states)
    several = "a tuple: " if len(recurrence.states) != 1 else ""
    lines += [
        "        scale: factor of the readout, ``K**-0.5`` unless given.",
        f"        initial_state: {several}{held or 'empty'}, float32; the prior unless given.",
        "        output_final_state: return the states after the last token, to carry on from.",
        "        output_variance: return the predictive variance too"
        + ("." if recurrence.variance is not None else " (this variant has none)."),
        "        cu_seqlens: ``[N + 1]`` int32 or int64, offsets of N sequences packed along T; then B must be 1.",
        "",
        "    H may be any divisor of HV, the largest number of heads given: heads are then shared in groups.",
        "",
        "    Returns:",
        "        ``(o, final_state)``, or ``(o, variance, final_state)`` with ``output_variance``; o and variance are",
        f"        ``[B, T, HV, V]`` in the dtype of ``{inputs[0]}``, final_state is None unless asked for.",
        '    """',
    ]
    call = f"({', '.join(inputs)},), ({', '.join(parameters)}{',' if parameters else ''})"
    lines += [
        "    return _call(",
        f'        "{form}", {call},',
        "        scale, initial_state, output_final_state, output_variance, cu_seqlens,",
        "    )",
    ]
    return "\n".join(lines) + "\n"


def _targets() -> list[Target]:
    """The section functions of all targets that are installed."""
    found: list[Target] = []
    for name in TARGETS:
        if find_spec(name.rpartition(".")[0]) is not None and find_spec(name) is not None:
            found.append(importlib.import_module(name).section)
    return found


def cpu_choice(analysis: Analysis, chunk: str, recurrent: str) -> str:
    """Source of ``_cpu_chunk_core``, which takes whichever of two forms is faster on a CPU.

    Measured: the native loop is faster for every state below 128 x 128, and at any size where decay is per channel.
    """
    affine = analysis.classification.affine or ()
    scalar = bool(affine) and all(s.decay_axes == "" for s in affine)
    large = "size_k * size_v >= 128 * 128" if scalar else "False"
    return (
        '_HAS_NUMBA = importlib.util.find_spec("numba") is not None\n\n\n'
        "def _cpu_chunk_core(*args):\n"
        '    """The faster form for these sizes: matmuls over chunks for large states, else the native loop."""\n'
        "    size_k, size_v = _sizes(*args[:-3])\n"
        f"    large = {large}\n"
        f"    return ({chunk} if large or not _HAS_NUMBA else {recurrent})(*args)\n"
    )


def emit(spec: Identity, analysis: Analysis, targets: list[Target] | None = None) -> str:
    """Source text of the generated module of ``spec``.

    ``targets`` are the section functions to use, all known ones unless given. Raises :class:`CompilerBug` if what
    was assembled is not Python.
    """
    recurrence = analysis.recurrence
    made = [target(analysis) for target in (_targets() if targets is None else targets)]
    sections: list[Section] = [s for s in made if s is not None]
    cores: dict[tuple[str, str], str] = {}
    for s in sections:
        for form, function in (("chunk", s.chunk), ("recurrent", s.recurrent)):
            if function is not None:
                cores[s.device, form] = function
    # A device without a chunk form of its own runs its recurrent one.
    for device in {d for d, _ in cores}:
        if (device, "recurrent") in cores:
            cores.setdefault((device, "chunk"), cores[device, "recurrent"])
    imports = sorted(
        {line for s in sections for line in s.imports}
        | {"import sys", "import torch", "import types", "import weakref"}
    )
    choice = []
    native = cores.get(("cpu", "recurrent"))
    if native is not None and cores["cpu", "chunk"] != native:
        choice = [cpu_choice(analysis, cores["cpu", "chunk"], native)]
        cores["cpu", "chunk"] = "_cpu_chunk_core"
        imports = sorted({*imports, "import importlib.util"})
    forms = {f"{device}/{form}": function for (device, form), function in sorted(cores.items())}

    table = pprint.pformat(spec_table(spec, analysis, forms), width=116, sort_dicts=False)
    parts = [
        header(spec, analysis),
        "from __future__ import annotations\n\n" + "\n".join(imports),
        f"SPEC = {table}\n_ID = {operators(spec)!r}  # by which its operators and tuned configurations are known",
        NAMESPACE,
        frontdoor.section(recurrence),
        reference.section(recurrence),
        *(s.code for s in sections),
        *choice,
        "_CORES = {\n"
        + "".join(f"    ({d!r}, {f!r}): {function},\n" for (d, f), function in sorted(cores.items()))
        + "}",
        *(public_function(form, recurrence) for form in ("chunk", "recurrent", "reference")),
    ]
    source = "\n\n\n".join(part.strip("\n") for part in parts) + "\n"
    source = source.replace('"""\n\n\nfrom __future__', '"""\n\nfrom __future__', 1)
    try:
        ast.parse(source)
    except SyntaxError as error:
        line = source.splitlines()[(error.lineno or 1) - 1]
        raise CompilerBug(f"emission of {recurrence.name!r} produced invalid Python: {error.msg}: {line}") from error
    return source

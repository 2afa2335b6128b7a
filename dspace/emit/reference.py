"""The reference section: a token loop in plain PyTorch, in any dtype, differentiable any number of times."""

from __future__ import annotations

import sympy

from dspace.emit.naming import internal_names
from dspace.emit.printers import TorchPrinter
from dspace.math.ir import Axes, Recurrence, State, Variable, axes_of

_ALIGN: dict[Axes, str] = {"": "[..., None, None]", "k": "[..., :, None]", "v": "[..., None, :]", "kv": ""}
_STRIP: dict[Axes, str] = {"": "[..., 0, 0]", "k": "[..., 0]", "v": "[..., 0, :]", "kv": ""}


def softplus_helper(recurrence: Recurrence) -> str:
    """Definition of ``_softplus``, or nothing where the recurrence has none."""
    from dspace.math.functions import Softplus

    expressions = [s.update for s in recurrence.states] + [s.init for s in recurrence.states]
    expressions += [recurrence.output, recurrence.variance or sympy.Integer(0)]
    if not any(e.has(Softplus) for e in expressions):
        return ""
    return (
        "def _softplus(x):\n"
        '    """log(1 + exp(x)), exact and free of overflow in every dtype."""\n'
        "    return -torch.nn.functional.logsigmoid(-x)\n\n\n"
    )


def section(recurrence: Recurrence) -> str:
    """Source of ``_reference_core``, with the signature of every core (see :class:`dspace.emit.base.Section`)."""
    names = internal_names(recurrence)
    table = recurrence.axes_table()
    inputs = [names[v.name] for v in recurrence.inputs]
    parameters = [names[v.name] for v in recurrence.parameters]
    states = [names[s.name] for s in recurrence.states]
    every = [*inputs, *parameters, *states]
    show = TorchPrinter(names, table)
    out: list[str] = []
    write = out.append

    write(f"def _reference_core({', '.join(every)}, scale, offsets, want_variance):")
    write('    """Token by token, as the formulas of the header stand: slow, simple, the measure of the rest."""')
    write("    if offsets is not None:  # packed: one sequence after the other")
    write("        bounds = offsets.tolist()")
    write("        parts = [")
    write("            _reference_core(")
    for name in inputs:
        write(f"                {name}[:, begin:end],")
    for name in parameters:
        write(f"                {name},")
    for name in states:
        write(f"                {name}[count : count + 1],")
    write("                scale, None, want_variance,")
    write("            )")
    write("            for count, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:]))")
    write("        ]")
    write("        output = torch.cat([rows[0] for rows in parts], 1)")
    write("        variance = torch.cat([rows[1] for rows in parts], 1) if want_variance else None")
    write(
        f"        return (output, variance, *(torch.cat([rows[2 + i] for rows in parts]) for i in range({len(states)})))"
    )
    write(f"    dtype = {states[0] if states else inputs[0]}.dtype")
    write(f"    like = {inputs[0]}")
    write(f"    size_k, size_v = _sizes({', '.join(every)})")
    write("    # Every tensor is aligned to [sequence, head, K, V], with size 1 where it has no such axis.")
    for v in recurrence.inputs:
        write(f"    {names[v.name]}_all = {names[v.name]}.to(dtype){_ALIGN[v.axes]}".rstrip())
    aligned: tuple[Variable | State, ...] = (*recurrence.parameters, *recurrence.states)
    for known in aligned:
        if _ALIGN[known.axes]:
            write(f"    {names[known.name]} = {names[known.name]}{_ALIGN[known.axes]}")
    write("    outputs, variances = [], []")
    write("    for token in range(like.shape[1]):")
    for name in inputs:
        write(f"        {name} = {name}_all[:, token]")
    readout = [f"        outputs.append(({show(recurrence.output)}).expand(like.shape[0], like.shape[2], 1, size_v))"]
    if recurrence.variance is not None:
        readout.append("        if want_variance:")
        shown = f"({show(recurrence.variance)}).expand(like.shape[0], like.shape[2], 1, size_v)"
        readout.append(f"            variances.append({shown})")
    if recurrence.read == "before":
        out.extend(readout)
    updates = []
    for s in recurrence.states:
        short = axes_of(s.update, table) != s.axes
        updates.append(f"({show(s.update)}).expand_as({names[s.name]})" if short else show(s.update))
    if len(states) == 1:
        write(f"        {states[0]} = {updates[0]}")
    elif states:
        write(f"        {', '.join(states)} = (")
        out.extend(f"            {text}," for text in updates)
        write("        )")
    if recurrence.read == "after":
        out.extend(readout)
    write("    empty = like.new_zeros(like.shape[0], 0, like.shape[2], size_v)")
    write("    output = torch.stack(outputs, 1)[:, :, :, 0].to(like.dtype) if outputs else empty")
    write("    variance = None")
    write("    if want_variance:")
    write("        variance = torch.stack(variances, 1)[:, :, :, 0].to(like.dtype) if variances else empty")
    final = [f"{names[s.name]}{_STRIP[s.axes]}" for s in recurrence.states]
    write(f"    return {', '.join(['output', 'variance', *final])}")
    return softplus_helper(recurrence) + "\n".join(out) + "\n"

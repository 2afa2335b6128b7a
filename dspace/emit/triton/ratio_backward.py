"""Kernels of class c, backward.

The adjoint of an affine state is affine too, so it splits. ``local``: all chunks in parallel, states made again by
matmuls, and of every gradient the part that stays inside the chunk; what the chunk hands to earlier ones is kept.
``carry``: an elementwise scan turns those into the adjoint at the end of each chunk. ``settle``: all chunks in
parallel, the part of each gradient that came through the adjoint at the end.

The log-decay gradient needs no product of the size of a state. With S' the adjoint of S, dlog a_t = <a_t S_(t-1), S'_t>
obeys dlog a_(t+1) = dlog a_t + <write_t, S'_t> - <S_t, direct part of S'_t>, both sums over the chunk's own gradients;
its first value in a chunk is the product of start state and adjoint, so that errors do not pile up over chunks
(THEORY.md section 3c, identities G1 and G2).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dspace.emit.triton.ratio_text import (
    OPTIONS,
    RatioPrinter,
    Words,
    chunk_start,
    cotangent,
    fetch,
    key_lines,
    signature,
    state_lines,
    statements,
    value_block,
    whole,
)


@dataclass(frozen=True)
class Adjoints:
    """Cotangents of one token's body, elementwise: of states, tensors in the body, and what is summed over both axes.

    ``sums``: expressions of tiles to add up over channels; ``parameters`` and ``decays``: factor and index into
    ``sums`` of each parameter's gradient and of each decay group's <S, direct adjoint>.
    """

    states: tuple[sympy.Expr, ...]
    queries: dict[str, sympy.Expr]
    beside: dict[str, sympy.Expr]
    sums: tuple[sympy.Expr, ...]
    parameters: tuple[tuple[sympy.Expr, int], ...]
    decays: tuple[tuple[sympy.Expr, int], ...]


def adjoints(words: Words, variance: bool) -> Adjoints:
    plan = words.plan
    count = len(plan.reads) if variance else plan.output_reads
    loss = sympy.Add(*(sympy.Symbol(f"d_{plan.reads[j].name}", real=True) * words.body(j) for j in range(count)))
    states = tuple(sympy.diff(loss, s.symbol) for s in plan.states)
    small = {p.symbol for p in plan.parameters} | {sympy.Symbol("scale", positive=True)}
    sums: list[sympy.Expr] = []

    def total(expr: sympy.Expr) -> tuple[sympy.Expr, int]:
        # Mostly a multiple of some state's cotangent (homogeneity), whose tile is there already.
        for own in states:
            if own != 0:
                factor = sympy.cancel(sympy.together(expr / own))
                if factor.free_symbols <= small:
                    if own not in sums:
                        sums.append(own)
                    return factor, sums.index(own)
        if expr not in sums:
            sums.append(expr)
        return sympy.S.One, sums.index(expr)

    queries = {n: sympy.diff(loss, t.symbol) for t, n in _in_bodies(words, "k")}
    beside = {n: sympy.diff(loss, t.symbol) for t, n in _in_bodies(words, "v")}
    parameters = tuple(total(sympy.diff(loss, p.symbol)) for p in plan.parameters)
    decays = []
    for d in range(len(plan.decays)):
        inner = sympy.Add(*(s.symbol * own for s, own in zip(plan.states, states, strict=True) if s.group == d))
        decays.append(total(sympy.together(inner)))
    return Adjoints(states, queries, beside, tuple(sums), parameters, tuple(decays))


def _in_bodies(words: Words, axes: str) -> list:
    used = {s for b in words.plan.bodies for s in b.free_symbols}
    return [(t, words.of(t)) for t in words.plan.tensors if t.axes == axes and t.symbol in used]


def along(words: Words) -> list[str]:
    """Buffers of one number a token and decay group: <S, direct adjoint> - <write, adjoint>, and the latter."""
    groups = range(len(words.plan.decays))
    return [f"along_{d}" for d in groups] + ([f"wrote_{d}" for d in groups] if words.plan.exclusive else [])


def local_kernel(words: Words) -> str:
    """Gradients inside a chunk, and the adjoint that it hands to the chunks before it."""
    plan = words.plan
    cases = {False: adjoints(words, False), True: adjoints(words, True)}
    reads = [r.name for r in plan.reads]
    keyed = words.tensors("k", plan.keys)
    queried = words.tensors("k", plan.bodies)
    both = words.tensors("k", [*plan.keys, *plan.bodies])
    channels = words.tensors("v", [*plan.values, *plan.bodies])
    valued = words.tensors("v", plan.values)
    beside = words.tensors("v", plan.bodies)
    sums = max(len(c.sums) for c in cases.values())
    states = words.states
    pointers = [*(f"{n}_in" for n in (*both, *channels)), *words.sums, *(f"{p}_in" for p in words.parameters)]
    pointers += ["chunks", *(f"d_{r}_in" for r in reads), *(f"d_{n}_part" for n in (*both, *channels))]
    pointers += along(words) + [f"d_{p}_part" for p in words.parameters] + ["adjoints", "spans"]
    lines = signature(
        "_local_kernel",
        pointers,
        "scale, T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,\n"
        f"    VARIANCE: tl.constexpr, {OPTIONS}",
    )
    lines += [
        '    """Adjoints inside a chunk: all value channels of one head in turn, slabs of key channels within."""'
    ]
    lines += ["    NK: tl.constexpr = (K + BK - 1) // BK", "    NV: tl.constexpr = (V + BV - 1) // BV"]
    lines += chunk_start(words)
    lines += (
        """
    own = i_c.to(tl.int64) * 16 * H + i_h
    # picks the rows of one token out of all channels
    pick = tl.where(o_c[None, :, None] == o_c[None, None, :], 1.0, 0.0) + tl.zeros([BV, 16, 16], tl.float32)
    pick = tl.trans(tl.reshape(pick, [BV * 16, 16]).to(OT))
    slot = (i_c.to(tl.int64) * H + i_h) * STATES * V * K
""".replace("STATES", str(len(states)))
        .strip("\n")
        .splitlines()
    )
    lines += [f"    along_{d}_t = tl.zeros([16], tl.float32)" for d in range(len(plan.decays))]
    lines += [f"    sum_{j} = tl.zeros([16, BK], tl.float32)" for j in range(sums)]
    kept = [f"d_{n}" for n in queried] + [f"d_key_{j}" for j in range(len(plan.keys))]
    lines += [f"    all_{n} = tl.zeros([16, BK], tl.float32)" for n in kept]
    for n in (*channels, *(f"d_{r}" for r in reads)):
        guard = "    if VARIANCE:\n        " if n in [f"d_{r}" for r in reads[plan.output_reads :]] else "    "
        lines.append(f"{guard}{n}_next = {fetch(n, '0', 'o_v < V')}")
    lines.append("    for i_v in range(NV):")
    lines += value_block(words, [*channels, *(f"d_{r}" for r in reads[: plan.output_reads])], 8)
    for j, r in list(enumerate(reads))[plan.output_reads :]:
        lines += [
            "        if VARIANCE:",
            f"            {cotangent(words, j)}",
            f"            d_{r}_next = {fetch('d_' + r, '(first + BV)', 'first + BV + o_v < V')}",
        ]
    lines += [
        "        tile = block[:, None] * K + o_k[None, :]",
        "        ours = ((block // BV) * BV == first) & (block < V)",
    ]
    pairs = [(i, m) for i, s in enumerate(plan.states) for m in range(len(s.writes))]
    lines += [f"        d_rows_{i}_{m} = tl.zeros([BV * 16, 16], tl.float32)" for i, m in pairs]
    lines += [f"        d_{n}_rows = tl.zeros([BV, 16], tl.float32)" for n in beside]
    lines += [
        "        for i_k in range(NK):",
        "            slab = i_k * BK",
        "            m_k = slab + o_k < K",
        "            m_ck = live[:, None] & m_k[None, :]",
        "            m_tile = (block < V)[:, None] & m_k[None, :]",
        "            at_k = at[:, None] * K + (slab + o_k)[None, :]",
    ]
    for n in both:
        lines.append(f"            raw_{n} = tl.load({n}_in + start * K + at_k, mask=m_ck, other=0.0)")
        lines.append(f"            {n} = raw_{n}.to(tl.float32)")
    lines += ["            if NK > 1:"]
    lines += [
        f"                d_{n}_before = tl.load(d_{n}_part + own * K + at_k, mask=m_ck & (i_v > 0), other=0.0)"
        for n in both
    ]
    lines += key_lines(words, "", 12)
    lines += state_lines(words, "chunks + slot + tile", "", "slab", 12)
    # cotangents of the body
    wide = dict(words.names)
    wide.update({t.name: f"{words.of(t)}[None, :, :]" for t in plan.tensors if words.of(t) in queried})
    wide.update({t.name: f"{words.of(t)}[:, :, None]" for t in plan.tensors if words.of(t) in beside})
    wide.update({f"d_{r}": f"d_{r}[:, :, None]" for r in reads})
    different = cases[True] != cases[False]
    for variance, case in cases.items():
        if variance and not different:
            continue
        pad = 12
        if different:
            lines.append("            if VARIANCE:" if variance else "            if not VARIANCE:")
            pad = 16
        exprs = {f"d_{s}": e for s, e in zip(states, case.states, strict=True)}
        exprs |= {f"d_{n}_tile": e for n, e in {**case.queries, **case.beside}.items()}
        extra = [j for j, e in enumerate(case.sums) if e not in case.states]
        exprs |= {f"sum_{j}_tile": case.sums[j] for j in extra}
        lines += statements(exprs, wide, pad)
        shaped = [*(f"d_{s}" for s in states), *(f"d_{n}_tile" for n in queried), *(f"sum_{j}_tile" for j in extra)]
        lines.append(" " * pad + "if (K % BK != 0) or (V % BV != 0):")
        for n in [*shaped, *(f"d_{m}_tile" for m in beside)]:
            lines.append(" " * pad + f"    {n} = tl.where(m_v[:, None, None] & m_k[None, None, :], {n}, 0.0)")
        for n in shaped:
            lines.append(" " * pad + f"{n} = tl.reshape({whole(words, exprs[n], n)}, [BV * 16, BK]).to(OT)")
        for j, e in enumerate(case.sums):
            tile = f"sum_{j}_tile" if j in extra else f"d_{states[case.states.index(e)]}"
            lines.append(" " * pad + f"sum_{j} = tl.dot(pick, {tile}, sum_{j}, input_precision=PRECISION)")
    dot = "tl.dot({}, {}, input_precision=PRECISION)"
    for n in beside:
        lines.append(f"            d_{n}_rows += tl.sum(d_{n}_tile, 2)")
    for i, m in pairs:
        s = plan.states[i]
        lines.append(
            f"            d_rows_{i}_{m} = tl.dot(d_{states[i]}, tl.trans(key_{s.writes[m].key}), d_rows_{i}_{m}, input_precision=PRECISION)"
        )
    for n in queried:
        lines.append(f"            d_{n} = {dot.format('pick', f'd_{n}_tile')}")
    begun: set[int] = set()
    for i, m in pairs:
        s, w = plan.states[i], plan.states[i].writes[m]
        rows = f"tl.trans(rows_{w.value}_{s.group})"
        more = f", d_key_{w.key}" if w.key in begun else ""
        begun.add(w.key)
        lines.append(f"            d_key_{w.key} = tl.dot({rows}, d_{states[i]}{more}, input_precision=PRECISION)")
    for i, s in enumerate(plan.states):
        handed = dot.format(f"tl.trans(lead_{s.group})", f"d_{states[i]}")
        lines += [
            f"            handed = {handed}",
            f"            tl.store(adjoints + slot + tile + {i} * V * K + slab, handed.to(adjoints.dtype.element_ty), mask=ours[:, None] & m_k[None, :])",
        ]
    lines.append("            if NK > 1:")
    lines += _tensor_parts(words, "d_", 16, " + d_{n}_before", "own * K + at_k", "m_ck")
    lines.append("            else:")
    lines += [f"                all_{n} += {n}" for n in kept]
    lines += [
        "        m_out = live[None, :] & m_v[:, None]",
        "        at_v = at[None, :] * V + (first + o_v)[:, None]",
    ]
    grads: dict[int, list[str]] = {}
    for i, m in pairs:
        s, w = plan.states[i], plan.states[i].writes[m]
        lines.append(
            f"        d_value_{i}_{m} = tl.sum(tl.reshape(d_rows_{i}_{m}, [BV, 16, 16]) * within_{s.group}[None, :, :], 1)"
        )
        lines.append(f"        along_{s.group}_t += tl.sum(value_{w.value} * d_value_{i}_{m}, 0)")
        grads.setdefault(w.value, []).append(f"d_value_{i}_{m}")
    lines += [f"        d_value_{j} = {' + '.join(g)}" for j, g in grads.items()]
    lines += _value_parts(words, channels, valued, beside, 8)
    lines += [
        "    if NK == 1:",
        "        m_k = live[:, None] & (o_k < K)[None, :]",
        "        at_k = at[:, None] * K + o_k[None, :]",
    ]
    for n in keyed:
        lines.append(f"        {n} = tl.load({n}_in + start * K + at_k, mask=m_k, other=0.0).to(tl.float32)")
    lines += _tensor_parts(words, "all_d_", 8, "", "own * K + at_k", "m_k")
    lines += [f"    sum_{j}_t = tl.sum(sum_{j}, 1)" for j in range(sums)]
    show = RatioPrinter(words.names)
    for variance, case in cases.items():
        if variance and not different:
            continue
        pad = 4
        if different:
            lines.append("    if VARIANCE:" if variance else "    if not VARIANCE:")
            pad = 8
        for d, (factor, j) in enumerate(case.decays):
            if plan.exclusive:
                lines.append(" " * pad + f"wrote_{d}_t = along_{d}_t")
            lines.append(" " * pad + f"along_{d}_t = ({show(factor)}) * sum_{j}_t - along_{d}_t")
        for p, (factor, j) in zip(words.parameters, case.parameters, strict=True):
            lines.append(" " * pad + f"d_{p} = tl.sum(({show(factor)}) * sum_{j}_t, 0)")
    lines += [f"    tl.store({a} + own + at, {a}_t, mask=live)" for a in along(words)]
    for p in words.parameters:
        lines.append(f"    tl.store(d_{p}_part + i_h * tl.num_programs(0) + i_c, tl.where(begin < end, d_{p}, 0.0))")
    return "\n".join(lines) + "\n"


def _tensor_parts(words: Words, prefix: str, indent: int, before: str, at: str, mask: str) -> list[str]:
    """Stores of the chunk's own part of the gradients of tensors on k, from those of keys and bodies."""
    plan, lines = words.plan, []
    queried = words.tensors("k", plan.bodies)
    show = RatioPrinter(words.names)
    for t in plan.tensors:
        n = words.of(t)
        if t.axes != "k":
            continue
        terms = [f"{prefix}{n}"] if n in queried else []
        terms += chain(plan.keys, t.symbol, f"{prefix}key_", show)
        lines.append(
            " " * indent + f"tl.store(d_{n}_part + {at}, {' + '.join(terms)}{before.format(n=n)}, mask={mask})"
        )
    return lines


def chain(exprs: tuple[sympy.Expr, ...], symbol: sympy.Symbol, prefix: str, show: RatioPrinter) -> list[str]:
    """Terms of the chain rule: ``PREFIXj * d expr_j / d symbol``."""
    terms = []
    for j, e in enumerate(exprs):
        slope = sympy.diff(e, symbol)
        if slope == 1:
            terms.append(f"{prefix}{j}")
        elif slope != 0:
            terms.append(f"{prefix}{j} * ({show(slope)})")
    return terms


def _value_parts(words: Words, channels: list[str], valued: list[str], beside: list[str], indent: int) -> list[str]:
    plan, lines = words.plan, []
    show = RatioPrinter(words.names)
    for t in plan.tensors:
        n = words.of(t)
        if t.axes != "v":
            continue
        terms = [f"d_{n}_rows"] if n in beside else []
        terms += chain(plan.values, t.symbol, "d_value_", show)
        lines.append(" " * indent + f"tl.store(d_{n}_part + own * V + at_v, {' + '.join(terms)}, mask=m_out)")
    return lines

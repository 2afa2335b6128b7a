"""Kernel of class c, backward, inside the chunks.

The adjoint of an affine state is affine too, so it splits. Here, all chunks in parallel: states made again by products,
and of every gradient the part that stays inside the chunk; what the chunk hands to earlier ones is kept. The rest,
which comes through the chunks behind, is :mod:`.ratio_settle`'s.

With S' the adjoint of a state S and D the part of S' that comes straight from the reads, one product of tiles serves
all: ``back[k, s] = sum_t D[k, t] decay(s to t)`` is the adjoint of what token s wrote, as far as the chunk sees it;
times the value it is a key's gradient, times the key and summed a value's, and in the first column, decayed once
more, it is what the chunk hands over.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dspace.emit.triton.ratio_expressions import RatioPrinter, statements
from dspace.emit.triton.ratio_text import (
    OPTIONS,
    Words,
    chunk_start,
    kept_keys,
    key_lines,
    octet,
    scaled,
    side,
    signature,
    start_lines,
    state_lines,
    tuples,
    write_lines,
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


def kept_sums(words: Words) -> list[str]:
    """What the local kernel keeps for each token and value channel: gradients of values
    by decay group, and of tensors in bodies."""
    beside = [f"beside_{n}" for n in words.tensors("v", words.plan.bodies)]
    return [f"d_value_{j}_{d}" for j, d in words.rows()] + beside


def k_gradient(words: Words, name: str) -> str:
    """Where the gradient of a tensor on k goes: what the chunks behind add to is a part."""
    return f"d_{name}_part" if name in words.tensors("k", words.plan.keys) else f"d_{name}_out"


def local_kernel(words: Words) -> str:
    """Gradients inside a chunk, and the adjoint that it hands to the chunks before it."""
    plan = words.plan
    cases = {False: adjoints(words, False), True: adjoints(words, True)}
    reads = [r.name for r in plan.reads]
    queried = words.tensors("k", plan.bodies)
    both = words.tensors("k", [*plan.keys, *plan.bodies])
    channels = words.tensors("v", [*plan.values, *plan.bodies])
    beside = words.tensors("v", plan.bodies)
    sums = max(len(c.sums) for c in cases.values())
    states, keys = words.states, range(len(plan.keys))
    keyed = words.tensors("k", plan.keys)
    parts = kept_sums(words)
    pointers = [
        *(f"{n}_in" for n in (*both, *channels)),
        *(f"{d}_in" for d in words.decays),
        *(f"{p}_in" for p in words.parameters),
    ]
    pointers += ["chunks", *(f"d_{r}_in" for r in reads), *(k_gradient(words, n) for n in both)]
    pointers += [f"{n}_part" for n in parts]
    pointers += [f"direct_{d}_part" for d in range(len(plan.decays))] + [f"d_{p}_part" for p in words.parameters]
    pointers += ["adjoints", "spans"]
    lines = signature(
        "_local_kernel",
        pointers,
        "scale, T, LOW, HIGH, NT, H",
        "K: tl.constexpr, V: tl.constexpr, I: tl.constexpr, N: tl.constexpr,\n"
        f"    FAST: tl.constexpr, VARIANCE: tl.constexpr, {OPTIONS}",
    )
    lines += [
        '    """Adjoints inside a chunk: one slab of N times I tiles of key channels of one head, all value channels.',
        "",
        "    Tiles: rows are key channels, columns tokens t (states, their adjoints) or s (of what wrote).",
        '    """',
    ]
    lines += chunk_start(words, True)
    lines += [
        "    first_k = tl.program_id(1) * 16 * I * N",
        "    o_k = 16 * tl.arange(0, I)[:, None, None, None, None]",
    ]
    kept = [*(f"d_{n}" for n in queried), *(f"d_key_{j}" for j in keys)]
    lines += tuples([*queried, *kept_keys(words), *(f"key_{j}" for j in keys), *kept], 4)
    lines += ["    for i_s in tl.static_range(N):", "        channel = first_k + i_s * 16 * I + o_k + row"]
    lines += key_lines(words, kept_keys(words), 8)
    for n in queried:
        at = f"{n}_in + start * K + column * H * K + channel"
        lines.append(f"        {n} = {n} + (_get({at}, live_column & (channel < K)).to(tl.float32),)")
    lines += [f"        {n} = {n} + (zero,)" for n in kept]
    lines += [f"    sum_{j} = tl.zeros([1, 2, 1, 2, 32], tl.float32)" for j in range(sums)]
    lines += ["    for i_v in range((V + 7) // 8):", "        first_g = i_v * 8", *start_lines(words, 8)]
    first, second = reads[: plan.output_reads], reads[plan.output_reads :]
    lines += octet(words, [*channels, *(f"d_{r}" for r in first)], 8)
    lines += scaled(words, first, 8)
    if second:
        lines += ["        if VARIANCE:", *octet(words, [f"d_{r}" for r in second], 12), *scaled(words, second, 12)]
    lines += [f"        all_{n} = tl.zeros([1, 2, 1, 2, 32], tl.float32)  # lane rows: value channels" for n in parts]
    lines.append("        for i_g in range(0, tl.minimum(8, V - first_g)):")
    for guard, some in ((0, first), (1, second)):
        if guard and some:
            lines.append(" " * 12 + "if VARIANCE:")
        lines += [" " * (12 + 4 * guard) + f"d_{r} = _pick(d_{r}_8, i_g, FAST)" for r in some]
    valued = words.tensors("v", plan.values)
    lines += [" " * 12 + f"{n} = _pick({n}_8, i_g, FAST)" for n in channels if n not in valued]
    lines += write_lines(words, False, 12)
    lines += tuples([f"new_{n}" for n in kept], 12)
    lines.append(" " * 12 + "for i_s in tl.static_range(N):")
    lines.append(" " * 16 + "channel = first_k + i_s * 16 * I + o_k + row")
    lines += state_lines(words, True, 16)
    wide = dict(words.names) | {t.name: f"{words.of(t)}[i_s]" for t in plan.tensors if words.of(t) in queried}
    different = cases[True] != cases[False]
    for variance, case in cases.items():
        if variance and not different:
            continue
        pad = 16
        if different:
            lines.append(" " * 16 + ("if VARIANCE:" if variance else "if not VARIANCE:"))
            pad = 20
        exprs = {f"d_{s}": e for s, e in zip(states, case.states, strict=True)}
        exprs |= {f"d_{n}_tile": e for n, e in {**case.queries, **case.beside}.items()}
        extra = [j for j, e in enumerate(case.sums) if e not in case.states]
        exprs |= {f"sum_{j}_tile": case.sums[j] for j in extra}
        lines += statements({n: words.shown(e) for n, e in exprs.items()}, wide, pad)
        for n, e in exprs.items():
            if not words.whole(e):
                lines.append(" " * pad + f"{n} = {n} + zero")
        lines.append(" " * pad + "if K % (16 * I) != 0:")
        lines += [" " * pad + f"    {n} = tl.where(channel < K, {n}, 0.0)" for n in exprs]
        for j, e in enumerate(case.sums):
            tile = f"sum_{j}_tile" if j in extra else f"d_{states[case.states.index(e)]}"
            lines.append(" " * pad + f"sum_{j} += tl.sum(tl.sum({tile}, 2, keep_dims=True), 0, keep_dims=True)")
    space = " " * 16
    for i, s in enumerate(plan.states):
        n = states[i]
        more = f" + d_{n}" if plan.exclusive else ""  # the chunk's first read comes before its first decay
        lines += [
            f"{space}back_{n} = _mma(d_{n}.to(OT), back_{s.group}, zero, PRECISION, FAST)",
            f"{space}at_handed = (slot * {len(states)} + {i}) * V * K + (first_g + i_g) * K + channel + 0 * column",
            f"{space}_put(adjoints + at_handed, back_{n} * first_{s.group}{more}, (column == 0) & (channel < K))",
        ]
    grads: dict[str, list[str]] = {}
    sides: dict[str, list[str]] = {}
    for i, s in enumerate(plan.states):
        for w in s.writes:
            grads.setdefault(f"d_key_{w.key}", []).append(f"value_{w.value} * back_{states[i]}")
            sides.setdefault(f"d_value_{w.value}_{s.group}", []).append(f"{side(words, w.key)} * back_{states[i]}")
    for n in queried:
        grads[f"d_{n}"] = [f"d_{n}_tile"]
    for n in beside:
        sides[f"beside_{n}"] = [f"d_{n}_tile"]
    lines += [f"{space}new_{n} = new_{n} + ({' + '.join([f'{n}[i_s]', *grads[n]])},)" for n in kept]
    lines += [
        f"{space}side = {' + '.join(sides[n])}\n{space}of_{n} = side if i_s == 0 else of_{n} + side" for n in parts
    ]
    lines += [" " * 12 + f"{n} = new_{n}" for n in kept]
    lines += [
        " " * 12 + f"all_{n} = tl.where(lane_row == i_g, _sum_rows_rounded(of_{n}, OT, FAST), all_{n})" for n in parts
    ]
    lines += [
        "        own = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)",
        "        at_part = (own * V + first_g + lane_row) * 16 + column",
    ]
    lines += [f"        _put({n}_part + at_part, all_{n}, first_g + lane_row < V)" for n in parts]
    lines += ["    for i_s in tl.static_range(N):", "        channel = first_k + i_s * 16 * I + o_k + row"]
    lines += ["        at_k = slot * 16 * K + column * K + channel"]
    show = RatioPrinter({t.name: f"raw_{words.of(t)}" for t in plan.tensors})
    for t in plan.tensors:
        if t.axes != "k":
            continue
        n = words.of(t)
        terms = [f"d_{n}[i_s]"] if n in queried else []
        slopes = chain(plan.keys, t.symbol, "d_key_{}[i_s]", show)
        if any("raw_" in x for x in slopes):
            for m in keyed:
                at = f"{m}_in + start * K + column * H * K + channel"
                lines.append(f"        raw_{m} = _get({at}, live_column & (channel < K)).to(tl.float32)")
        value = " + ".join([*terms, *slopes])
        if n in keyed:
            lines.append(f"        _put(d_{n}_part + at_k, {value}, channel < K)")
        else:
            at = "start * K + column * H * K + channel"
            lines.append(f"        _put(d_{n}_out + {at}, {value}, live_column & (channel < K))")
    lines += [f"    total_{j} = _sum_rows(sum_{j}, FAST)" for j in range(sums)]
    lines += ["    own = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)"]
    show = RatioPrinter(words.names)
    for variance, case in cases.items():
        if variance and not different:
            continue
        space = " " * 4
        if different:
            lines.append("    if VARIANCE:" if variance else "    if not VARIANCE:")
            space = " " * 8
        for d, (factor, j) in enumerate(case.decays):
            place = f"direct_{d}_part + own * 16 + column + 0 * lane_row"
            lines.append(f"{space}_put({place}, ({show(factor)}) * total_{j}, lane_row == 0)")
        for p, (factor, j) in zip(words.parameters, case.parameters, strict=True):
            once = f"tl.where(lane_row == 0, ({show(factor)}) * total_{j}, 0.0)"
            lines.append(f"{space}d_{p} = tl.sum(tl.reshape({once}, [128]), 0)")
    for p in words.parameters:
        place = f"d_{p}_part + own"
        lines.append(f"    tl.store({place}, tl.where(begin < end, d_{p}, 0.0))")
    return "\n".join(lines) + "\n"


def chain(exprs: tuple[sympy.Expr, ...], symbol: sympy.Symbol, name: str, show: RatioPrinter) -> list[str]:
    """Terms of the chain rule: ``name.format(j) * d expr_j / d symbol``."""
    terms = []
    for j, e in enumerate(exprs):
        slope = sympy.diff(e, symbol)
        if slope == 1:
            terms.append(name.format(j))
        elif slope != 0:
            terms.append(f"{name.format(j)} * ({show(slope)})")
    return terms

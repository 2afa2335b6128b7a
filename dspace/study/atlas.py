"""Where a study's winner stands among the known variants: the map of proven reductions with it, as inline SVG."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from dspace.math.drawing import LINES, WORDS, label_of, lay_out, name_of
from dspace.math.map import COLOURS, SAME, Edge, Map, builtin_map, extend_map

if TYPE_CHECKING:
    from dspace.math.ir import Analysis
    from dspace.math.layout import Curve

UNIT = 96.0
"""Pixels of an inch."""
NAME, LABEL, LEADING = 12.5, 9.5, 1.2
WINNER = "the winner"


def atlas(winner: Analysis) -> dict[str, Any]:
    """What the report shows: the picture, its legend, and in words what the winner becomes and what becomes it."""
    from dspace.math import analyse
    from dspace.runtime.cache import default_dir
    from dspace.spec import builtin_names, load

    known = builtin_map(default_dir() / "map-report.json")
    drawn = extend_map(known, {name: analyse(load(name)) for name in builtin_names()}, WINNER, winner)
    present = {n.letter for n in drawn.nodes}
    from dspace.math.classes import NAMES

    return {
        "svg": svg(drawn, WINNER),
        "classes": [(COLOURS[c], f"{c}: {NAMES[c]}") for c in COLOURS if c in present],
        "kinds": [(kind, words) for kind, words in WORDS.items() if any(e.kind == kind for e in drawn.edges)],
        "words": sentences(drawn, WINNER),
    }


def sentences(drawn: Map, name: str) -> list[str]:
    """Every edge at ``name`` that does not follow from others."""
    own = [e for e in drawn.skeleton() if name in (e.source, e.target)]
    told = [
        f"{_plain(e.source)} becomes {_plain(e.target)}{_way(e)}" for e in sorted(own, key=lambda e: e.target == name)
    ]
    return told or [f"nothing here becomes {name}, and it becomes none of these"]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _way(edge: Edge) -> str:
    if edge.text == SAME:
        return f": {SAME}"
    return f" in the limit {edge.text}" if edge.kind == "limit" else f" with {edge.text}"


def svg(drawn: Map, marked: str = "") -> str:
    """The picture; colours of text and paper are the page's."""
    layout = lay_out(drawn)
    boxes = [*layout.nodes.values(), *layout.labels]
    left, right = min(b.x - b.width / 2 for b in boxes) - 0.1, max(b.x + b.width / 2 for b in boxes) + 0.1
    low, high = min(b.y - b.height / 2 for b in boxes) - 0.1, max(b.y + b.height / 2 for b in boxes) + 0.1

    def at(x: float, y: float) -> tuple[str, str]:
        return f"{(x - left) * UNIT:.1f}", f"{(high - y) * UNIT:.1f}"

    size = f"{(right - left) * UNIT:.0f} {(high - low) * UNIT:.0f}"
    parts = [f'<svg class="atlas" viewBox="0 0 {size}" role="img" aria-label="Map of variants and proven reductions">']
    for curve in layout.curves:
        (a, b), (c, d), (e, f) = (at(*p) for p in curve.points)
        told = html.escape(f"{curve.edge.source} to {curve.edge.target}: {curve.edge.text}")
        shape = f'<path class="edge {curve.edge.kind}" d="M{a} {b}Q{c} {d} {e} {f}"><title>{told}</title></path>'
        parts.append(shape + f'<path class="head {curve.edge.kind}" d="{_head(curve, at)}"/>')
    for curve, box in zip(layout.curves, layout.labels, strict=True):
        x, y = at(box.x - box.width / 2, box.y + box.height / 2)
        size = f'width="{box.width * UNIT:.1f}" height="{box.height * UNIT:.1f}"'
        parts.append(f'<rect class="behind" x="{x}" y="{y}" {size}/>')
        x, y = at(box.x, box.y)
        parts.append(_text(label_of(curve.edge), float(x), float(y), LABEL, f"said {curve.edge.kind}"))
    for node in drawn.nodes:
        box = layout.nodes[node.name]
        x, y = at(box.x - box.width / 2, box.y + box.height / 2)
        css = "node marked" if node.name == marked else "node"
        parts.append(
            f'<rect class="{css}" x="{x}" y="{y}" width="{box.width * UNIT:.1f}" height="{box.height * UNIT:.1f}" rx="5"'
            f' fill="{COLOURS[node.letter]}"><title>{html.escape(node.title)}</title></rect>'
        )
        x, y = at(box.x, box.y)
        parts.append(_text(name_of(node.name), float(x), float(y), NAME, "name"))
    return "".join([*parts, "</svg>"])


def _head(curve: Curve, at: Any) -> str:
    """A small triangle at the end of a curve, along it."""
    (_, (cx, cy), (ex, ey)) = curve.points
    length = math.hypot(ex - cx, ey - cy) or 1.0
    dx, dy = (ex - cx) / length, (ey - cy) / length
    back, wide = 0.1, 0.04
    corners = [
        (ex, ey),
        (ex - back * dx - wide * dy, ey - back * dy + wide * dx),
        (ex - back * dx + wide * dy, ey - back * dy - wide * dx),
    ]
    return "M" + "L".join(" ".join(at(*p)) for p in corners) + "Z"


def _text(text: str, x: float, y: float, size: float, css: str) -> str:
    lines = text.split("\n")
    first = y - (len(lines) - 1) * size * LEADING / 2 + 0.35 * size
    spans = "".join(
        f'<tspan x="{x:.1f}" y="{first + i * size * LEADING:.1f}">{html.escape(line)}</tspan>'
        for i, line in enumerate(lines)
    )
    return f'<text class="{css}" font-size="{size}">{spans}</text>'


assert set(LINES) == set(WORDS)

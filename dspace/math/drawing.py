"""The picture of a map: general variants above, special ones below, classes as colours, limits dashed, transforms dotted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspace.math.map import Map

Position = tuple[float, float]

MOVE = "#a05a00"
"""Colour of transforms."""
LINES: dict[str, Any] = {"exact": "solid", "limit": (0, (4, 3)), "transform": (0, (1, 1.5))}
"""Line style of each kind of edge."""


def layout(drawn: Map) -> dict[str, Position]:
    """Places of variants: each a row below all that become it; rows ordered to keep edges short."""
    import networkx

    families = drawn.families()
    family = {name: f for f in families for name in f}
    graph = networkx.DiGraph()
    graph.add_nodes_from(families)
    for e in drawn.skeleton():
        if e.kind != "transform" and family[e.source] != family[e.target]:
            graph.add_edge(family[e.source], family[e.target])
    if not networkx.is_directed_acyclic_graph(graph):  # limits may close a circle: rank by exact edges alone
        graph.remove_edges_from(list(graph.edges))
        for e in drawn.edges:
            if e.kind == "exact" and family[e.source] != family[e.target]:
                graph.add_edge(family[e.source], family[e.target])
    depth = {f: 0 for f in families}
    for f in networkx.topological_sort(graph):
        for below in graph.successors(f):
            depth[below] = max(depth[below], depth[f] + 1)
    lonely = [f for f in families if not graph.degree(f)]
    rows: dict[int, list[tuple[str, ...]]] = {}
    for f in families:
        if f not in lonely:
            rows.setdefault(depth[f], []).append(f)
    if lonely:  # variants that nothing becomes and that become nothing: a row of their own
        rows[max(rows, default=-1) + 1] = lonely
    order = {f: float(i) for row in rows.values() for i, f in enumerate(row)}
    for _ in range(8):  # barycentres, down and up
        for level in [*sorted(rows), *sorted(rows, reverse=True)]:

            def centre(f: tuple[str, ...]) -> float:
                near = [*graph.predecessors(f), *graph.successors(f)]
                return sum(order[n] for n in near) / len(near) if near else order[f]

            rows[level].sort(key=centre)
            widths = [len(f) for f in rows[level]]
            at = -sum(widths) / 2
            for f, width in zip(rows[level], widths, strict=True):
                order[f] = at + width / 2
                at += width
    places: dict[str, Position] = {}
    for level, row in rows.items():
        width = sum(len(f) for f in row)
        x = -width / 2 + 0.5
        for f in row:
            for name in f:
                places[name] = (x, -float(level))
                x += 1
    return places


def draw(drawn: Map, path: Path) -> None:
    """Write the picture to ``path`` (SVG, PDF or PNG by its suffix)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from dspace.math.classes import NAMES
    from dspace.math.map import COLOURS

    places = layout(drawn)
    xs, ys = [p[0] for p in places.values()], [p[1] for p in places.values()]
    width, height = 2.3 * (max(xs) - min(xs) + 1.4), 1.5 * (max(ys) - min(ys) + 1.6)
    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.axis("off")
    axes.set_xlim(min(xs) - 0.7, max(xs) + 0.7)
    axes.set_ylim(min(ys) - 0.8, max(ys) + 0.6)
    letters = {n.name: n.letter for n in drawn.nodes}
    for name, (x, y) in places.items():
        axes.text(
            x,
            y,
            name.replace("_", " ").replace(" attention", "\nattention"),
            ha="center",
            va="center",
            fontsize=9,
            color="white",
            zorder=3,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": COLOURS[letters[name]], "edgecolor": "none"},
        )
    for i, e in enumerate(drawn.skeleton()):
        start, end = places[e.source], places[e.target]
        level = start[1] == end[1]
        side = 1 if start[0] <= end[0] else -1
        bend = 0.35 if level else {"limit": -0.22, "exact": 0.06, "transform": 0.3}[e.kind] * side
        colour = MOVE if e.kind == "transform" else "#555555"
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 17, "shrinkB": 17}
        style |= {"linestyle": LINES[e.kind]}
        style |= {"connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=1)
        share = {"limit": 0.34, "exact": 0.56, "transform": 0.3}[e.kind] + 0.05 * (i % 3 - 1)
        x = start[0] + share * (end[0] - start[0])
        y = start[1] + share * (end[1] - start[1])
        if not level:  # halfway out along the bend
            x += bend * (end[1] - start[1]) / 2
            y -= bend * (end[0] - start[0]) / 2
        else:
            y += (-0.5 if start[0] < end[0] else 0.5) * bend * abs(end[0] - start[0])
        shade = MOVE if e.kind == "transform" else "#333333"
        label = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.text(x, y, e.text, ha="center", va="center", fontsize=6.5, color=shade, zorder=2, bbox=label)
    shown = [letter for letter in COLOURS if letter in letters.values()]
    legend: list[Artist] = [Patch(facecolor=COLOURS[c], label=f"class {c}: {NAMES[c]}") for c in shown]
    legend += [
        Line2D([], [], color="#555555", label="exact"),
        Line2D([], [], color="#555555", linestyle="--", label="limit"),
        Line2D([], [], color=MOVE, linestyle=":", label="transform"),
    ]
    axes.legend(handles=legend, loc="lower center", bbox_to_anchor=(0.5, -0.05), ncol=3, fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)

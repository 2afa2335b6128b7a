"""The picture of a map: general variants above, special ones below, classes as colours, limits dashed, transforms dotted."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspace.math.layout import Layout, Size, arrange

if TYPE_CHECKING:
    from dspace.math.map import Edge, Map

LINES: dict[str, tuple[str, Any]] = {
    "exact": ("#333333", "solid"),
    "limit": ("#8e3b8a", (0, (4, 2.5))),
    "fold": ("#2f7d32", (0, (6, 1.5, 1, 1.5))),
    "transform": ("#a05a00", (0, (1, 1.5))),
}
"""Colour and line style of each kind of edge."""
WORDS = {
    "exact": "becomes, exactly",
    "limit": "becomes, in a limit",
    "fold": "becomes, small states carried beside",
    "transform": "a transform makes",
}

NAME, LABEL = 9.5, 7.0
"""Sizes of the texts, in points."""
WRAP = 22
"""Letters of a label before it is broken after a comma."""


def draw(drawn: Map, path: Path) -> None:
    """Write the picture to ``path`` (SVG, PDF or PNG by its suffix). Raises UserError for any other suffix."""
    from dspace.errors import UserError

    if path.suffix.lower() not in (".svg", ".pdf", ".png"):
        raise UserError(f"{path}: a map is drawn as .svg, .pdf or .png\n  cure: give the file one of these suffixes")
    figure = _figure(drawn)
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else {"dpi": 160}
    with _settings():
        figure.savefig(path, bbox_inches="tight", **options)


def _settings() -> Any:
    import matplotlib

    # One salt: the same map is the same file.
    return matplotlib.rc_context({"svg.hashsalt": "dspace", "font.family": "DejaVu Sans"})


def label_of(edge: Edge) -> str:
    """The text of an edge, broken into lines."""
    lines: list[str] = []
    for piece in re.split(r"(?<=,) |(?<=with) ", edge.text):  # within an equation nothing is broken
        if lines and len(lines[-1]) + len(piece) < WRAP:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return "\n".join(lines)


def name_of(name: str) -> str:
    """The name of a variant, in two lines where it is long."""
    return "\n".join(textwrap.wrap(name.replace("_", " "), 14)) if len(name) > 16 else name.replace("_", " ")


def lay_out(drawn: Map) -> Layout:
    """The layout with the sizes that the texts have in the picture."""
    with _settings():
        nodes = {n.name: _grown(_measure(name_of(n.name), NAME), 0.2, 0.16) for n in drawn.nodes}
        labels = {e: _grown(_measure(label_of(e), LABEL), 0.05, 0.04) for e in drawn.skeleton()}
    return arrange(drawn, nodes, labels)


def _grown(size: Size, by_width: float, by_height: float) -> Size:
    return size[0] + by_width, size[1] + by_height


def _measure(text: str, points: float) -> Size:
    """Width and height of ``text`` in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    lines = text.split("\n")
    outlines = [TextPath((0, 0), line or " ", prop=FontProperties(size=points)).vertices for line in lines]
    # Control points lie outside a curve by little: their extent is quicker to have than the curve's.
    return max((float(v[:, 0].max()) for v in outlines if len(v)), default=0.0) / 72, len(lines) * 1.25 * points / 72


def _figure(drawn: Map) -> Any:
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Outline

    from dspace.math.map import COLOURS

    layout = lay_out(drawn)
    boxes = [*layout.nodes.values(), *layout.labels]
    left, right = min(b.x - b.width / 2 for b in boxes) - 0.15, max(b.x + b.width / 2 for b in boxes) + 0.15
    low, high = min(b.y - b.height / 2 for b in boxes) - 0.15, max(b.y + b.height / 2 for b in boxes) + 0.15
    figure = Figure(figsize=(right - left, high - low))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.axis("off")
    letters = {n.name: n.letter for n in drawn.nodes}
    for curve in layout.curves:
        colour, style = LINES[curve.edge.kind]
        outline = Outline(list(curve.points), [Outline.MOVETO, Outline.CURVE3, Outline.CURVE3])
        axes.add_patch(PathPatch(outline, fill=False, edgecolor=colour, linewidth=1.1, linestyle=style, zorder=1))
        # The head apart, on the last piece of the curve, so that dots do not make it ragged.
        tail, tip = (tuple(p) for p in curve.at(np.array([0.97, 1.0])))
        head = FancyArrowPatch(tail, tip, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=0.6, zorder=1)
        head.shrinkA = head.shrinkB = 0
        axes.add_patch(head)
    for curve, box in zip(layout.curves, layout.labels, strict=True):
        background = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.92}
        axes.text(
            box.x,
            box.y,
            label_of(curve.edge),
            ha="center",
            va="center",
            fontsize=LABEL,
            color=LINES[curve.edge.kind][0],
            zorder=2,
            bbox=background,
            linespacing=1.15,
        )
    for name, box in layout.nodes.items():
        corner = (box.x - box.width / 2 + 0.05, box.y - box.height / 2 + 0.05)
        shape = FancyBboxPatch(
            corner,
            box.width - 0.1,
            box.height - 0.1,
            boxstyle="round,pad=0.05",
            facecolor=COLOURS[letters[name]],
            edgecolor="none",
            zorder=3,
        )
        axes.add_patch(shape)
        ink = _ink(COLOURS[letters[name]])
        axes.text(box.x, box.y, name_of(name), ha="center", va="center", fontsize=NAME, color=ink, zorder=4)
    axes.legend(
        handles=_legend(drawn), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=2, fontsize=8, frameon=False
    )
    return figure


def _ink(colour: str) -> str:
    """White or black, whichever is read more easily on ``colour``."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.66 else "black"


def _legend(drawn: Map) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from dspace.math.classes import NAMES
    from dspace.math.map import COLOURS

    present = {n.letter for n in drawn.nodes}
    kinds = {e.kind for e in drawn.skeleton()}
    handles: list[Any] = [Patch(facecolor=COLOURS[c], label=f"{c}: {NAMES[c]}") for c in COLOURS if c in present]
    for kind, (colour, style) in LINES.items():
        if kind in kinds:
            handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=1.3, label=WORDS[kind]))
    return handles

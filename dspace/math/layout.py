"""Where everything of a map goes, in inches: variants in rows, curves around them, labels where nothing else is.

Nothing here draws; sizes of texts are given, so that the result can be tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dspace.math.map import Edge, Map

Size = tuple[float, float]
"""Width and height."""

ROW, GAP = 1.45, 0.95
"""Distance of rows, and between variants of one row."""
CLEAR = 0.1
"""Free space around a variant."""
BENDS = (0.0, 0.1, -0.1, 0.2, -0.2, 0.32, -0.32, 0.46, -0.46, 0.62, -0.62, 0.8, -0.8)
"""How far a curve may lie off the straight line, as a share of its length."""


@dataclass(frozen=True)
class Box:
    """A rectangle by its centre and size."""

    x: float
    y: float
    width: float
    height: float

    def grown(self, by: float) -> Box:
        return Box(self.x, self.y, self.width + 2 * by, self.height + 2 * by)

    def holds(self, points: np.ndarray) -> np.ndarray:
        """Which of ``points`` ``[n, 2]`` lie within."""
        return (abs(points[:, 0] - self.x) < self.width / 2) & (abs(points[:, 1] - self.y) < self.height / 2)

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        wide = min(self.x + self.width / 2, other.x + other.width / 2) - max(
            self.x - self.width / 2, other.x - other.width / 2
        )
        high = min(self.y + self.height / 2, other.y + other.height / 2) - max(
            self.y - self.height / 2, other.y - other.height / 2
        )
        return max(wide, 0.0) * max(high, 0.0)


@dataclass(frozen=True)
class Curve:
    """A quadratic Bezier curve from the border of one variant to that of another."""

    edge: Edge
    points: tuple[tuple[float, float], ...]
    """Start, control point, end."""

    def at(self, t: np.ndarray) -> np.ndarray:
        a, b, c = (np.array(p) for p in self.points)
        t = t[:, None]
        return (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c


@dataclass(frozen=True)
class Layout:
    """Boxes of variants by name, curves, and the box of the label of each curve, in the order of the curves."""

    nodes: Mapping[str, Box]
    curves: tuple[Curve, ...]
    labels: tuple[Box, ...]


def arrange(drawn: Map, node_sizes: Mapping[str, Size], label_sizes: Mapping[Edge, Size]) -> Layout:
    """Lay out the skeleton of ``drawn``; sizes are those of the texts."""
    edges = drawn.skeleton()
    nodes = _place(drawn, edges, node_sizes)
    curves = _route(edges, nodes)
    return Layout(nodes, curves, _label(curves, nodes, label_sizes))


def rows_of(drawn: Map, edges: Sequence[Edge]) -> tuple[list[list[tuple[str, ...]]], dict]:
    """Families in rows, each below all that become it, ordered to keep edges short; and the neighbours of each."""
    import networkx

    families = drawn.families()
    family = {name: f for f in families for name in f}
    pairs = {
        kind: {(family[e.source], family[e.target]) for e in edges if e.kind == kind} for kind in ("exact", "limit")
    }
    graph = networkx.DiGraph()
    graph.add_nodes_from(families)
    for source, target in sorted(pairs["exact"]) + sorted(pairs["limit"]):
        if source != target:
            graph.add_edge(source, target)
            if not networkx.is_directed_acyclic_graph(graph):  # limits may close a circle: exact edges rank
                graph.remove_edge(source, target)
    moves = {(family[e.source], family[e.target]) for e in edges if e.kind in ("transform", "fold")}
    near: dict = {f: {*graph.predecessors(f), *graph.successors(f)} for f in families}
    for a, b in moves:
        near[a].add(b)
        near[b].add(a)
    depth = {f: 0 for f in families}
    for f in networkx.topological_sort(graph):
        for below in graph.successors(f):
            depth[below] = max(depth[below], depth[f] + 1)
    for f in reversed(list(networkx.topological_sort(graph))):  # not higher than what it becomes needs
        below = [depth[n] for n in graph.successors(f)]
        if below:
            depth[f] = min(below) - 1
    for f in families:  # what only a fold or a transform joins to others stands beside them
        if near[f] and not graph.degree(f):
            depth[f] = max(depth[n] for n in near[f])
    rows: dict[int, list[tuple[str, ...]]] = {}
    for f in families:
        if near[f]:
            rows.setdefault(depth[f], []).append(f)
    ordered = [rows[d] for d in sorted(rows)]
    lonely = [f for f in families if not near[f]]
    return [*ordered, *([lonely] if lonely else [])], near


def _place(drawn: Map, edges: Sequence[Edge], sizes: Mapping[str, Size]) -> dict[str, Box]:
    rows, near = rows_of(drawn, edges)
    width = {f: sum(sizes[n][0] for n in f) + GAP * 1.6 * (len(f) - 1) for row in rows for f in row}
    at: dict[tuple[str, ...], float] = {}
    for row in rows:
        _spread(row, {f: float(i) for i, f in enumerate(row)}, width, at)
    best, best_cost = dict(at), math.inf
    for sweep in range(24):  # barycentres, down and up
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = {f: float(np.mean([at[n] for n in near[f]])) if near[f] else at[f] for f in row}
            row.sort(key=lambda f: wanted[f])
            _spread(row, wanted, width, at)
        cost = sum(abs(at[f] - at[n]) ** 1.5 for f in near for n in near[f])
        if cost < best_cost:
            best, best_cost = dict(at), cost
    boxes = {}
    for level, row in enumerate(rows):
        for f in row:
            x = best[f] - width[f] / 2
            for name in f:
                wide, high = sizes[name]
                boxes[name] = Box(x + wide / 2, -ROW * level, wide, high)
                x += wide + GAP * 1.6
    return boxes


def _spread(row: Sequence, wanted: Mapping, width: Mapping, at: dict) -> None:
    """Put the families of a row as near to where they are wanted as their widths allow, in their order."""
    low: list[float] = []
    for i, f in enumerate(row):
        left = wanted[f] if i == 0 else max(wanted[f], low[-1] + (width[row[i - 1]] + width[f]) / 2 + GAP)
        low.append(left)
    high = [0.0] * len(row)
    for i in range(len(row) - 1, -1, -1):
        f = row[i]
        high[i] = (
            wanted[f] if i == len(row) - 1 else min(wanted[f], high[i + 1] - (width[row[i + 1]] + width[f]) / 2 - GAP)
        )
    for i, f in enumerate(row):  # the mean of both keeps the distances
        at[f] = (low[i] + high[i]) / 2


_T = np.linspace(0.0, 1.0, 41)


def _route(edges: Sequence[Edge], nodes: Mapping[str, Box]) -> tuple[Curve, ...]:
    """Curves that pass by other variants and keep apart from each other: the straightest that do, long ones last."""
    routed: dict[int, Curve] = {}

    def length(i: int) -> float:
        a, b = nodes[edges[i].source], nodes[edges[i].target]
        return math.hypot(a.x - b.x, a.y - b.y)

    order = sorted(range(len(edges)), key=length)
    for _ in range(2):  # again, with all others known
        for i in order:
            others = [c.at(_T) for j, c in routed.items() if j != i]
            choices = [_curve(edges[i], nodes, bend) for bend in BENDS]
            costs = [
                _cost(c, nodes, others) + 0.25 * abs(bend) * length(i) for c, bend in zip(choices, BENDS, strict=True)
            ]
            routed[i] = choices[int(np.argmin(costs))]
    return tuple(routed[i] for i in range(len(edges)))


def _curve(edge: Edge, nodes: Mapping[str, Box], bend: float) -> Curve:
    a, b = nodes[edge.source], nodes[edge.target]
    middle = ((a.x + b.x) / 2 - bend * (b.y - a.y), (a.y + b.y) / 2 + bend * (b.x - a.x))
    whole = Curve(edge, ((a.x, a.y), middle, (b.x, b.y)))
    points = whole.at(_T)
    inside_a, inside_b = a.grown(0.04).holds(points), b.grown(0.04).holds(points)
    first = float(_T[max(int(np.argmin(inside_a)), 1)])
    last = float(_T[min(len(_T) - 1 - int(np.argmin(inside_b[::-1])), len(_T) - 2)])
    return Curve(edge, _part(whole.points, first, max(last, first + 0.02)))


def _part(points: Sequence, first: float, last: float) -> tuple[tuple[float, float], ...]:
    """The piece of a quadratic curve between two parameters."""
    a, b, c = (np.array(p) for p in points)

    def blossom(s: float, t: float) -> tuple[float, float]:
        x = (1 - s) * (1 - t) * a + (s * (1 - t) + t * (1 - s)) * b + s * t * c
        return float(x[0]), float(x[1])

    return blossom(first, first), blossom(first, last), blossom(last, last)


def _cost(curve: Curve, nodes: Mapping[str, Box], others: Sequence[np.ndarray]) -> float:
    points = curve.at(_T)
    cost = 0.0
    for name, box in nodes.items():
        if name not in (curve.edge.source, curve.edge.target):
            cost += 30.0 * float(box.holds(points).sum())
            cost += 3.0 * float(box.grown(CLEAR).holds(points).sum())
    if others:
        inner = points[6:-6:2]
        gaps = inner[None, :, None] - np.stack(others)[:, None, 6:-6]
        apart = (gaps**2).sum(-1).min(-1)
        cost += 0.35 * float((apart < 0.12**2).sum()) + 0.12 * float((apart < 0.35**2).sum())
    return cost


def _label(curves: Sequence[Curve], nodes: Mapping[str, Box], sizes: Mapping[Edge, Size]) -> tuple[Box, ...]:
    """A place for the label of each curve, on it or beside it, where it hides least."""
    lines = [c.at(np.linspace(0.0, 1.0, 49)) for c in curves]
    blocks = np.array([[n.x, n.y, n.width + 0.1, n.height + 0.1] for n in nodes.values()])
    choices = [_places(c, sizes[c.edge]) for c in curves]
    placed = np.full((len(curves), 4), np.nan)
    order = sorted(range(len(curves)), key=lambda i: -sizes[curves[i].edge][0])
    for _ in range(2):  # again, with all others known
        for i in order:
            centres, far = choices[i]
            size = np.array(sizes[curves[i].edge])
            boxes = np.concatenate([centres, np.broadcast_to(size, centres.shape)], 1)
            others = np.delete(placed, i, 0)
            others = others[~np.isnan(others[:, 0])]
            cost = far + 400.0 * (_overlaps(boxes, blocks) + _overlaps(boxes, others + [0.0, 0.0, 0.08, 0.08]))
            foreign = np.concatenate([line for j, line in enumerate(lines) if j != i] or [np.zeros((0, 2))])
            hidden = (abs(foreign[None] - centres[:, None]) < size / 2).all(-1)
            placed[i] = boxes[int(np.argmin(cost + 0.4 * hidden.sum(1)))]
    return tuple(Box(*map(float, row)) for row in placed)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area of each of ``boxes`` (rows of centre and size) that ``others`` cover."""
    apart = abs(boxes[:, None, :2] - others[None, :, :2])
    shared = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    covered = np.clip((boxes[:, None, 2:] + others[None, :, 2:]) / 2 - apart, 0, shared)
    return covered.prod(-1).sum(-1)


def _places(curve: Curve, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Centres where the label may be, and how far each is from the best: on the middle of its line."""
    wide, high = size
    t = np.linspace(0.14, 0.86, 19)
    points = curve.at(t)
    slope = np.gradient(points, axis=0)
    slope /= np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-9)
    reach = abs(slope[:, 1:]) * wide / 2 + abs(slope[:, :1]) * high / 2 + 0.03
    normal = np.stack([-slope[:, 1], slope[:, 0]], 1)
    off_middle = abs(t - 0.5)
    centres, far = [points], [off_middle]
    for distance, dislike in ((0.0, 0.8), (0.2, 3.0), (0.45, 6.0)):
        for side in (1.0, -1.0):
            centres.append(points + side * normal * (reach + distance))
            far.append(off_middle + dislike)
    return np.concatenate(centres), np.concatenate(far)

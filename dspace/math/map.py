"""The map of a design space: variants, and every proven reduction between them.

drawn = build_map({name: analyse(load(name)) for name in builtin_names()})
draw(drawn, Path("map.svg"))  # of dspace.math.drawing
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy

from dspace.math.canonical import canonical_hash
from dspace.math.cost import K, V
from dspace.math.explain import as_dict
from dspace.math.ir import Analysis
from dspace.math.pipeline import analyse
from dspace.math.reductions import Answer, reduce

if TYPE_CHECKING:
    import networkx

    from dspace.spec import Spec

INVERSES = frozenset({"non_metaplastic"})
"""Transforms that undo another: pictures leave them out, since they go where an exact reduction goes."""

SAME = "the same recurrence"
"""Text of an edge along which nothing is substituted."""

COLOURS = {
    "a": "#4c78a8",
    "b": "#72b7b2",
    "fold": "#54a24b",
    "c": "#e45756",
    "d": "#f58518",
    "e": "#b279a2",
    "bp": "#9d755d",
    "f": "#eeca3b",
    "g": "#8c8c8c",
}
"""Colour of each class in pictures."""


@dataclass(frozen=True)
class Node:
    """A variant on the map."""

    name: str
    title: str
    letter: str
    state_bytes: str


@dataclass(frozen=True)
class Edge:
    """``source`` becomes ``target``: ``kind`` is "exact", "limit" or "fold" for a proven reduction, "transform" where a
    named transform of its spec makes it; ``proof`` is one a reader can follow."""

    source: str
    target: str
    kind: str
    text: str
    proof: tuple[str, ...]


@dataclass(frozen=True)
class Map:
    """All variants and all proven edges; pictures show those that do not follow from others."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    seconds: float

    def graph(self) -> networkx.MultiDiGraph:
        """Every edge, as a networkx graph with the fields of nodes and edges as attributes."""
        import networkx

        graph = networkx.MultiDiGraph()
        for n in self.nodes:
            graph.add_node(n.name, **asdict(n))
        for e in self.edges:
            graph.add_edge(e.source, e.target, key=e.kind, **asdict(e))
        return graph

    def families(self) -> tuple[tuple[str, ...], ...]:
        """Variants that become each other exactly, together."""
        import networkx

        exact = networkx.DiGraph()
        exact.add_nodes_from(n.name for n in self.nodes)
        exact.add_edges_from((e.source, e.target) for e in self.edges if e.kind == "exact")
        return tuple(sorted(tuple(sorted(c)) for c in networkx.strongly_connected_components(exact)))

    def skeleton(self) -> tuple[Edge, ...]:
        """The edges that do not follow from others: one for each pair of families, none that a path implies."""
        import networkx

        family = {name: f for f in self.families() for name in f}
        exact = networkx.DiGraph()
        exact.add_nodes_from(set(family.values()))
        between = {
            (family[e.source], family[e.target])
            for e in self.edges
            if e.kind == "exact" and family[e.source] != family[e.target]
        }
        exact.add_edges_from(between)
        needed = set(networkx.transitive_reduction(exact).edges)
        best: dict[tuple, Edge] = {}
        for e in self.edges:
            pair = (family[e.source], family[e.target])
            if e.kind == "exact" and pair in needed and (pair not in best or len(e.text) < len(best[pair].text)):
                best[pair] = e
        moves = [e for e in self.edges if e.kind == "transform" and e.text not in INVERSES]
        inner = self._inner(family)
        needed_kinds = [e for kind in ("limit", "fold") for e in self._beyond(kind, exact, family)]
        return (*best.values(), *inner, *needed_kinds, *moves)

    def _inner(self, family: Mapping[str, tuple[str, ...]]) -> list[Edge]:
        """Within a family, where each becomes each: both directions along a tree of the shortest substitutions."""
        import networkx

        within = {
            (e.source, e.target): e for e in self.edges if e.kind == "exact" and family[e.source] == family[e.target]
        }
        graph = networkx.Graph()
        for (source, target), e in within.items():
            back = within.get((target, source))
            if back is not None:
                graph.add_edge(source, target, weight=sum(len(x.text) for x in (e, back) if x.text != SAME))
        tree = networkx.minimum_spanning_tree(graph)
        joined = {pair for a, b in tree.edges for pair in ((a, b), (b, a))}
        # A family that holds together only by circles longer than a pair keeps all its edges.
        parts = {frozenset(c) for c in networkx.connected_components(tree)}
        return [e for pair, e in within.items() if pair in joined or frozenset(family[pair[0]]) not in parts]

    def _beyond(self, kind: str, exact: networkx.DiGraph, family: Mapping[str, tuple[str, ...]]) -> tuple[Edge, ...]:
        """Limits (or folds) whose end is not reached by another one of the same source and then exactly, nor from
        what the source becomes exactly."""
        import networkx

        after = {f: networkx.descendants(exact, f) for f in exact}
        before = {f: networkx.ancestors(exact, f) for f in exact}
        found: dict[tuple, Edge] = {}
        for e in self.edges:
            if e.kind == kind:
                pair = (family[e.source], family[e.target])
                if pair not in found or len(e.text) < len(found[pair].text):
                    found[pair] = e
        kept = []
        for (source, target), e in found.items():
            through_target = any(s == source and t != target and target in after[t] for s, t in found)
            through_source = any(
                t == target and s != source and s not in before[source] and s in after[source] for s, t in found
            )
            if not through_target and not through_source:
                kept.append(e)
        return tuple(kept)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "nodes": [asdict(n) for n in self.nodes],
            "edges": [asdict(e) for e in self.edges],
            "families": [list(f) for f in self.families()],
            "skeleton": [[e.source, e.target, e.kind] for e in self.skeleton()],
            "seconds": self.seconds,
        }

    def dot(self) -> str:
        """The skeleton in Graphviz's language: exact edges solid, limits dashed, folds bold, transforms dotted."""
        lines = ["digraph dspace {", "  rankdir=TB; node [shape=box, style=filled, fontname=Helvetica];"]
        for n in self.nodes:
            lines.append(f'  "{n.name}" [fillcolor="{COLOURS[n.letter]}", tooltip="{n.title}"];')
        for e in self.skeleton():
            style = {"exact": "solid", "limit": "dashed", "fold": "bold", "transform": "dotted"}[e.kind]
            lines.append(f'  "{e.source}" -> "{e.target}" [label="{e.text}", style={style}];')
        return "\n".join([*lines, "}"]) + "\n"

    def text(self) -> str:
        """The skeleton as lines, grouped by what they start from, and the families of one mathematics."""
        lines = []
        for name in sorted({e.source for e in self.skeleton()}):
            for e in sorted((e for e in self.skeleton() if e.source == name), key=lambda e: (e.kind, e.target)):
                arrow = {"exact": "→", "limit": "⇢", "fold": "↠", "transform": "⇒"}[e.kind]
                lines.append(f"{e.source} {arrow} {e.target}: {e.text}")
        alone = {n.name for n in self.nodes} - {x for e in self.edges for x in (e.source, e.target)}
        reductions = sum(e.kind != "transform" for e in self.edges)
        count = f"{reductions} proven reductions in all; the others follow from these (→ exact, ⇢ limit, ↠ fold)"
        lines += ["", count, "⇒ a transform of the spec on its left makes the variant on its right"]
        if any(e.kind == "fold" for e in self.skeleton()):
            lines.append("↠ becomes it once the small states of the variant on the right are carried beside")
        same = [f for f in self.families() if len(f) > 1]
        lines += [f"the same up to substitution: {', '.join(f)}" for f in same]
        if alone:
            lines.append(f"related to no other here: {', '.join(sorted(alone))}")
        return "\n".join(lines)


def build_map(analyses: Mapping[str, Analysis], *, limits: bool = True, specs: Mapping[str, Spec] | None = None) -> Map:
    """Try every ordered pair; keep what is proven. With ``specs``, by the same names, also every transform of each."""
    start = time.perf_counter()
    nodes = tuple(_node(name, a) for name, a in analyses.items())
    edges: list[Edge] = []
    for source, a in analyses.items():
        for target, b in analyses.items():
            if source != target:
                edges += _edges(source, a, target, b, limits)
    if specs is not None:
        edges += transform_edges(specs, analyses)
    return Map(nodes, tuple(edges), time.perf_counter() - start)


def extend_map(found: Map, analyses: Mapping[str, Analysis], name: str, new: Analysis) -> Map:
    """``found`` with one more variant, tried against every other in both directions; ``analyses`` are those of ``found``."""
    start = time.perf_counter()
    edges = list(found.edges)
    for other, analysis in analyses.items():
        edges += _edges(name, new, other, analysis, True) + _edges(other, analysis, name, new, True)
    return Map((*found.nodes, _node(name, new)), tuple(edges), found.seconds + time.perf_counter() - start)


def _node(name: str, analysis: Analysis) -> Node:
    return Node(name, analysis.source.title, analysis.classification.letter, str(analysis.cost["state_bytes"]))


def _edges(source: str, a: Analysis, target: str, b: Analysis, limits: bool) -> list[Edge]:
    return edges_of(source, target, reduce(a.recurrence, b.recurrence, limits=limits))


def edges_of(source: str, target: str, answer: Answer) -> list[Edge]:
    """The edges that an answer proves."""
    told = as_dict(answer)
    return [
        Edge(source, target, kind, told[kind]["text"], tuple(told[kind]["proof"]))
        for kind in ("exact", "limit", "fold")
        if told[kind] is not None
    ]


def builtin_map(store: Path) -> Map:
    """The map of all built-in variants with their transforms, from ``store`` if it holds it."""
    from dspace.spec import builtin_names, load

    specs = {name: load(name) for name in builtin_names()}
    hashes = {name: spec.hash for name, spec in specs.items()}
    return load_or_build(hashes, lambda: {n: analyse(s) for n, s in specs.items()}, store, specs)


def transform_edges(specs: Mapping[str, Spec], analyses: Mapping[str, Analysis]) -> list[Edge]:
    """Edges from a variant to the one that a transform of its spec makes: same canonical hash, hence mathematics."""
    from dspace.spec.transforms import TRANSFORMS, TransformError

    known: dict[str, list[str]] = {}
    for name, analysis in analyses.items():
        known.setdefault(canonical_hash(analysis.recurrence), []).append(name)
    edges = []
    for source, spec in specs.items():
        for transform, function in TRANSFORMS.items():
            try:
                made = function(spec)
            except TransformError:
                continue
            same = canonical_hash(analyse(made).recurrence)
            proof = (f"the transform {transform} of {source} has the normal form of canonical hash {same[:16]}",)
            edges += [Edge(source, t, "transform", transform, proof) for t in known.get(same, ()) if t != source]
    return edges


def load_or_build(
    hashes: Mapping[str, str],
    analyses: Callable[[], Mapping[str, Analysis]],
    store: Path,
    specs: Mapping[str, Spec] | None = None,
) -> Map:
    """The map from ``store`` if it holds one of the same variants, else built and stored there.

    ``hashes`` names what each variant is (the hash of its spec); ``analyses`` is called only to build.
    """
    key = hashlib.sha256(json.dumps([_version(), sorted(hashes.items())]).encode()).hexdigest()
    try:
        stored = json.loads(store.read_text())
        if stored["key"] == key:
            nodes = tuple(Node(**n) for n in stored["nodes"])
            edges = tuple(Edge(**{**e, "proof": tuple(e["proof"])}) for e in stored["edges"])
            return Map(nodes, edges, stored["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, unreadable or of another version: build it anew
    built = build_map(analyses(), specs=specs)
    text = json.dumps({"key": key, **built.as_dict()})
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text)
        partial.replace(store)
    except OSError:
        pass  # a map that cannot be stored is still a map
    return built


@functools.cache
def _version() -> str:
    """A hash of the text that decides what a map says: that of the language, the mathematics and the transforms."""
    package = Path(__file__).parent.parent
    total = hashlib.sha256()
    for name in ("spec", "math"):
        for path in sorted((package / name).rglob("*.py")):
            total.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def state_bytes_at(node: Node, k: int, v: int) -> int:
    """State bytes of a variant at ``K = k``, ``V = v``."""
    return int(sympy.sympify(node.state_bytes, locals={"K": K, "V": V}).subs({K: k, V: v}))

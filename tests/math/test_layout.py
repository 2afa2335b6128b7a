"""The picture of a map: nothing lies on anything else, kinds of edges look different, general stands above special."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from relations import ANALYSES

from dspace.errors import UserError
from dspace.math.drawing import LINES, draw, label_of, lay_out, name_of
from dspace.math.map import COLOURS, Edge, Map, build_map, extend_map
from dspace.spec import load


@pytest.fixture(scope="module")
def drawn(answers) -> Map:
    """The map of all built-in variants, from the answers that the other tests have searched."""
    from dspace.math.map import Node, edges_of, transform_edges

    edges = [e for (source, target), answer in answers.items() for e in edges_of(source, target, answer)]
    edges += transform_edges({n: load(n) for n in ANALYSES}, ANALYSES)
    nodes = tuple(Node(n, a.source.title, a.classification.letter, "1") for n, a in ANALYSES.items())
    return Map(nodes, tuple(edges), 0.0)


def test_nothing_lies_on_anything_else(drawn):
    layout = lay_out(drawn)
    boxes = [*layout.nodes.values(), *layout.labels]
    assert len(boxes) == len(drawn.nodes) + len(drawn.skeleton())
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a.overlap(b) < 1e-3, (a, b)


def test_curves_pass_by_variants_that_they_do_not_join(drawn):
    layout = lay_out(drawn)
    along = np.linspace(0.0, 1.0, 60)
    for curve in layout.curves:
        for name, box in layout.nodes.items():
            inside = box.holds(curve.at(along)).sum()
            assert inside == 0, (curve.edge.source, curve.edge.target, name)


def test_what_becomes_another_stands_above_it(drawn):
    layout = lay_out(drawn)
    family = {n: f for f in drawn.families() for n in f}
    for e in drawn.skeleton():
        if e.kind == "exact" and family[e.source] != family[e.target]:
            assert layout.nodes[e.source].y > layout.nodes[e.target].y
    for f in drawn.families():
        assert len({layout.nodes[n].y for n in f}) == 1


def test_the_picture_tells_classes_and_kinds_apart(drawn, tmp_path):
    draw(drawn, tmp_path / "map.svg")
    text = (tmp_path / "map.svg").read_text()
    ElementTree.fromstring(text)
    present = {n.letter for n in drawn.nodes}
    assert all(COLOURS[c] in text for c in present) and len(set(COLOURS.values())) == len(COLOURS)
    assert text.count("stroke-dasharray") >= sum(e.kind != "exact" for e in drawn.skeleton())
    assert all(colour in text for colour, _ in LINES.values())
    draw(drawn, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text, "the same map is the same file"
    with pytest.raises(UserError, match=r"\.svg, \.pdf or \.png"):
        draw(drawn, tmp_path / "map.jpg")


def test_labels_are_broken_between_equations_only():
    edge = Edge("a", "b", "exact", "w = g_h, q = q·exp(g_h), u = exp(-g_h)", ())
    assert label_of(edge) == "w = g_h,\nq = q·exp(g_h),\nu = exp(-g_h)"
    assert label_of(Edge("a", "b", "exact", "g = 0", ())) == "g = 0"
    assert name_of("normalized_linear_attention") == "normalized\nlinear\nattention"


def test_a_family_of_three_is_drawn_as_a_tree(drawn):
    """A variant that is another in other words joins its family by the shortest substitution alone."""
    few = {n: ANALYSES[n] for n in ("simple_gla", "mamba2", "linear_attention")}
    more = extend_map(build_map(few), few, "mine", ANALYSES["simple_gla"])
    assert ("mamba2", "mine", "simple_gla") in more.families()
    inner = [
        (e.source, e.target)
        for e in more.skeleton()
        if e.kind == "exact" and "linear_attention" not in (e.source, e.target)
    ]
    assert sorted(inner) == sorted({*inner, *((b, a) for a, b in inner)}) and len(inner) == 4
    assert ("mine", "simple_gla") in inner

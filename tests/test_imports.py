"""Arrows point down: no file of the library imports one that, over others, imports it."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx

ROOT = Path(__file__).parents[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, known: frozenset[str]) -> set[str]:
    """Modules of the library that a file names in imports, wherever they stand in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inside or {node.module}
    return found & known


def circles(files: dict[str, Path]) -> list[list[str]]:
    graph: networkx.DiGraph = networkx.DiGraph()
    for module, path in files.items():
        graph.add_edges_from((module, other) for other in imports(path, frozenset(files)))
    return sorted(sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1)


def test_no_imports_in_circles() -> None:
    # A package's own file only says where its names are at home: those who ask a package are not its parts.
    files = {module_of(p): p for p in (ROOT / "dspace").rglob("*.py") if p.name != "__init__.py"}
    assert len(files) > 100
    # A spec checks, locates and writes itself: its methods call on files that know what a spec is.
    spec = {m for m in files if m.startswith("dspace.spec.")}
    assert not [part for part in circles(files) if not spec.issuperset(part)]


def test_a_circle_is_seen(tmp_path: Path) -> None:
    for name, text in (
        ("a", "import b"),
        ("b", "def f():\n    from c import x"),
        ("c", "from a import y"),
        ("d", "import a"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    assert circles({p.stem: p for p in tmp_path.glob("*.py")}) == [["a", "b", "c"]]

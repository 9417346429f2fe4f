"""Draws the rooms of the package into ARCHITECTURE.md, from the imports of its files.

An arrow says "imports"; arrows that follow from others are left out. tests/test_tidy.py compares the picture
with the imports, and looks for circles between files with what is here.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- rooms: make docs -->\n", "<!-- end -->\n"
# What every room may import; without it the picture has a shape.
BASE = ("errors", "system", "files", "findings", "children", "privacy")

Graph = Mapping[str, frozenset[str]]


def module_name(path: Path, base: Path) -> str:
    """The dotted name of a source below `base`."""
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(folder: str) -> dict[str, Path]:
    """Every module of a package, `folder` being its path from the root, by dotted name."""
    base = (ROOT / folder).parent
    return {module_name(path, base): path for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def imports(folder: str) -> Graph:
    """Which modules of a package import which others of it; also where only a type checker does."""
    known = modules(folder)
    return {name: frozenset(_imported(path, known)) - {name} for name, path in known.items()}


def _imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def rooms() -> Graph:
    """Which rooms import which others."""
    found: dict[str, set[str]] = {}
    for name, others in imports("src/cordee").items():
        room = room_of(name)
        found.setdefault(room, set()).update(room_of(other) for other in others)
    return {room: frozenset(others - {room, ""}) for room, others in found.items() if room}


def room_of(module: str) -> str:
    """The room of a module of the package; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes each of which reaches all others of its set, and itself by a way round."""
    reached = {node: reachable(graph, node) for node in graph}
    found = {
        tuple(sorted(other for other in reached[node] if node in reached[other])): None
        for node in graph
        if node in reached[node]
    }
    return [list(circle) for circle in found]


def reachable(graph: Graph, start: str) -> set[str]:
    """All nodes that arrows lead to from this one."""
    found: set[str] = set()
    pending = list(graph[start])
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(graph.get(node, ()))
    return found


def reduced(graph: Graph) -> dict[str, list[str]]:
    """A graph without circles less the arrows that follow from others."""
    return {
        node: sorted(
            target for target in targets if not any(target in reachable(graph, via) for via in targets)
        )
        for node, targets in graph.items()
    }


def picture() -> str:
    """The picture as a Mermaid diagram in Markdown."""
    graph = {room: others - set(BASE) for room, others in rooms().items() if room not in BASE}
    lines = [f"    {room} --> {other}" for room, others in sorted(reduced(graph).items()) for other in others]
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```\n"


def drawn(document: str) -> str:
    """The document with its picture made anew."""
    head, rest = document.split(BEGIN)
    tail = rest.split(END, 1)[1]
    return head + BEGIN + picture() + END + tail


if __name__ == "__main__":
    TARGET.write_text(drawn(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(Path.cwd())}", file=sys.stderr)

"""Who imports whom in the package: `python tests/support/import_graph.py [REPOSITORY]` counts and lists the arrows."""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "convert_w4a8"


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return for each module of the package below `root` the modules of it that it imports, anywhere in its code.

    Names are relative to the package. Imports for type checkers alone count too: who reads a module needs them. The
    modules that `devices` loads by name, the kernels, count as imported by it.
    """
    files = dict(_modules(root / PACKAGE))
    graph = {name: {found for found in _imports(path, files) if found != name} for name, path in files.items()}
    if "devices" in graph:
        graph["devices"] |= {name for name in files if name.startswith("kernels.")}
    return graph


def _modules(package: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(_files(package)):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or PACKAGE, path


def _files(directory: Path) -> Iterator[Path]:
    """Yield Python files, also behind the link `kernels`, which pathlib does not follow before Python 3.13."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.suffix == ".py":
            yield path


def _imports(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == PACKAGE:
            module = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                yield name if name in files else module or PACKAGE


def rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the same for rooms: folders, and the modules that lie beside them."""
    found: dict[str, set[str]] = {}
    for name, targets in graph.items():
        room = name.partition(".")[0]
        found.setdefault(room, set()).update(other for target in targets if (other := target.partition(".")[0]) != room)
    return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Return the modules that a module imports, and those that they import, and so on."""
    seen, waiting = set[str](), [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting.extend(new)
    return seen


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the names that import themselves by way of others."""
    return sorted(name for name in graph if name in reachable(graph, name))


def main() -> None:
    """Print the counts, and the arrows between rooms."""
    graph = import_graph(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
    between = rooms(graph)
    folders = {name.partition(".")[0] for name in graph if "." in name}
    arrows, room_arrows = (sum(map(len, g.values())) for g in (graph, between))
    print(f"{len(graph)} modules, {arrows} arrows between modules")  # noqa: T201 - its result
    print(f"{len(folders)} folders, {len(between)} rooms, {room_arrows} arrows between rooms")  # noqa: T201
    print(f"in a circle: {circles(graph) or 'no module'}; {circles(between) or 'no room'}")  # noqa: T201
    for room, targets in sorted(between.items()):
        print(f"  {room:14} → {', '.join(sorted(targets)) or '-'}")  # noqa: T201


if __name__ == "__main__":
    main()

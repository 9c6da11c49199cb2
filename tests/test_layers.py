"""Who may import whom: docs/design.md, "The house", enforced on the syntax trees.

The lists below go from the lowest floor to the highest. A module may import from its own floor and
from those below it; one that stands on no list is held only to the floor of its package, and to the
ban on cycles.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "pynbd": "errors | protocol block tls | server client | cli",
    "pynbd.block": "extent syscalls | bitmap engine | node | file | raw | qcow2 | chain",
    "pynbd.block.qcow2": "format widths report | header entries compression | cache compressed"
    " | commit places | l2_tables recorded | refcounts preallocation | mapping | links"
    " | cow zeroing | create snapshots bitmaps | references | check mending | rebuild"
    " | repair | writer | image",
}
STRANGERS = [{"protocol", "block", "tls"}, {"server", "client"}]
FORBIDDEN = {
    "protocol": {"asyncio", "socket", "ssl", "os", "threading"},
    "block": {"socket", "ssl"},
}
DISK = {"pynbd.block.engine", "pynbd.block.syscalls"}
DISK_CALLS = "pread preadv pwrite pwritev read write readv writev lseek fsync fdatasync ftruncate"
DISK_CALLS += " posix_fallocate copy_file_range sendfile"
WALL = 700  # lines


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text()) for path in ROOT.glob("pynbd/**/*.py")}
every_module = pytest.mark.parametrize("name", sorted(TREES))


def imports(name: str) -> Iterator[str]:
    """The full names of what a module imports: a module where that is one, else where it lies."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write the whole name"
            for inner in (f"{node.module}.{alias.name}" for alias in node.names):
                yield inner if inner in TREES else str(node.module)


def part(package: str, name: str) -> str | None:
    """The part of a package that a module belongs to: block, for pynbd.block.raw in pynbd."""
    return (
        name.removeprefix(f"{package}.").split(".")[0] if name.startswith(f"{package}.") else None
    )


@every_module
def test_imports_go_down(name: str) -> None:
    for package, drawing in FLOORS.items():
        floor = {who: level for level, row in enumerate(drawing.split("|")) for who in row.split()}
        here = part(package, name)
        for imported in imports(name):
            there = part(package, imported)
            if here in floor and there in floor and here != there:
                assert floor[here] >= floor[there], f"{name} imports {imported}, a floor above it"
                if package == "pynbd":
                    assert not any({here, there} <= pair for pair in STRANGERS), (
                        f"{name} imports {imported}: {here} and {there} never meet"
                    )


@every_module
def test_outside_world(name: str) -> None:
    """Sockets, disk calls, argv and the environment are each touched where they belong."""
    here = part("pynbd", name)
    outside = {imported.split(".")[0] for imported in imports(name)}
    assert not outside & FORBIDDEN.get(str(here), set())
    touched = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    if here == "block" and name not in DISK:
        assert not touched & {f"os.{call}" for call in DISK_CALLS.split()}
    assert name in DISK or "pynbd.block.syscalls" not in imports(name)
    if here not in ("cli", "__main__"):
        assert not touched & {"sys.argv", "os.environ", "os.getenv"}


@every_module
def test_form(name: str) -> None:
    lines = max((node.end_lineno or 0 for node in TREES[name].body), default=0)
    assert lines <= WALL, f"{name} has {lines} lines"
    for function in ast.walk(TREES[name]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                assert not isinstance(node, ast.Import | ast.ImportFrom), (
                    f"{name}:{node.lineno}: an import inside a function"
                )


def test_no_cycles() -> None:
    graph = {name: {i for i in imports(name) if i in TREES and i != name} for name in TREES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle

"""Rooms and the arrows between them: the map in CONTRIBUTING.md is the tree, and every import points up in it.

A room is a package or a module directly in ``loretta``. Imports inside functions, and those for the type checker
alone, are arrows like any other.
"""

import ast
import pathlib
import re
from functools import cache
from graphlib import TopologicalSorter
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "src" / "loretta"
PACKAGE = "loretta"  # the room of __init__.py, which gives the names of all others to the outside


class Import(NamedTuple):
    """``importer`` and ``imported`` are full names of modules."""

    importer: str
    imported: str
    line: int


def modules_in(source: pathlib.Path) -> dict[str, pathlib.Path]:
    """Full name of each module below a package's folder -> its file."""
    names = {}
    for file in sorted(source.rglob("*.py")):
        path = file.relative_to(source.parent).with_suffix("").parts
        names[".".join(path[:-1] if path[-1] == "__init__" else path)] = file
    return names


@cache
def imports_in(source: pathlib.Path) -> list[Import]:
    """All imports of one module of the package by another; of itself and other packages none.

    ``from loretta.tt import plan_shape`` is an import of ``loretta.tt``, and ``from loretta import tt`` too.
    """
    modules = modules_in(source)
    found = []
    for importer, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} absolute imports only"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [name if name in modules else str(node.module) for name in names]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            ours = [name for name in imported if name.split(".")[0] == source.name and name != importer]
            assert set(ours) <= modules.keys(), f"{file}:{node.lineno} imports what is not there"
            found += [Import(importer, name, node.lineno) for name in ours]
    return found


def room_of(module: str) -> str:
    return ".".join(module.split(".")[1:2]) or PACKAGE


def arrows_in(source: pathlib.Path) -> set[tuple[str, str]]:
    """(room, room that it imports from), each pair once."""
    pairs = {(room_of(found.importer), room_of(found.imported)) for found in imports_in(source)}
    return {(here, there) for here, there in pairs if here != there}


def rooms_on_the_map() -> list[str]:
    """The rooms in the table of CONTRIBUTING.md, from the ground up: names in backticks in the first column."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    return [name.removesuffix("/").removesuffix(".py") for row in rows for name in re.findall(r"`(.+?)`", row)]


def test_the_map_shows_every_room_once():
    assert sorted(rooms_on_the_map()) == sorted({room_of(module) for module in modules_in(SOURCE)})


@pytest.mark.parametrize("room", rooms_on_the_map())
def test_imports_point_up_in_the_map(room):
    order = {name: k for k, name in enumerate(rooms_on_the_map())}
    back = [
        f"{found.importer}:{found.line} imports {found.imported}"
        for found in imports_in(SOURCE)
        if room_of(found.importer) == room and order[room_of(found.imported)] > order[room]
    ]
    assert not back


def test_no_circle_of_modules():
    """Within a room as between rooms; graphlib raises CycleError, which names the circle."""
    graph = TopologicalSorter(dict.fromkeys(modules_in(SOURCE), ()))
    for found in imports_in(SOURCE):
        graph.add(found.importer, found.imported)
    graph.prepare()


def test_a_back_arrow_and_a_circle_are_seen(tmp_path):
    """The reading of imports itself, on a package with one of each kind that Python has."""
    package = tmp_path / "house"
    for folder in (package / "attic", package / "cellar"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from house.attic import roof")
    (package / "attic" / "roof.py").write_text("import os, house.cellar.floor\nfrom house import cellar")
    (package / "cellar" / "floor.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.attic.roof import tile\n"
        "def f():\n    from house.attic import roof\n    from house.cellar import __name__\n    import house"
    )
    assert imports_in(package) == [
        ("house", "house.attic.roof", 1),
        ("house.attic.roof", "house.cellar.floor", 1),
        ("house.attic.roof", "house.cellar", 2),
        ("house.cellar.floor", "house.attic.roof", 3),
        ("house.cellar.floor", "house.attic.roof", 5),
        ("house.cellar.floor", "house.cellar", 6),
        ("house.cellar.floor", "house", 7),
    ]
    back_and_forth = {("cellar", "attic"), ("attic", "cellar"), ("cellar", PACKAGE), (PACKAGE, "attic")}
    assert arrows_in(package) == back_and_forth


def files_of_python() -> list[pathlib.Path]:
    return [file for folder in ("src", "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]


def test_no_file_is_longer_than_one_reads_at_once():
    assert not [file for file in files_of_python() if len(file.read_text(encoding="utf-8").splitlines()) > 400]


def test_tests_import_what_they_share_from_modules_that_are_no_tests():
    for file in (ROOT / "tests").rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if re.match(r"\s*(from|import) (\w+\.)?test_", line)], file

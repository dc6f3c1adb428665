"""Imports point down, one file prints, and what is cheap stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "regraft"
LEVELS = (
    {"errors", "progress"},
    {"card"},
    {"preprocessing"},
    {"zoo"},
    {"anatomy", "data"},
    {"freezing"},
    {"surgery"},
    {"checkpoint"},
    {"frontier"},
    {"training"},
    {"insight", "report"},
    {"cli"},
)
BESIDE = {("report", "insight")}  # a page shows what an experiment found; the experiment knows of no page
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """List the rooms of regraft that a file imports from, in functions and under TYPE_CHECKING as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" if node.module == "regraft" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((name.split(".")[1], node.lineno) for name in names if name and name.startswith("regraft."))


def test_every_file_has_a_place_in_the_list() -> None:
    assert {room_of(file) for file in FILES} - set(ROOMS) == {"__init__", "__main__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    if room in ("__init__", "__main__"):
        return
    for imported, line in imports(file):
        if imported == room or (room, imported) in BESIDE:
            continue
        allowed = imported == "__version__" if room == "cli" and imported not in ROOMS else imported in ROOMS
        assert allowed, f"{file}:{line} imports regraft.{imported}, which has no place in the list"
        assert ROOMS.get(imported, -1) < ROOMS[room], f"{file}:{line}: {room} imports {imported}, which is not below it"


def calls(file: Path, name: str) -> list[int]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return [n.lineno for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_only_the_output_file_prints(file: Path) -> None:
    where = str(file.relative_to(SOURCE))
    assert bool(calls(file, "print")) == (where == "cli/output.py")
    streams = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    if where not in ("cli/output.py", "cli/predict.py", "cli/app.py"):
        assert not streams & {"stdout", "stderr"}


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.name == "__init__.py"], ids=lambda file: file.parent.name
)
def test_package_files_only_re_export(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        assigns_all = isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]
        assert file.parent == SOURCE or isinstance(node, ast.ImportFrom) or assigns_all, f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_global_is_set(file: Path) -> None:
    setters = {"set_num_threads", "set_default_dtype", "set_default_device", "use_deterministic_algorithms"}
    text = file.read_text()
    found = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)} & setters
    assert not found or (found == {"set_num_threads"} and "finally:" in text)


@pytest.mark.parametrize("module", ["regraft", "regraft.cli.app", "regraft.errors"])
def test_importing_is_cheap(module: str) -> None:
    code = f"import {module}, sys; print(' '.join({{'torch', 'timm', 'sklearn', 'matplotlib'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == []

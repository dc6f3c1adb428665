"""Imports point down, one file prints, and tests are found by the name of what they hold."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import regraft

SOURCE = Path(__file__).parents[1] / "src" / "regraft"
LEVELS = (
    {"display", "errors", "progress", "torch_internals", "version", "wording"},
    {"arguments", "console", "fields", "train_options"},
    {"card"},
    {"downloads", "preprocessing"},
    {"zoo"},
    {"anatomy", "data"},
    {"freezing"},
    {"surgery"},
    {"checkpoint"},
    {"frontier"},
    {"training"},
    {"advice"},
    {"trials"},
    {"photo_checks"},
    {"report"},
    {"demo"},
    {"cli"},
)
MAX_FILES = 16  # in a folder, so that it can be taken in at a glance
MAX_LINES = 400
FILES = sorted(SOURCE.rglob("*.py"))
OF_MODULES = {name for name in dir(nn.Module()) if name.startswith("_") and not name.startswith("__")}
TESTS = [file for file in sorted(Path(__file__).parent.rglob("*.py")) if "earlier/v0_1" not in str(file)]
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


def test_layering_has_a_place_for_every_file() -> None:
    assert {room_of(file) for file in FILES} - set(ROOMS) == {"__init__", "__main__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_layering_imports_point_down(file: Path) -> None:
    room = room_of(file)
    if room in ("__init__", "__main__"):
        return
    for imported, line in imports(file):
        if imported == room:
            continue
        assert imported in ROOMS, f"{file}:{line} imports regraft.{imported}, which has no place in the list"
        assert ROOMS.get(imported, -1) < ROOMS[room], f"{file}:{line}: {room} imports {imported}, which is not below it"


def module_name(file: Path) -> str:
    return ".".join(("regraft", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(file: Path) -> set[str]:
    """Return the modules of regraft whose code a file needs; `__init__` files stand for what they re-export."""
    files = {module_name(file): file for file in FILES}
    needed: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names} & set(files)
        if isinstance(node, ast.ImportFrom) and node.module in files:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            needed |= names & set(files) or {node.module}
    return needed


def test_layering_has_no_circle_of_modules() -> None:
    edges = {module_name(file): imported_modules(file) for file in FILES if file != SOURCE / "__init__.py"}
    while leaves := {name for name, needed in edges.items() if not needed & set(edges)}:
        edges = {name: needed for name, needed in edges.items() if name not in leaves}
    assert edges == {}


def test_layering_lets_no_module_import_the_package_itself() -> None:
    above = SOURCE / "__main__.py"
    assert [file for file in FILES if "regraft" in imported_modules(file) and file != above] == []


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=lambda f: str(f.relative_to(SOURCE)))
def test_layering_folders_can_be_taken_in_at_a_glance(folder: Path) -> None:
    files = sorted(folder.glob("*.py"))
    assert len(files) <= MAX_FILES
    assert [file.name for file in files if len(file.read_text().splitlines()) > MAX_LINES] == []


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.name == "__init__.py"], ids=lambda file: str(file.parent.name)
)
def test_layering_lets_no_function_hide_the_module_of_its_name(file: Path) -> None:
    """`import regraft.freezing.freeze as module` would give the function."""
    names = {
        a.asname or a.name
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    inside = {path.stem for path in file.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names & inside == set()


def test_layering_has_no_two_public_classes_of_one_name() -> None:
    places: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module_name(file))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def calls(file: Path, name: str) -> list[int]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return [n.lineno for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_layering_lets_only_the_output_file_print(file: Path) -> None:
    where = str(file.relative_to(SOURCE))
    assert bool(calls(file, "print")) == (where == "cli/output.py")
    streams = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    if where not in ("cli/output.py", "cli/predict.py", "cli/app.py"):
        assert not streams & {"stdout", "stderr"}


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.name == "__init__.py"], ids=lambda file: file.parent.name
)
def test_layering_package_files_only_re_export(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        assigns_all = isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]
        assert file.parent == SOURCE or isinstance(node, ast.ImportFrom) or assigns_all, f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_layering_sets_nothing_global(file: Path) -> None:
    setters = {"set_num_threads", "set_default_dtype", "set_default_device", "use_deterministic_algorithms"}
    text = file.read_text()
    found = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)} & setters
    assert not found or (found == {"set_num_threads"} and "finally:" in text)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(file: Path) -> Iterator[str]:
    """List the private names in a file that no class or function of it defines: those of torch and of Python."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))} | {"_fields"}
    own |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    own -= OF_MODULES
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
        yield from (f"line {node.lineno}: {name}" for name in names if is_private(name) and name not in own)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_layering_has_one_file_for_private_names_of_torch(file: Path) -> None:
    if file != SOURCE / "torch_internals.py":
        assert list(private_uses(file)) == []


def test_layering_tests_the_oldest_versions_that_are_promised() -> None:
    root = SOURCE.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "constraints-oldest.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        matched = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", text)
        assert matched, text
        name, bound = matched.groups()
        assert f"{versions[name]}.".startswith(f"{bound}."), f"{name} {versions[name]} is not the oldest of {text}"


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize(
    "file",
    [file for file in TESTS if file.name.startswith("test_")],
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_layering_names_tests_after_what_they_hold(file: Path) -> None:
    """A name begins with something public or imported of regraft, with `cli`, or with the subject of its file."""
    tree = ast.parse(file.read_text())
    subjects = {"cli", file.stem.removeprefix("test_"), *regraft.__all__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regraft"):
            subjects |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "regraft":
            subjects.add(node.attr)
    begins = re.compile(f"test_({'|'.join(snake_case(subject) for subject in subjects)})(_|$)")
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [name for name in names if not begins.match(name) or len(name) > 90] == []
    assert len(names) == len(set(names))  # of two tests of one name, only the second would run


def test_layering_lets_no_test_file_import_another_and_none_be_long() -> None:
    for file in TESTS:
        text = file.read_text()
        assert len(text.splitlines()) <= MAX_LINES, file
        assert not re.search(r"^\s*(from|import) (\w+\.)*test_", text, re.MULTILINE), file

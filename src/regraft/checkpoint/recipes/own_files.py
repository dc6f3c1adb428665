"""The files with a user's own classes that a recipe names: how they are written, and where they are searched for.

A recipe in memory names a class as `FILE.py:Class` or `package.module:Class`, as Python imported it. A checkpoint is
copied to other folders and machines, and may be published. So a file is written relative to the folder of the
checkpoint where it lies in that folder or both lie in the working directory. Otherwise its whole path is written, as
without it the file would not be found in the next process; with `~` for the user's folder, so that it shows no name of
a user. A module that is a file of its own, as beside a script, is written as that file. Packages and installed modules
keep their names.
"""

import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.card import Recipe
from regraft.errors import EditError, ModelError
from regraft.surgery.layer_text.parse import LayerCall, parsed, written
from regraft.surgery.layer_text.read_back import OWN
from regraft.zoo import PYTHON

SUFFIX = ".py"


def portable_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe as it is written into a checkpoint in `folder`."""
    return _with_references(recipe, lambda where: _portable(where, folder))


def located_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe of a checkpoint in `folder` with the files that it names as absolute paths.

    Raises:
        ModelError: A file is missing; the message lists where it was searched for.
    """
    return _with_references(recipe, lambda where: _located(where, folder))


def _portable(where: str, folder: Path) -> str:
    if not where.endswith(SUFFIX):
        file = _file_of_module(where)
        if file is None:
            return where
    else:
        file = Path(where)
    file, folder, here = file.resolve(), folder.resolve(), Path.cwd().resolve()
    is_shared = file.is_relative_to(folder) or (file.is_relative_to(here) and folder.is_relative_to(here))
    try:
        return Path(os.path.relpath(file, folder)).as_posix() if is_shared else _without_home(file)
    except ValueError:  # another drive of Windows
        return _without_home(file)


def _without_home(file: Path) -> str:
    home = Path.home().resolve()
    return f"~/{file.relative_to(home).as_posix()}" if file.is_relative_to(home) else file.as_posix()


def _file_of_module(name: str) -> Path | None:
    """Return the file of a module that is no part of a package and not installed; None for any other."""
    module = sys.modules.get(name)
    file, specification = getattr(module, "__file__", None), getattr(module, "__spec__", None)
    if file is None or not file.endswith(SUFFIX) or "." in getattr(specification, "name", name):
        return None
    return None if hasattr(module, "__path__") or _is_installed(Path(file)) else Path(file)


def _is_installed(path: Path) -> bool:
    path = path.resolve()
    is_library = bool({"site-packages", "dist-packages"} & set(path.parts)) or path.suffix == ".zip"
    return is_library or path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())


def _located(where: str, folder: Path) -> str:
    if not where.endswith(SUFFIX):
        return where
    name = PurePosixPath(where.replace("\\", "/")).name
    stated = Path(where).expanduser()
    # A copy beside the checkpoint has moved with it, so it comes before the file at its old place.
    places = [folder / name, stated] if stated.is_absolute() else [folder / where, folder / name, Path(where)]
    places.append(Path(name))
    # Where this process has imported a file of this name, or would, as beside the running script; but no library.
    imported = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    elsewhere = [Path(file) for file in imported if isinstance(file, str) and Path(file).name == name]
    places += [path for path in (*elsewhere, *(Path(entry, name) for entry in sys.path)) if not _is_installed(path)]
    file = next((place for place in places if place.is_file()), None)
    if file is not None:
        return str(file.resolve())
    searched = ", ".join(f"'{place}'" for place in dict.fromkeys(place.absolute() for place in places))
    raise ModelError(
        f"no file '{where}' with the class of the network; searched: {searched}. Put it beside the checkpoint."
    )


def _with_references(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """Return a recipe with another place of each class of the user's own: of its source, and in the text of layers."""
    source = recipe.source
    name = source.name
    if name.startswith(PYTHON):
        where, _, attribute = name.removeprefix(PYTHON).rpartition(":")
        name = f"{PYTHON}{change(where)}:{attribute}"
    changed = {
        "name": name,
        "layers": _changed(source.layers, change),
        "parts": tuple(_with_references(part, change) for part in source.parts),
        "arguments": _changed(source.arguments, change),
    }
    steps = tuple(step.model_copy(update={"arguments": _changed(step.arguments, change)}) for step in recipe.steps)
    return recipe.model_copy(update={"source": source.model_copy(update=changed), "steps": steps})


def _changed(data: Any, change: Callable[[str], str]) -> Any:
    """Return JSON data with other places of classes in the texts in it that describe layers."""
    if isinstance(data, dict):
        return {key: _changed(value, change) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(_changed(value, change) for value in data)
    if not isinstance(data, str) or f"{OWN}(" not in data:
        return data
    try:
        value = parsed(data)
    except EditError:  # no text of layers
        return data
    calls = value if isinstance(value, tuple) else (value,)
    return ", ".join(written(_changed_call(call, change)) for call in calls)


def _changed_call(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _changed_call(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_changed_call(item, change) for item in value)
    if not isinstance(value, LayerCall):
        return value
    positional = value.positional
    if value.name == OWN and positional and isinstance(positional[0], str):
        where, _, attribute = positional[0].rpartition(":")
        positional = (f"{change(where)}:{attribute}", *positional[1:])
    keywords = _changed_call(value.keywords, change)
    return LayerCall(value.name, tuple(_changed_call(item, change) for item in positional), keywords)

"""Read the weights in a file of any supported kind, without running code from it."""

import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from regraft.checkpoint.file.format import is_safetensors, read_index
from regraft.checkpoint.file.layout import damaged_error
from regraft.checkpoint.file.shards import weight_map_in
from regraft.checkpoint.foreign.kinds import (
    describe_folder,
    first_line,
    is_npz,
    require_weights,
    unreadable_error,
    zip_names,
)
from regraft.checkpoint.foreign.limits import check_container
from regraft.checkpoint.foreign.objects import read_beside_objects
from regraft.checkpoint.foreign.pickle_check import EXPECTED_TORCH, no_pickle_error, to_plain_data
from regraft.checkpoint.foreign.restricted_unpickler import read_pickled, read_torchscript
from regraft.checkpoint.foreign.state_dicts import StateDict, StateDicts, Tensors, listed, split_extra, state_dicts_of
from regraft.errors import CheckpointError

FOREIGN_NAME = re.compile(r"(?:GLOBAL|function|class|type) <?([\w.]+)")  # in errors of torch's weights-only unpickler
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # as Hugging Face names them
INDEXED = "weights"  # what an index of other tools is of, in messages

Kind = Literal["index", "safetensors", "torchscript", "npz", "torch"]


def weights_file(path: Path) -> Path:
    """Return the file that holds the weights: `path` itself, or in a folder the file with Hugging Face's name.

    Raises:
        CheckpointError: There is no such file.
    """
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a folder, and {describe_folder(path)}")
    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}). Give the path of a file with weights.")
    return path


def read_foreign(path: Path, *, tensors_only: bool = False) -> StateDicts:
    """Read every state dict of a file of other tools, on the CPU.

    Args:
        path: A file, or an index of Hugging Face, as `weights_file` returns it.
        tensors_only: Whether to extract the tensors from a file that holds more, such as a whole pickled module,
            without running its code: see `restricted_unpickler`.

    Raises:
        CheckpointError: The file is damaged, or cannot be read without running code.
    """
    kind = kind_of(path)
    if kind == "torch":
        require_weights(path)
    if kind == "index":
        return _read_shards(path)
    check_container(path)
    if kind == "safetensors":
        tensors, extra = split_extra(_read_safetensors(path))
        return StateDicts(path, (StateDict((), tensors, is_ordered=False, extra=extra),))
    if kind == "npz":
        tensors, skipped = _read_arrays(path)
        return StateDicts(path, (StateDict((), tensors),), left_out=skipped)
    if kind == "torchscript":
        entry = StateDict((), read_torchscript(path))
        if not entry.tensors:
            raise CheckpointError(f"'{path}' is a TorchScript archive without parameters or buffers.")
        return StateDicts(path, (entry,), notes=("read from a TorchScript archive; its code was not run",))
    if tensors_only:
        notes = ("its tensors were taken out; no code of it was run",)
        return replace(state_dicts_of(read_pickled(path), path), notes=notes)
    return state_dicts_of(_read_torch(path), path)


def only_state_dict(contents: StateDicts) -> StateDict:
    """Return the one state dict of a file.

    Raises:
        CheckpointError: It holds several networks.
    """
    choices = contents.choices()
    if len(choices) > 1:
        raise CheckpointError(f"'{contents.path}' holds several state dicts: {listed(choices)}. Expected one.")
    return choices[0]


def kind_of(path: Path) -> Kind:
    """Return how a file is read: by its name for an index, by its content otherwise."""
    if path.name.endswith(".index.json"):
        return "index"
    if is_safetensors(path):
        return "safetensors"
    names = zip_names(path)
    if names is None:
        return "torch"  # where it is damaged, its reader raises the error with the reason
    if is_npz(names):
        return "npz"
    is_script = any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)
    return "torchscript" if is_script else "torch"


def unwrapping(entry: StateDict) -> list[str]:
    """Describe from which entries of a file a state dict was taken."""
    if entry.parts:
        return [f"put together from the entries {', '.join(map(repr, entry.parts))}"]
    return [f"taken from the entry '{key}'" for key in entry.path]


def _read_torch(path: Path) -> Any:
    """Read a file of torch.save with torch's weights-only unpickler; with the inert one if it names other classes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of the file's format
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not isinstance(error, pickle.UnpicklingError):
            raise unreadable_error(path, first_line(error), EXPECTED_TORCH) from error
        if not FOREIGN_NAME.search(str(error)):
            raise no_pickle_error(path) from error
        content = read_beside_objects(path)
    return to_plain_data(path, content, path.stat().st_size)


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged_error(path, str(error)) from error


def _read_arrays(path: Path) -> tuple[Tensors, tuple[str, ...]]:
    """Read an npz archive.

    Returns:
        The tensors by name, and the names of arrays without a dtype in torch (text, records), which are left out.
    """
    import numpy as np

    tensors: Tensors = {}
    skipped: list[str] = []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if array.dtype.kind not in "fiubc" or array.dtype.itemsize > 16:
                    skipped.append(name)
                    continue
                tensors[name] = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except Exception as error:
        advice = "Expected an npz archive with arrays of numbers alone."
        raise unreadable_error(path, first_line(error), advice) from error
    if not tensors:
        raise CheckpointError(f"'{path}' holds no array of numbers. Expected names with arrays.")
    return tensors, tuple(skipped)


def _read_shards(path: Path) -> StateDicts:
    """Read the files beside an index of Hugging Face that it names.

    Raises:
        CheckpointError: The index is malformed, names other than files beside it, or does not match their tensors.
    """
    weight_map = weight_map_in(path, read_index(path, of=INDEXED), suffix="", of=INDEXED)
    tensors: Tensors = {}
    files = dict.fromkeys(weight_map.values())
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"'{path}' names the part '{file.name}', which is not beside it. Get the whole set.")
        if kind_of(file) == "index":
            raise CheckpointError(
                f"'{path}' names '{file.name}', which is an index as well. Expected files with tensors."
            )
        held = only_state_dict(read_foreign(file)).tensors
        names = [name for name, where in weight_map.items() if where == file]
        if absent := [name for name in names if name not in held]:
            raise CheckpointError(
                f"'{path}' says that '{file.name}' holds '{absent[0]}', which it lacks. Get it again."
            )
        tensors |= {name: held[name] for name in names}
    ordered = {name: tensors[name] for name in weight_map}
    notes = (f"read from {len(files)} files that the index names",)
    return StateDicts(path, (StateDict((), ordered, is_ordered=False),), notes=notes)

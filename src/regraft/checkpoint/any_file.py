"""Read the weights of any file: a checkpoint of regraft with its bases, or a file of other tools."""

from pathlib import Path

from regraft.checkpoint.delta import MissingBaseError, merge_advice, resolve
from regraft.checkpoint.file.format import is_own, read_index
from regraft.checkpoint.file.opening import OpenCheckpoint
from regraft.checkpoint.foreign.reading import INDEXED, kind_of, only_state_dict, read_foreign, unwrapping, weights_file
from regraft.checkpoint.foreign.state_dicts import StateDict, StateDicts, Tensors, split_extra
from regraft.errors import CheckpointError


def read_tensors(path: Path) -> tuple[Tensors, list[str]]:
    """Read the tensors of a file by name, on the CPU, and notes about what was unwrapped.

    Raises:
        CheckpointError: The file does not exist, cannot be read without running code, or holds several networks.
    """
    contents = read_state_dicts(path)
    entry = only_state_dict(contents)
    return entry.tensors, [*contents.notes, *unwrapping(entry)]


def read_state_dicts(path: Path, *, tensors_only: bool = False) -> StateDicts:
    """Read every state dict in a file, on the CPU.

    Args:
        path: A file, or a folder with the weights of a Hugging Face model.
        tensors_only: Whether to extract the tensors from a file that holds more, such as a whole pickled module,
            without running its code: see `foreign.restricted_unpickler`.

    Raises:
        CheckpointError: The file does not exist, is damaged, or cannot be read without running code.
    """
    path = weights_file(path)
    kind = kind_of(path)
    if kind == "safetensors" or (kind == "index" and is_own(read_index(path, of=INDEXED).get("metadata"))):
        with OpenCheckpoint(path) as checkpoint:
            if checkpoint.header is not None:
                return _read_own(checkpoint)
    return read_foreign(path, tensors_only=tensors_only)


def _read_own(checkpoint: OpenCheckpoint) -> StateDicts:
    """Read a checkpoint of regraft with all of its bases."""
    try:
        whole = resolve(checkpoint).expanded()
    except MissingBaseError as error:
        raise CheckpointError(f"{error.problem} {merge_advice(checkpoint.path)}") from error
    tensors, extra = split_extra(whole)
    return StateDicts(checkpoint.path, (StateDict((), tensors, is_ordered=False, extra=extra),))

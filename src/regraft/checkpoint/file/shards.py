"""A checkpoint in several files: an index that names, for each tensor, the file beside it that holds it."""

import contextlib
import errno
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.file.atomic import atomic_write
from regraft.checkpoint.file.format import (
    INDEX_ADVICE,
    INDEX_SUFFIX,
    KEY,
    SUFFIX,
    Header,
    index_of,
    is_plain_name,
    read_header,
)
from regraft.checkpoint.file.layout import read_start
from regraft.checkpoint.storable import require_storable
from regraft.errors import CheckpointError, RunError

SHARD_OF = "regraft-shard-of"  # metadata key of a shard; its value is the name of the index

Tensors = Mapping[str, torch.Tensor]


def weight_map_in(
    index: Path, content: Mapping[str, Any], *, suffix: str = SUFFIX, of: str = "a checkpoint"
) -> dict[str, Path]:
    """Return name of a tensor → file that holds it, by the JSON object in an index.

    Args:
        index: The index.
        content: What `read_index` returned for it.
        suffix: End of the names of its files; empty for any.
        of: What it should be an index of, for the error.

    Raises:
        CheckpointError: The index is malformed, or names other than files beside it, links included.
    """
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        problem = "it has no weight_map, or its weight_map is empty or no object"
        raise CheckpointError(f"'{index}' is no index of {of}: {problem}. {INDEX_ADVICE}")
    files: dict[str, Path] = {}
    for name in names.values():
        if not isinstance(name, str) or (name not in files and not _lies_beside(index, name, suffix)):
            raise CheckpointError(
                f"'{index}' is no index of {of}: it has no weight_map to follow, as it names {str(name)[:200]!r}, "
                f"which is no plain file name, or a link to another folder; expected the plain name of a "
                f"{suffix or 'weights'} file beside it. Nothing was read. {INDEX_ADVICE}"
            )
        files[name] = index.parent / name
    return {tensor: files[name] for tensor, name in names.items()}


def _lies_beside(index: Path, name: str, suffix: str) -> bool:
    """Return whether a name is that of a file in the folder of an index, after links are resolved.

    The folder of the link and the folder of its target both count, as caches link index and files into one folder.
    """
    if not is_plain_name(name) or not name.endswith(suffix):
        return False
    try:
        return index.with_name(name).resolve().parent in (index.parent.resolve(), index.resolve().parent)
    except ValueError:  # text in JSON that no file system can encode
        return False


def shard_of(path: Path) -> str | None:
    """Return the name of the index in a shard's metadata; None for any other file."""
    metadata = read_start(path)[0].get("__metadata__")
    name = metadata.get(SHARD_OF) if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else None


def write_checkpoint(target: Path, tensors: Tensors, header: Header, shard_bytes: int) -> Path:
    """Write tensors and header as one file, or as several with an index if all tensors exceed `shard_bytes`.

    A reader finds the old checkpoint or the complete new one: the file, or the index, is renamed into place last.

    Returns:
        The file, or the index.

    Raises:
        CheckpointError: The header is too long.
        RunError: A file cannot be written; no new file is left, and the old checkpoint is unchanged.
    """
    document = header.document()
    name = target.name.removesuffix(INDEX_SUFFIX)
    index = index_of(target)
    stale, is_ours = _shards_beside(index), _is_ours(index)
    if sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes:
        target = target if name == target.name else target.with_name(name + SUFFIX)
        write_tensors(target, tensors, {KEY: document})
        _remove([*stale, *([index] if is_ours else [])])
        return target
    groups = list(_split(tensors, shard_bytes))
    files = _free_names(index, len(groups), header.digest())
    weight_map = {tensor: file.name for file, group in zip(files, groups, strict=True) for tensor in group}
    size = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size, KEY: document}, "weight_map": weight_map}
    try:
        for file, group in zip(files, groups, strict=True):
            write_tensors(file, group, {"format": "pt", SHARD_OF: index.name})
        write_whole(index, lambda temporary: temporary.write_text(json.dumps(content, indent=1), encoding="utf-8"))
    except BaseException:
        _remove(files)
        raise
    _remove([*stale, *([target] if target != index else [])])
    return index


def write_tensors(target: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically.

    Raises:
        CheckpointError: A tensor has a dtype that safetensors cannot hold. Nothing was written.
        RunError: The file cannot be written.
    """
    import safetensors.torch

    require_storable(tensors)
    write_whole(target, lambda temporary: safetensors.torch.save_file(dict(tensors), temporary, metadata))


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it.

    Raises:
        RunError: It cannot be written; nothing of it is left, and a previous file is unchanged.
    """
    try:
        with atomic_write(target) as temporary:
            write(temporary)
    except Exception as error:
        raise RunError(f"cannot write '{target}': {error}. Nothing of it was kept{_advice(error)}.") from error


def _advice(error: Exception) -> str:
    """Return what to do about a failed write; safetensors reports a full disk only in the text of its error."""
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower():
        return "; free some space and retry"
    return "; check that its folder exists and can be written to, and that the disk has space, then retry"


def _split(tensors: Tensors, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Distribute tensors over shards in their order; a tensor larger than a shard gets one of its own."""
    # Not by huggingface_hub's split_torch_state_dict_into_shards: there, such a tensor goes before those that precede
    # it, and alone it gets neither a number nor an index, although all tensors together exceed `shard_bytes`.
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > shard_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def _free_names(index: Path, count: int, digest: str) -> list[Path]:
    """Return unused paths for shards, so that a previous checkpoint stays complete until the index is replaced."""
    stem = index.name.removesuffix(INDEX_SUFFIX)
    for attempt in itertools.count():
        infix = "" if attempt == 0 else f"-{digest[:8]}" if attempt == 1 else f"-{digest[:8]}-{attempt}"
        names = [f"{stem}{infix}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]
        files = [index.with_name(name) for name in names]
        if not any(file.exists() or file.is_symlink() for file in files):
            return files
    raise AssertionError


def _shards_beside(index: Path) -> list[Path]:
    """List the shards of `index`, including those that an interrupted save has left."""
    stem = re.escape(index.name.removesuffix(INDEX_SUFFIX))
    pattern = re.compile(rf"{stem}(-[0-9a-f]{{8}}(-\d+)?)?-\d{{5}}-of-\d{{5}}{re.escape(SUFFIX)}")
    shards = []
    for file in sorted(index.parent.glob(f"*{SUFFIX}")):
        with contextlib.suppress(CheckpointError, OSError):
            if pattern.fullmatch(file.name) and shard_of(file) == index.name:
                shards.append(file)
    return shards


def _is_ours(index: Path) -> bool:
    """Return whether regraft wrote an index; a missing or malformed one counts as foreign, and is not removed."""
    with contextlib.suppress(CheckpointError, OSError):
        return read_header(index) is not None
    return False


def _remove(files: list[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # the next save removes what is left
            file.unlink(missing_ok=True)

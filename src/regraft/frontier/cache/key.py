"""Keys of cached values: a digest of everything that a value depends on."""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from regraft.checkpoint.file.digest import tensor_digest
from regraft.data.sources import ShardMember, Source
from regraft.frontier.replay import Recording
from regraft.surgery.rewired import EditedModule

MAX_WAITING = 4096  # files that are submitted to the threads at once; each costs a kilobyte until it is done
VERSION = 2  # of the computation and the stored format, notes included


def features_key(
    prefix_digest: str,
    files: Sequence[Source],
    *,
    digests_of: Callable[[Sequence[Source]], list[str]] | None = None,
    **circumstances: Any,
) -> str:
    """Return the key of the outputs of a constant part for these files.

    Args:
        prefix_digest: `network_digest` of the constant part.
        files: The photos, in order; only their contents enter the key, not their names. Of photos in shards,
            what tells a change of the shard (path, size, times) and the place in it: no shard is read for its key.
        digests_of: Returns the digests of their contents, where several processes divide the reading.
        **circumstances: Further JSON data that the values depend on, such as the preprocessing.
    """
    content = {
        "version": VERSION,
        "prefix": prefix_digest,
        "files": (digests_of or file_digests)(files),
        "circumstances": circumstances,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def network_digest(network: nn.Module) -> str:
    """Return a digest of a network's structure, code, parameters and buffers."""
    digest = hashlib.sha256(repr(network).encode())
    kinds = {type(layer) for layer in network.modules() if not isinstance(layer, (EditedModule, Recording))}
    if isinstance(network, Recording):
        kinds.add(network.kind)
    for source in sorted(map(_source, kinds)):
        digest.update(source.encode())
    if isinstance(network, EditedModule):
        for program in network.programs:
            digest.update(program.code.encode())
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor_digest(tensor.detach().cpu())}\n".encode())
    return digest.hexdigest()


def checksum(network: nn.Module) -> int:
    """Return the sum of the bits of all parameters and buffers: a cheap way to notice that one was changed."""
    return sum_of_bits((*network.parameters(), *network.buffers()))


def sum_of_bits(tensors: Iterable[torch.Tensor]) -> int:
    """Return the sum of the bits of all values in some tensors."""
    sums = [_sum_of_bits(tensor.detach()) for tensor in tensors]
    return int(torch.stack(sums).sum()) if sums else 0


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    words = torch.int32 if tensor.dtype.itemsize == 4 else torch.uint8
    return tensor.reshape(-1).view(words).sum(dtype=torch.int64)


def file_digests(files: Sequence[Source]) -> list[str]:
    """Return a digest of the content of each file, in order; empty for a file that cannot be read."""
    digests: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), MAX_WAITING):
            digests += pool.map(_file_digest, files[start : start + MAX_WAITING])
    return digests


def _file_digest(file: Source) -> str:
    try:
        if isinstance(file, ShardMember):
            return hashlib.sha256(file.version().encode()).hexdigest()
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    except OSError:
        return ""


@functools.lru_cache(maxsize=1000)
def _source(kind: type[nn.Module]) -> str:
    """Return the source of a class, or torch's version for its own classes, or the class name without a source."""
    if kind.__module__.startswith("torch."):
        return str(torch.__version__)
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__

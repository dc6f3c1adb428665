"""Read the tensors of a checkpoint into memory of their own, and verify each while reading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch

from regraft.checkpoint.file.digest import balanced, bytes_of, side_by_side, started_digest
from regraft.checkpoint.file.format import digest_of
from regraft.checkpoint.file.layout import TensorEntry
from regraft.checkpoint.file.opening import OpenCheckpoint
from regraft.checkpoint.file.positioned import read_at
from regraft.errors import CheckpointError

CHUNK_BYTES = 1 << 20  # fits into a core's cache, from which it is hashed

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint, each once.

    Attributes:
        tensors: Tensors by name, in memory that is not shared.
        digests: Digest of each tensor by name, computed from the bytes in memory.
        shared: Alias → name, for tied tensors.
    """

    tensors: Tensors
    digests: dict[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Return one SHA-256 over the names and digests of all tensors."""
        return digest_of(self.digests)

    def expanded(self) -> Tensors:
        """Return the tensors under all names, aliases included."""
        return {**self.tensors, **{alias: self.tensors[name] for alias, name in self.shared.items()}}

    def all_digests(self) -> dict[str, str]:
        """Return the digests under all names, aliases included."""
        return {**self.digests, **{alias: self.digests[name] for alias, name in self.shared.items()}}


@dataclass(frozen=True)
class _Piece:
    """A tensor in a file, and the memory to read it into."""

    name: str
    file: Path
    entry: TensorEntry
    target: torch.Tensor


def read_contents(checkpoint: OpenCheckpoint) -> Contents:
    """Read the tensors of one checkpoint, from one file or several; of a delta, only those that it holds itself.

    Each tensor is read into its own memory and hashed at the same time, in several threads.

    Args:
        checkpoint: An open checkpoint; without a header, no digest is verified.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor has another digest than when it was saved.
    """
    path, header, entries = checkpoint.path, checkpoint.header, checkpoint.entries
    expected = header.digests if header else {}
    shared = header.shared if header else {}
    for alias, name in shared.items():
        if alias in entries or (name not in entries and header and header.base is None):
            raise CheckpointError(f"'{path}' is damaged: it says that '{alias}' is '{name}'. Get or make it again.")
    absent = next((name for name in expected if name not in entries), None)
    surplus = next((name for name in entries if header and name not in expected), None)
    if absent is not None or surplus is not None:
        problem = f"it lacks '{absent}'" if absent is not None else f"it has no digest of '{surplus}'"
        raise CheckpointError(f"'{path}' is damaged: {problem}. Get or make it again.")
    try:
        pieces = [
            _Piece(name, file, entry, torch.empty(entry.shape, dtype=entry.dtype))
            for name, (file, entry) in entries.items()
        ]
    except (RuntimeError, OverflowError) as error:  # a sparse file may declare more than there is memory
        size = sum(entry.size for _, entry in entries.values())
        raise CheckpointError(
            f"'{path}' declares {size:,} bytes of tensors, for which there is no memory. Check where it comes from."
        ) from error
    digests = _read_all(checkpoint, pieces)
    for name, digest in expected.items():
        if digests[name] != digest:
            raise CheckpointError(f"'{path}' is damaged: '{name}' is not what was saved. Get or make it again.")
    tensors = {piece.name: piece.target for piece in pieces}
    return Contents(tensors, {name: digests[name] for name in tensors}, shared)


def _read_all(checkpoint: OpenCheckpoint, pieces: Sequence[_Piece]) -> dict[str, str]:
    """Read all pieces into their memory, and return their digests by name."""
    try:
        files = {piece.file: checkpoint.file(piece.file) for piece in pieces}
        groups = balanced(pieces, lambda piece: piece.entry.size)
        results = side_by_side(lambda group: [(piece.name, _read(piece, files[piece.file])) for piece in group], groups)
    except OSError as error:
        raise CheckpointError(f"'{checkpoint.path}' cannot be read: {error}. Try again, or get it again.") from error
    return dict(entry for group in results for entry in group)


def _read(piece: _Piece, file: FileIO) -> str:
    # Not memory-mapped: if another process truncates a mapped file, reading it kills this one. Bytes are copied anyway.
    digest = started_digest(piece.entry.dtype, piece.entry.shape)
    memory = bytes_of(piece.target)
    done = 0
    while done < len(memory):
        chunk = memory[done : done + CHUNK_BYTES]
        count = read_at(file, chunk, piece.entry.start + done)
        if count == 0:
            raise CheckpointError(f"'{piece.file}' is damaged: it was cut off while it was read. Get it again.")
        digest.update(chunk[:count])
        done += count
    return digest.hexdigest()

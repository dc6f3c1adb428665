"""Tensors on disk under a digest of everything that they depend on.

An entry is a folder with one raw file for each tensor and `entry.json`, which holds shapes, dtypes and a checksum for
each chunk of rows. Several processes write an entry together, each a shard of the rows in files of its own, and one of
them the index; any number of processes reads it. It is written under a temporary name and renamed when it is complete,
so an interrupted write is never taken for an entry. A damaged entry is detected by its checksums and deleted.
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch

from regraft.errors import ConfigError
from regraft.frontier.cache.rows import DiskTensor, Rows, ShardedTensor

ENTRY = "entry.json"
LIMIT_GIB = 20  # for all entries together, unless REGRAFT_CACHE_GIB says another number
CHUNK_BYTES = 16 * 2**20  # small writes are joined into chunks of this size; each has one checksum
STALE_S = 24 * 3600  # age after which an unfinished write counts as crashed


@dataclass(frozen=True)
class CacheEntry:
    """Complete tensors on disk.

    Attributes:
        folder: Folder of the entry.
        shapes: Of each tensor, rows first.
        dtypes: Of each tensor.
        note: JSON data that was written beside them.
        shards: For each shard its number and its rows of each tensor; empty where one process wrote all.
    """

    folder: Path
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    note: dict[str, Any]
    shards: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def tensors(self, *, in_memory: bool) -> tuple[Rows, ...]:
        """Return the tensors, read into memory or left on the disk."""
        loaded: list[Rows] = []
        for position, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            parts = [(f".{number}", counts[position]) for number, counts in self.shards] or [("", shape[0])]
            files = [(self.folder / f"{position}{suffix}.bin", (count, *shape[1:])) for suffix, count in parts]
            if in_memory:
                tensors = [torch.from_numpy(np.fromfile(file, dtype=np.uint8)) for file, _ in files]
                loaded.append((tensors[0] if len(tensors) == 1 else torch.cat(tensors)).view(dtype).view(shape))
            else:
                on_disk = [DiskTensor(file, part, dtype) for file, part in files]
                loaded.append(on_disk[0] if len(on_disk) == 1 else ShardedTensor(on_disk))
        return tuple(loaded)


@dataclass(frozen=True)
class EntryInfo:
    """Facts about an entry, from its note and files: key, bytes, time of last use, and a description."""

    key: str
    bytes: int
    used_at: datetime
    holds: str


class Store:
    """A folder of entries; the least recently used are deleted when it grows too large."""

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = folder or default_folder()
        self.limit_bytes = limit_bytes if limit_bytes is not None else default_limit_bytes()

    def find(self, key: str) -> CacheEntry | None:
        """Return the entry of a key after checking all of its checksums; a damaged one is deleted."""
        folder = self.folder / _checked_key(key)
        try:
            text = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
            entry = _entry_of(folder, text)
            for shard in text.get("shards", [text]):
                suffix = f".{int(shard['number'])}" if "number" in shard else ""
                for position, expected in enumerate(shard["checksums"]):
                    if _checksums(folder / f"{position}{suffix}.bin", shard["stretches"][position]) != expected:
                        raise ValueError("damaged")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            _delete(folder)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / ENTRY)  # mark it as just used
        return entry

    def write(self, key: str) -> "EntryWriter":
        """Begin an entry.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        return EntryWriter(self, key, self.begin(key))

    def begin(self, key: str) -> Path:
        """Make the folder of an entry that is being written.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        folder = self.folder / f"{_checked_key(key)}.{os.getpid()}.{time.monotonic_ns()}.tmp"
        folder.mkdir(parents=True)
        return folder

    def complete(self, key: str, folder: Path, shards: Sequence[dict[str, Any]], note: dict[str, Any]) -> CacheEntry:
        """Write the index of an entry whose shards are complete, as `EntryWriter.close` describes them.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        kinds = shards[0]
        counts = [sum(shard["shapes"][position][0] for shard in shards) for position in range(len(kinds["shapes"]))]
        shapes = [[count, *shape[1:]] for count, shape in zip(counts, kinds["shapes"], strict=True)]
        text = {"shapes": shapes, "dtypes": kinds["dtypes"], "shards": list(shards), "note": note}
        return _publish(folder, self.folder / key, text)

    def entries(self) -> list[EntryInfo]:
        """List the entries, the least recently used first."""
        infos = []
        for file in self.folder.glob(f"*/{ENTRY}"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                size = sum(part.stat().st_size for part in file.parent.iterdir())
                used_at = datetime.fromtimestamp(file.stat().st_mtime)
                note = json.loads(file.read_text(encoding="utf-8")).get("note", {})
                infos.append(EntryInfo(file.parent.name, size, used_at, str(note.get("holds", ""))))
        return sorted(infos, key=lambda entry: entry.used_at)

    def has_entries(self) -> bool:
        """Return whether there is any entry."""
        return next(self.folder.glob(f"*/{ENTRY}"), None) is not None

    def clear(self) -> int:
        """Delete all entries and unfinished writes, and return how many bytes were freed.

        Raises:
            OSError: Something cannot be deleted.
        """
        size = 0
        for child in self.folder.iterdir() if self.folder.is_dir() else ():
            is_folder = child.is_dir() and not child.is_symlink()
            if is_folder and (child.suffix == ".tmp" or (child / ENTRY).exists()):  # and nothing else in the folder
                size += sum(part.stat().st_size for part in child.iterdir())
                shutil.rmtree(child)
        return size

    def make_room(self, size: int) -> None:
        """Delete the least recently used entries until `size` more bytes fit under the limit."""
        for unfinished in self.folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - unfinished.stat().st_mtime > STALE_S:
                    shutil.rmtree(unfinished, ignore_errors=True)
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total + size <= self.limit_bytes:
                return
            _delete(self.folder / entry.key)
            total -= entry.bytes

    def has_room(self, size: int) -> bool:
        """Return whether `size` bytes fit on the disk and under the limit."""
        folder = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        try:
            return size < self.limit_bytes and size < 0.9 * shutil.disk_usage(folder).free
        except OSError:
            return False


class EntryWriter:
    """An entry that is being written, a few rows at a time."""

    def __init__(self, store: Store, key: str, folder: Path, shard: int | None = None) -> None:
        self._store, self._key, self._folder, self._shard = store, key, folder, shard
        self._files: list[Any] = []
        self._shapes: list[list[int]] = []
        self._dtypes: list[str] = []
        self._checksums: list[list[int]] = []
        self._chunks: list[list[int]] = []

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write more rows of each tensor.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        for position, tensor in enumerate(tensors):
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if position == len(self._files):
                self._files.append((self._folder / self._name(position)).open("wb"))
                self._shapes.append([0, *tensor.shape[1:]])
                self._dtypes.append(str(tensor.dtype).removeprefix("torch."))
                self._checksums.append([])
                self._chunks.append([])
            self._files[position].write(data)
            self._shapes[position][0] += len(tensor)
            if self._chunks[position] and self._chunks[position][-1] + len(data) <= CHUNK_BYTES:
                self._checksums[position][-1] = zlib.crc32(data, self._checksums[position][-1])
                self._chunks[position][-1] += len(data)
            else:
                self._checksums[position].append(zlib.crc32(data))
                self._chunks[position].append(len(data))

    def finish(self, note: dict[str, Any]) -> CacheEntry:
        """Complete the entry, with JSON data beside it; one that another process wrote meanwhile is kept instead.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        entry = _publish(self._folder, self._store.folder / self._key, {**self.close(), "note": note})
        self.abandon()  # what is left of the folder, where another process was earlier
        return entry

    def close(self) -> dict[str, Any]:
        """Complete the files, and return what the index holds of them.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        for file in self._files:
            file.close()
        shard = {} if self._shard is None else {"number": self._shard}
        contents = {"dtypes": self._dtypes, "checksums": self._checksums, "stretches": self._chunks}
        return {**shard, "shapes": self._shapes, **contents}

    def _name(self, position: int) -> str:
        return f"{position}.bin" if self._shard is None else f"{position}.{self._shard}.bin"

    def abandon(self) -> None:
        """Delete what was written."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def default_folder() -> Path:
    """Return the cache folder: `REGRAFT_CACHE`, or `regraft` in the user's cache directory."""
    return Path(os.environ.get("REGRAFT_CACHE") or platformdirs.user_cache_path("regraft", appauthor=False))


def default_limit_bytes() -> int:
    """Return the bytes that all entries may take together.

    Raises:
        ConfigError: `REGRAFT_CACHE_GIB` is not a number of GiB.
    """
    text = os.environ.get("REGRAFT_CACHE_GIB") or str(LIMIT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise ConfigError(f"REGRAFT_CACHE_GIB is '{text}', expected the GiB that the cache may take, as 200.")
    return round(gib * 2**30)


def _delete(folder: Path) -> None:
    """Delete an entry as a whole or not at all: Windows neither deletes files in use nor renames their folder."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_suffix(".deleted.tmp")), ignore_errors=True)


def _checked_key(key: str) -> str:
    """Return a key that is a plain name, which cannot lead out of the folder."""
    if re.fullmatch(r"[\w-]+", key) is None:
        raise ValueError(f"an entry is called by a plain name, not {key!r}")
    return key


def _publish(folder: Path, target: Path, text: dict[str, Any]) -> CacheEntry:
    """Write the index into a folder, and rename it; an entry that another process wrote meanwhile is kept instead."""
    (folder / ENTRY).write_text(json.dumps(text), encoding="utf-8")
    try:
        folder.rename(target)
    except OSError:
        if not (target / ENTRY).exists():
            raise
        text = json.loads((target / ENTRY).read_text(encoding="utf-8"))
    return _entry_of(target, text)


def _entry_of(folder: Path, text: dict[str, Any]) -> CacheEntry:
    """Return the entry that an index describes; raise a ValueError where its parts contradict each other."""
    shapes = tuple(tuple(shape) for shape in text["shapes"])
    dtypes = tuple(getattr(torch, name) for name in text["dtypes"])
    shards = text.get("shards", [text])
    are_counts = all(type(side) is int and side >= 0 for shape in shapes for side in shape)
    are_dtypes = all(isinstance(dtype, torch.dtype) for dtype in dtypes)
    if not are_counts or not are_dtypes or not isinstance(text["note"], dict) or not shards:
        raise ValueError("damaged")
    for shard in shards:
        sizes = [sum(chunks) for chunks in shard["stretches"]]
        parts = [[shape[0], *whole[1:]] for shape, whole in zip(shard["shapes"], shapes, strict=True)]
        expected = [math.prod(part) * dtype.itemsize for part, dtype in zip(parts, dtypes, strict=True)]
        if sizes != expected or len(shard["checksums"]) != len(sizes):
            raise ValueError("damaged")
    counts = [[shape[0] for shape in shard["shapes"]] for shard in shards]
    if [sum(column) for column in zip(*counts, strict=True)] != [shape[0] for shape in shapes]:
        raise ValueError("damaged")
    numbers = (
        tuple((int(shard["number"]), tuple(rows)) for shard, rows in zip(shards, counts, strict=True))
        if "shards" in text
        else ()
    )
    return CacheEntry(folder, shapes, dtypes, text["note"], numbers)


def _checksums(file: Path, chunks: Sequence[int]) -> list[int]:
    with file.open("rb") as opened:
        checksums = [zlib.crc32(opened.read(length)) for length in chunks]
        if opened.read(1):
            raise ValueError("longer than it was")
    return checksums

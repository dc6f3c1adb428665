"""Tensors kept on disk under the digest of what they depend on.

An entry is a folder with one raw file for each tensor and `entry.json`, which holds shapes, types and a checksum for
each stretch of rows. It is written under another name and renamed when it is complete, so that an interrupted write is
never taken for an entry; a damaged one is noticed by its checksums and deleted.
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.errors import RunError

ENTRY = "entry.json"
LIMIT_BYTES = 20 * 2**30  # of all entries together
STRETCH_BYTES = 16 * 2**20  # that one checksum covers, at least
STALE_S = 24 * 3600  # age at which an unfinished write is somebody's crash
ANEW = "Start the run again: what it kept is checked, and computed anew where it is damaged."


class DiskTensor:
    """Rows of a tensor in a file, read as they are asked for.

    Read and not mapped: the pages of a mapping count as memory of the process, and a file that is cut off under one
    kills it.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._file, self._number = file, os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._number)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Read rows by their numbers (N,), or a stretch of them; what comes back is a copy.

        Raises:
            RunError: The file cannot be read, or was cut off.
        """
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            found = torch.empty(max(0, last - first), self._row_bytes, dtype=torch.uint8)
            self._read(found.numpy().reshape(-1), first)
        else:
            found = torch.empty(len(rows), self._row_bytes, dtype=torch.uint8)
            for row, number in zip(found.numpy(), rows.tolist(), strict=True):
                self._read(row, number)
        return found.view(self.dtype).view(len(found), *self.shape[1:])

    def _read(self, into: np.ndarray, row: int) -> None:
        rest, place = into.data, row * self._row_bytes
        while rest:
            try:
                count = os.preadv(self._number, [rest], place)
            except OSError as error:
                raise RunError(f"'{self._file}' cannot be read: {error}. {ANEW}") from error
            if count == 0:
                raise RunError(f"'{self._file}' was cut off while it was in use. {ANEW}")
            rest, place = rest[count:], place + count


Rows = torch.Tensor | DiskTensor


@dataclass(frozen=True)
class Entry:
    """Complete tensors on disk.

    Attributes:
        folder: Where they are.
        shapes: Of each tensor, rows first.
        dtypes: Of each tensor.
        note: What was written beside them.
    """

    folder: Path
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    note: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def tensors(self, *, in_memory: bool) -> tuple[Rows, ...]:
        """Return the tensors, read as a whole or left on the disk."""
        found: list[Rows] = []
        for position, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            file = self.folder / f"{position}.bin"
            if in_memory:
                found.append(torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype).view(shape))
            else:
                found.append(DiskTensor(file, shape, dtype))
        return tuple(found)


@dataclass(frozen=True)
class EntryInfo:
    """What is known of an entry without reading it: its name, bytes, time of last use, and what it holds in words."""

    key: str
    bytes: int
    used_at: datetime
    holds: str


class Store:
    """A folder of entries, of which the least recently used are deleted when it grows too large."""

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder or default_folder()
        self.limit_bytes = limit_bytes

    def find(self, key: str) -> Entry | None:
        """Return the entry of that name, checked byte by byte; a damaged one is deleted."""
        folder = self.folder / _plain(key)
        try:
            text = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
            shapes = tuple(tuple(shape) for shape in text["shapes"])
            dtypes = tuple(getattr(torch, name) for name in text["dtypes"])
            _require_agreement(shapes, dtypes, text)
            entry = Entry(folder, shapes, dtypes, text["note"])
            for position, expected in enumerate(text["checksums"]):
                if _checksums(folder / f"{position}.bin", text["stretches"][position]) != expected:
                    raise ValueError("damaged")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / ENTRY)  # used now
        return entry

    def write(self, key: str) -> "EntryWriter":
        """Begin an entry.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        return EntryWriter(self, _plain(key))

    def entries(self) -> list[EntryInfo]:
        """List what is kept, the least recently used first."""
        found = []
        for file in self.folder.glob(f"*/{ENTRY}"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                size = sum(part.stat().st_size for part in file.parent.iterdir())
                used_at = datetime.fromtimestamp(file.stat().st_mtime)
                note = json.loads(file.read_text(encoding="utf-8")).get("note", {})
                found.append(EntryInfo(file.parent.name, size, used_at, str(note.get("holds", ""))))
        return sorted(found, key=lambda entry: entry.used_at)

    def clear(self) -> int:
        """Delete all entries and unfinished writes, and return how many bytes that were.

        Raises:
            OSError: Something cannot be deleted.
        """
        size = 0
        for child in self.folder.iterdir() if self.folder.is_dir() else ():
            is_folder = child.is_dir() and not child.is_symlink()
            if is_folder and (child.suffix == ".tmp" or (child / ENTRY).exists()):  # and nothing of anybody else's
                size += sum(part.stat().st_size for part in child.iterdir())
                shutil.rmtree(child)
        return size

    def make_room(self, size: int) -> None:
        """Delete the least recently used entries, until `size` more bytes stay under the limit."""
        for unfinished in self.folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - unfinished.stat().st_mtime > STALE_S:
                    shutil.rmtree(unfinished, ignore_errors=True)
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total + size <= self.limit_bytes:
                return
            shutil.rmtree(self.folder / entry.key, ignore_errors=True)
            total -= entry.bytes

    def has_room(self, size: int) -> bool:
        """Return whether that many bytes fit on the disk and under the limit."""
        folder = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        try:
            return size < self.limit_bytes and size < 0.9 * shutil.disk_usage(folder).free
        except OSError:
            return False


class EntryWriter:
    """An entry that is being written, stretch by stretch of rows."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._folder = store.folder / f"{key}.{os.getpid()}.{time.monotonic_ns()}.tmp"
        self._folder.mkdir(parents=True)
        self._files: list[Any] = []
        self._shapes: list[list[int]] = []
        self._dtypes: list[str] = []
        self._checksums: list[list[int]] = []
        self._stretches: list[list[int]] = []

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write more rows of each tensor.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        for position, tensor in enumerate(tensors):
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if position == len(self._files):
                self._files.append((self._folder / f"{position}.bin").open("wb"))
                self._shapes.append([0, *tensor.shape[1:]])
                self._dtypes.append(str(tensor.dtype).removeprefix("torch."))
                self._checksums.append([])
                self._stretches.append([])
            self._files[position].write(data)
            self._shapes[position][0] += len(tensor)
            if self._stretches[position] and self._stretches[position][-1] + len(data) <= STRETCH_BYTES:
                self._checksums[position][-1] = zlib.crc32(data, self._checksums[position][-1])
                self._stretches[position][-1] += len(data)
            else:
                self._checksums[position].append(zlib.crc32(data))
                self._stretches[position].append(len(data))

    def finish(self, note: dict[str, Any]) -> Entry:
        """Complete the entry, with JSON data beside it; where another process wrote the same meanwhile, either will do.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        for file in self._files:
            file.close()
        entry = {
            "shapes": self._shapes,
            "dtypes": self._dtypes,
            "checksums": self._checksums,
            "stretches": self._stretches,
            "note": note,
        }
        (self._folder / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
        target = self._store.folder / self._key
        try:
            self._folder.rename(target)
        except OSError:
            if not (target / ENTRY).exists():
                raise
            self.abandon()
        shapes = tuple(tuple(shape) for shape in self._shapes)
        return Entry(target, shapes, tuple(getattr(torch, name) for name in self._dtypes), entry["note"])

    def abandon(self) -> None:
        """Delete what was written."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def default_folder() -> Path:
    """Return the folder of the user's cache: `REGRAFT_CACHE`, or `regraft` in the system's place for caches."""
    own = os.environ.get("REGRAFT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "regraft"


def _plain(key: str) -> str:
    """Return a key, which is a digest and never leads out of the folder."""
    if re.fullmatch(r"[\w-]+", key) is None:
        raise ValueError(f"an entry is called by a plain name, not {key!r}")
    return key


def _require_agreement(shapes: Sequence[Sequence[Any]], dtypes: Sequence[Any], text: dict[str, Any]) -> None:
    """Raise a ValueError where an entry does not say the same of its tensors everywhere."""
    sizes = [sum(stretches) for stretches in text["stretches"]]
    are_counts = all(type(side) is int and side >= 0 for shape in shapes for side in shape)
    are_dtypes = all(isinstance(dtype, torch.dtype) for dtype in dtypes)
    if not are_counts or not are_dtypes or not isinstance(text["note"], dict) or len(text["checksums"]) != len(sizes):
        raise ValueError("damaged")
    if sizes != [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]:
        raise ValueError("damaged")


def _checksums(file: Path, stretches: Sequence[int]) -> list[int]:
    with file.open("rb") as opened:
        found = [zlib.crc32(opened.read(length)) for length in stretches]
        if opened.read(1):
            raise ValueError("longer than it was")
    return found

"""Members of tar archives: where each one lies, and its bytes.

The headers are parsed here, as `tarfile` takes six times as long for each of them, and there are two or four for a
photo. What is read: the ustar layout, long names and sizes of GNU tar, and extended headers of pax, which webdataset
writes before every member. Compressed archives have no places that one could go to, and are refused where they are
listed.

Source: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from regraft.data.sources import ShardMember, version_of
from regraft.errors import DataError

BLOCK = 512
FILES = (b"0", b"\0", b"7")
SPARSE = b"S"
MAX_NAME_BYTES = 2**20  # of a long name or an extended header, which is read into memory
END = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class TarMember(ShardMember):
    """A file in a tar archive; `offset` is the place of its first byte."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    @property
    def short_name(self) -> str:
        """The names of the archive and of the member."""
        return f"{self.shard.name}/{self.name}"

    def count_bytes(self) -> int:
        """Return the size of the member."""
        return self.size

    def read(self) -> bytes:
        """Return the content of the member."""
        content = read_at(self.shard, self.offset, self.size)
        if len(content) < self.size:
            raise DataError("the shard was cut off after it was listed")
        return content

    def version(self) -> str:
        """Return that of the archive, and the place in it."""
        return f"{version_of(self.shard)} {self.offset} {self.size}"


class Entry(NamedTuple):
    """A file in an archive: its name, the place of its first byte, and its size."""

    name: str
    offset: int
    size: int


def list_members(shard: Path, file: BinaryIO) -> Iterator[Entry]:
    """List the files in a tar archive, in order; the caller may move the position of `file` meanwhile.

    Raises:
        DataError: It is no tar archive, is damaged, or ends early.
    """
    end, place, count = os.fstat(file.fileno()).st_size, 0, 0
    name: str | None = None
    size: int | None = None
    while True:
        if place + BLOCK > end:
            raise DataError(
                f"the shard '{shard}' ends early, after {count} whole files and without the mark of its end. Copy or "
                "write it again, or remove it."
            )
        file.seek(place)
        header = file.read(BLOCK)
        if header == END:
            return
        kind, own_size = header[156:157], _number(shard, place, header)
        start = place + BLOCK
        place = start + -(-own_size // BLOCK) * BLOCK
        if kind in (b"x", b"L"):
            text = _text_after(shard, file, start, own_size)
            values = _pax_values(shard, start, text) if kind == b"x" else {"path": text.rstrip(b"\0")}
            if any(key.startswith("GNU.sparse") for key in values):
                raise _unknown(shard, start, "a sparse file")
            name = _decoded(values["path"]) if "path" in values else name
            size = int(values["size"]) if "size" in values else size
            continue
        if kind == SPARSE:
            raise _unknown(shard, start, "a sparse file")
        if size is not None:  # of an extended header, for a file that is too large for this one
            own_size, place = size, start + -(-size // BLOCK) * BLOCK
        if kind in FILES:
            full_name = name if name is not None else _name(header)
            if start + own_size > end:
                raise DataError(
                    f"the shard '{shard}' ends early, in the middle of '{full_name}', after {count} whole files. Copy "
                    "or write it again, or remove it."
                )
            if not full_name.endswith("/"):  # a folder, in archives before ustar
                count += 1
                yield Entry(full_name, start, own_size)
        if kind != b"g":
            name = size = None


def _number(shard: Path, place: int, header: bytes) -> int:
    """Return the size in a header after checking its sum.

    Raises:
        DataError: It is no header.
    """
    try:
        expected = int(header[148:156].strip(b"\0 ") or b"-1", 8)
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if total == expected:
            field = header[124:136]
            if field[0] == 0x80:  # in base 256
                return int.from_bytes(field[1:], "big")
            if (size := int(field.strip(b"\0 ") or b"0", 8)) >= 0:
                return size
    except ValueError:
        pass
    what = "is no tar archive" if place == 0 else f"is damaged: there is no header at byte {place:,}"
    raise DataError(f"the shard '{shard}' {what}. Copy or write it again, or remove it.")


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    is_ustar = header[257:263] == b"ustar\0"  # GNU tar keeps other values at the place of the prefix
    return _decoded(prefix + b"/" + name if prefix and is_ustar else name)


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _text_after(shard: Path, file: BinaryIO, start: int, size: int) -> bytes:
    if size > MAX_NAME_BYTES:
        raise _unknown(shard, start, f"an extended header of {size:,} bytes")
    text = file.read(size)
    if len(text) < size:
        raise DataError(f"the shard '{shard}' ends early, in a header. Copy or write it again, or remove it.")
    return text


def _pax_values(shard: Path, start: int, text: bytes) -> dict[str, bytes]:
    """Return the records of an extended header, each of which is "LENGTH KEY=VALUE" and a line break."""
    values: dict[str, bytes] = {}
    try:
        while text.strip(b"\0"):
            length = int(text.partition(b" ")[0])
            key, is_record, value = text[:length].partition(b" ")[2].partition(b"=")
            if not is_record or not value.endswith(b"\n"):
                raise ValueError
            values[key.decode()] = value[:-1]
            text = text[length:]
        if "size" in values and int(values["size"]) < 0:
            raise ValueError
    except ValueError as error:
        raise _unknown(shard, start, "a damaged extended header") from error
    return values


def _unknown(shard: Path, place: int, what: str) -> DataError:
    return DataError(f"the shard '{shard}' has {what} at byte {place:,}. Write it again with `tar --format=ustar`.")


class _OpenShard:
    """An archive that stays open until its thread ends, or reads from another one: photos are mostly read in order."""

    def __init__(self, shard: Path) -> None:
        self.file = shard.open("rb", buffering=0)
        self.process, self.status = os.getpid(), os.fstat(self.file.fileno())
        weakref.finalize(self, self.file.close)

    def is_for(self, shard: Path) -> bool:
        """Return whether this is still what lies at a path, and no process was forked since it was opened.

        A forked process shares the position in the file with its parent.
        """
        return os.path.samestat(self.status, shard.stat()) and self.process == os.getpid()


_OF_THREAD = threading.local()


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """Return bytes of a file; fewer where it ends.

    Raises:
        OSError: It cannot be read.
    """
    opened: _OpenShard | None = getattr(_OF_THREAD, "opened", None)
    if opened is None or not opened.is_for(shard):
        opened = _OF_THREAD.opened = _OpenShard(shard)
    opened.file.seek(offset)
    content = opened.file.read(size)
    while len(content) < size and (more := opened.file.read(size - len(content))):
        content += more
    return content

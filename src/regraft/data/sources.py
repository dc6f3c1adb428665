"""Where the bytes of a photo come from: a file, or a place in a file that holds many photos."""

import hashlib
from pathlib import Path
from typing import ClassVar

from regraft.errors import DataError


class ShardMember:
    """A photo that is no file of its own. Its text is what messages, predictions and reports show as its path."""

    __slots__: ClassVar[tuple[str, ...]] = ()

    @property
    def short_name(self) -> str:
        """The name of the shard and the place within, without the folders above."""
        return str(self)

    def count_bytes(self) -> int:
        """Return the size of the photo in bytes, or that of all of its shard where it is not known without reading."""
        return len(self.read())

    def read(self) -> bytes:
        """Return the encoded photo.

        Raises:
            DataError: It cannot be read any more; the message is the reason only.
        """
        raise NotImplementedError

    def version(self) -> str:
        """Return a text that changes when the content may have changed, without reading it where possible."""
        return hashlib.sha256(self.read()).hexdigest()


Source = Path | ShardMember


def version_of(shard: Path) -> str:
    """Return a text that changes when a file is written, replaced or moved."""
    status = shard.stat()
    return f"{shard.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def read_bytes(source: Source) -> bytes:
    """Return the encoded bytes of a photo.

    Raises:
        DataError: There is no such file, it is no file, cannot be read, or is empty; the message is the reason only.
    """
    try:
        if isinstance(source, ShardMember):
            content = source.read()
        else:
            if source.exists() and not source.is_file():
                raise DataError("not a file")  # opening a named pipe would block forever
            content = source.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except OSError as error:
        raise DataError(f"{type(error).__name__}: {error}") from error
    if not content:
        raise DataError("the file is empty")
    return content


def size_of(source: Source) -> int:
    """Return the size of a photo in bytes; -1 if it is missing."""
    try:
        return source.count_bytes() if isinstance(source, ShardMember) else source.stat().st_size
    except OSError:
        return -1


def short_name(source: Source) -> str:
    """Return the last folder (or the shard) and the name of a photo, which are the same wherever the data lies."""
    return source.short_name if isinstance(source, ShardMember) else f"{source.parent.name}/{source.name}"


def relative_name(source: Source, folder: Path) -> str:
    """Return the path of a photo, relative to a folder that it lies in."""
    text = str(source)
    path = Path(text)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else text

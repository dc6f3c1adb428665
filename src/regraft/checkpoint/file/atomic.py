"""Write a file so that a reader finds either the old one or the whole new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(target: Path, *, flush: bool = True) -> Iterator[Path]:
    """Let the block write a file beside `target`, which then takes its place.

    Where anything fails, `target` stays as it was, and nothing is left beside it.

    Args:
        target: The file.
        flush: Whether it is on the disk before it takes that place, so that a power cut does no harm either. That takes
            milliseconds, too long for a table that is written anew after each short epoch.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
        if flush:
            _flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Let the new name survive a power cut too, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

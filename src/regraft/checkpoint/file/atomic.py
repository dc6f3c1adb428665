"""Write files atomically: a reader finds either the old file or the complete new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(target: Path, *, flush: bool = True) -> Iterator[Path]:
    """Give the block a temporary path beside `target`, and rename that file to `target` afterwards.

    On any failure, `target` is unchanged and the temporary file is removed.

    Args:
        target: The file to write.
        flush: Whether to flush the file to the disk before the rename, which protects from a power cut. It takes
            milliseconds, too long for a table that is rewritten after each short epoch.

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
    """Flush the folder's entries, so that the rename survives a power cut; ignored where that is not supported."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

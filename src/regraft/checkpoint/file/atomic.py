"""Write files atomically: a reader finds either the old file or the complete new one."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(target: Path, *, flush: bool = True) -> Iterator[Path]:
    """Give the block a temporary path beside `target`, and rename that file to `target` afterwards.

    On any failure, `target` is unchanged and the temporary file is removed. The file gets the permissions of any new
    file, as the umask and the folder say.

    Args:
        target: The file to write.
        flush: Whether to flush the file to the disk before the rename, which protects from a power cut. It takes
            milliseconds, too long for a table that is rewritten after each short epoch.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # The writer of safetensors puts a file of its own in the place of this one, which only its owner may read. The
        # permissions that the system gives to a new file are read off one: asking for the umask would change it.
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            with contextlib.suppress(OSError):  # of a file system without permissions
                temporary.chmod(stat.S_IMODE(mode))
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

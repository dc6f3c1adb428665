"""Reads at an offset of an open file, which several threads may do at the same time."""

import os
import threading
from io import FileIO

_SEEKING = threading.Lock()


def read_at(file: FileIO, into: memoryview, offset: int) -> int:
    """Fill `into` with the bytes from `offset` on, and return their number; 0 at the end of the file.

    Raises:
        OSError: The file cannot be read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [into], offset)
    with _SEEKING:  # Windows has no such call, and other threads move the same position
        file.seek(offset)
        return file.readinto(into)

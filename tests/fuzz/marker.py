"""What the hostile files name: importing it leaves a mark, and so does each call. It does nothing else."""

from pathlib import Path
from typing import Any

MARK = Path("regraft-fuzz-mark")  # a file that exists only if something of a hostile file ran


def call(*_: Any, **__: Any) -> None:
    """Leave the mark."""
    MARK.touch()


class Thing:
    """Leaves the mark when it is made, and when something of it is called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        MARK.touch()

    def __setstate__(self, state: Any) -> None:
        MARK.touch()

    @classmethod
    def method(cls, *_: Any, **__: Any) -> None:
        """Leave the mark."""
        MARK.touch()


call()

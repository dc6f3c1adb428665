"""What a long job tells whoever waits for it; silent unless a shell passes something that speaks."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Progress:
    """A silent listener. The command line passes one that draws bars and prints lines."""

    def say(self, line: str) -> None:
        """Take one line of plain text about what happens next or what just happened."""

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Pass `items` through unchanged, counting them as they go by."""
        yield from items


SILENT = Progress()

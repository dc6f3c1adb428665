"""Progress of long jobs: silent by default, shown if the command line or the caller passes a listener."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Progress:
    """A silent listener. The command line passes a subclass that draws bars and prints lines."""

    def say(self, line: str) -> None:
        """Report one line of plain text about the current step."""

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield `items` unchanged; a subclass counts them."""
        yield from items


SILENT = Progress()

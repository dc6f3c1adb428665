"""Progress of long jobs, as whoever listens to them sees it."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Progress:
    """A listener to long jobs, which hears nothing unless a subclass says otherwise.

    `fit`, `evaluate` and `predict` take an instance as `progress=`. A subclass overrides what it needs. The methods
    are called in the thread of the job, and an exception in them stops it.

    >>> class Log(Progress):
    ...     def say(self, line: str) -> None:
    ...         print("log:", line)
    >>> Log().say("epoch 1/2")
    log: epoch 1/2
    """

    def say(self, line: str) -> None:
        """Hear one line of plain text, as of an epoch that is complete or a file that is skipped."""

    def detail(self, line: str) -> None:
        """Hear one line for those who want to know more, as of what was cached; `regraft train --verbose` prints it."""

    @contextlib.contextmanager
    def status(self, description: str) -> Iterator[None]:
        """Surround a step that cannot be counted, as building a network; it may contain others and calls of `track`."""
        yield

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield `items` unchanged, in order, as the job asks for them; a subclass counts them.

        Args:
            items: What the step goes through, as batches.
            description: The step, as in `epoch 3/25`.
            total: Number of items; None if unknown.
        """
        yield from items


SILENT = Progress()

"""Progress on the screen: bars and lines in a terminal, one bar and lines in a notebook, lines alone in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from regraft.progress import SILENT, Item, Progress

NOTEBOOK_BAR_S = 0.2  # seconds until a step gets a bar, and between two updates of it


class ConsoleProgress(Progress):
    """Prints lines on standard error, and draws a progress bar for long steps if it is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(printable(line), markup=False, soft_wrap=True)

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Draw a bar that disappears when it is full; nothing if standard error is not a terminal."""
        if not self._console.is_terminal:
            yield from items
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=self._console, transient=True) as bar:
            yield from bar.track(items, total=total, description=description)


class NotebookProgress(Progress):
    """Prints lines below the cell, and draws a bar for long steps; needs no widgets, and one output for all bars.

    Lines go to standard output, as notebooks show standard error on red.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(force_jupyter=False, highlight=False)
        self._bar: Any = None  # the handle of the output in which bars are drawn

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(printable(line), markup=False, soft_wrap=True)

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Draw a bar that disappears when it is full; none for a step that takes less than `NOTEBOOK_BAR_S`."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # pyright: ignore[reportArgumentType]
        due, has_bar = time.monotonic() + NOTEBOOK_BAR_S, False
        try:
            for count, item in enumerate(items):
                if time.monotonic() >= due:
                    self._draw(_bar_as_html(description, count, total))
                    due, has_bar = time.monotonic() + NOTEBOOK_BAR_S, True
                yield item
        finally:
            if has_bar:
                self._draw("")

    def _draw(self, html: str) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        if self._bar is None:
            self._bar = display(HTML(html), display_id=True)
        else:
            self._bar.update(HTML(html))


def _bar_as_html(description: str, count: int, total: int | None) -> str:
    limits = f' value="{count}" max="{total}"' if total else ""
    return f"{escape(description)} <progress{limits}></progress> {count}{f'/{total}' if total else ''}"


def progress_of(progress: Progress | bool) -> Progress:
    """Return the listener for an argument `progress`: one for the screen (True), a silent one (False), or its own."""
    if isinstance(progress, Progress):
        return progress
    if not progress:
        return SILENT
    from rich.console import Console

    return NotebookProgress() if Console().is_jupyter else ConsoleProgress()


def printable(text: str) -> str:
    r"""Escape characters that would break a line or a terminal: line breaks, control characters, undecodable bytes.

    >>> printable("caf\u00e9\n\udcff")
    'café\\n\\udcff'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)

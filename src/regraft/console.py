"""Progress on the screen: bars and lines in a terminal, one bar and lines in a notebook, lines alone in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from regraft.display import printable
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
        if not self._console.file.isatty():  # not `is_terminal`, as FORCE_COLOR in a CI's log is none
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
                    self._draw(description, count, total)
                    due, has_bar = time.monotonic() + NOTEBOOK_BAR_S, True
                yield item
        finally:
            if has_bar:
                self._show("", "")

    def _draw(self, description: str, count: int, total: int | None) -> None:
        limits = f' value="{count}" max="{total}"' if total else ""
        figures = f"{count}/{total}" if total else f"{count}"
        self._show(
            f"{escape(description)} <progress{limits}></progress> {figures}", f"{printable(description)} {figures}"
        )

    def _show(self, html: str, text: str) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        forms = {"text/html": html, "text/plain": text}
        if self._bar is None:
            self._bar = display(forms, raw=True, display_id=True)
        else:
            self._bar.update(forms, raw=True)


def progress_of(progress: Progress | bool) -> Progress:
    """Return the listener for an argument `progress`: one for the screen (True), a silent one (False), or its own."""
    if isinstance(progress, Progress):
        return progress
    if not progress:
        return SILENT
    from rich.console import Console

    return NotebookProgress() if Console().is_jupyter else ConsoleProgress()

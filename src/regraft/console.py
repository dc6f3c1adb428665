"""Progress on the screen: bars and lines in a terminal, one bar and lines in a notebook, lines alone in a log."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from html import escape
from typing import IO, Any

from regraft.display import printable
from regraft.progress import SILENT, Item, Progress

LABEL = 11  # columns of the label that begins a line, as in "model      resnet18"
MIN_BAR, BESIDE_BAR = 8, 48  # columns of a bar, and of what stands beside it
WORDS = re.compile(r" *(?:(?<![^ (])'[^']*'\S*|\S+)")  # with the spaces before them; what is in quotes is one word
NOTEBOOK_BAR_S = 0.2  # seconds until a step gets a bar, and between two updates of it


class ConsoleProgress(Progress):
    """Prints lines on standard error; on a terminal, shows also that a step is running, and bars for long ones.

    Args:
        verbose: Whether details are printed too.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._verbose = verbose
        self._steps: list[str] = []  # the running steps, the innermost last
        self._live: Any = None

    def say(self, line: str) -> None:
        """Print one line, broken between words where the terminal ends."""
        self._console.print(
            wrapped(printable(line), screen_width(self._console.file), LABEL), markup=False, soft_wrap=True
        )

    def detail(self, line: str) -> None:
        """Print one line if details are wanted."""
        if self._verbose:
            self.say(line)

    @contextlib.contextmanager
    def status(self, description: str) -> Iterator[None]:
        """Show a spinner with the description while the block runs; nothing if standard error is not a terminal."""
        self._steps.append(description)
        self._spin()
        try:
            yield
        finally:
            self._steps.pop()
            self._spin()

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Draw a bar that disappears when it is full; nothing if standard error is not a terminal."""
        width = screen_width(self._console.file)  # rich's `is_terminal` is true also in a CI's log with FORCE_COLOR
        if width is None:
            yield from items
            return
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(max(MIN_BAR, min(40, width - BESIDE_BAR))),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        self._stop_spinner()
        try:
            with Bar(*columns, console=self._console, transient=True) as bar:
                yield from bar.track(items, total=total, description=description)
        finally:
            self._spin()

    def _spin(self) -> None:
        """Show the innermost running step, if there is one."""
        if not self._steps or screen_width(self._console.file) is None:
            self._stop_spinner()
            return
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots", Text(self._steps[-1]))
        if self._live is not None:
            self._live.update(spinner)
        else:
            self._live = Live(spinner, console=self._console, refresh_per_second=10, transient=True)
            self._live.start(refresh=True)  # the first time here: its thread could draw it while a line is printed

    def _stop_spinner(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class NotebookProgress(Progress):
    """Prints lines below the cell, and draws a bar for long steps; needs no widgets, and one output for all bars.

    Lines go to standard output, as notebooks show standard error on red.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(force_jupyter=False, highlight=False)
        self._bar: Any = None  # the handle of the output in which bars are drawn
        self._steps: list[str] = []  # the running steps, the innermost last

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
                self._show_step()

    @contextlib.contextmanager
    def status(self, description: str) -> Iterator[None]:
        """Show the description while the block runs."""
        self._steps.append(description)
        self._show_step()
        try:
            yield
        finally:
            self._steps.pop()
            self._show_step()

    def _show_step(self) -> None:
        text = f"{printable(self._steps[-1])} …" if self._steps else ""
        self._show(escape(text), text)

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


def screen_width(stream: IO[str]) -> int | None:
    """Return the columns of the terminal that a stream writes to; None for a file or a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError):  # no file behind it, or closed
        return None


def wrapped(text: str, width: int | None, indent: int = 0) -> str:
    """Break a line between words, where a terminal would break it anywhere.

    A word longer than a line, such as a path, stays whole; so does what is in quotes.

    Args:
        text: One line.
        width: Columns of the terminal; None leaves the line as it is.
        indent: Columns before the second line and those after it.

    >>> print(wrapped("model      resnet18, pretrained", 24, indent=11))
    model      resnet18,
               pretrained
    """
    from rich.cells import cell_len

    if width is None or cell_len(text) <= width:
        return text
    lines, line = [], ""
    for word in WORDS.findall(text):
        has_room = cell_len(line + word) <= width
        if has_room or not line.strip() or (len(line) < indent and not lines):  # a label is never alone
            line += word
        else:
            lines.append(line)
            line = " " * indent + word.lstrip()
    return "\n".join([*lines, line])

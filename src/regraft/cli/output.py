"""The only module that prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TextIO, TypeVar

import typer

from regraft.console import LABEL, screen_width, wrapped
from regraft.display import cut_middle, printable
from regraft.errors import InputError, RegraftError
from regraft.wording import flags_in_messages

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print details too.")]

INTERRUPTED = 130
WRONG_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)  # errors that only another path can fix
_RESULTS: ContextVar[TextIO] = ContextVar("results")
_BEGAN: ContextVar[float] = ContextVar("began")
MAX_START_S = 60  # of Python and this package; a process that seems older has a clock that was changed
MAX_CLASS_NAME = 36  # characters, so that the table of the classes fits into 80 columns
MAX_PAIRS, MAX_PAIR_NAME = 5, 30


def results() -> TextIO:
    """Return the stream for results: standard output as it was when the command began."""
    return _RESULTS.get(sys.stdout)


def say(line: str = "") -> None:
    """Print one line of a result on standard output; a terminal gets it in several where it is longer than one."""
    print(wrapped(printable(line), screen_width(results()), LABEL), file=results())


def say_classes(metrics: Any) -> None:
    """Print the table of the classes, and the most frequent confusions."""
    rows = [
        (
            cut_middle(printable(entry.name), MAX_CLASS_NAME),
            str(entry.count),
            str(metrics.confusion[index][index]),
            f"{entry.precision:.3f}",
            f"{entry.recall:.3f}",
            f"{entry.f1:.3f}",
        )
        for index, entry in enumerate(metrics.per_class)
    ]
    say_table(("class", "photos", "right", "precision", "recall", "F1"), rows, (False, *5 * (True,)))
    pairs = metrics.confusions()
    say()
    if not pairs:
        say("no photo was taken for another class")
        return
    mistakes, shown = sum(count for _, _, count in pairs), pairs[:MAX_PAIRS]
    counts = {entry.name: entry.count for entry in metrics.per_class}
    lines = [
        (*(cut_middle(printable(name), MAX_PAIR_NAME) for name in (true, predicted)), f"{count} of {counts[true]}")
        for true, predicted, count in shown
    ]
    say_table(("most confused", "taken for", "photos"), lines, (False, False, True))
    if rest := mistakes - sum(count for _, _, count in shown):
        say(f"{rest} of the {mistakes} mistakes are in other pairs")


def mark_process_start() -> None:
    """Let `seconds_since_start` count from the start of this process, which is a command alone."""
    import psutil

    age = time.time() - psutil.Process().create_time()
    _BEGAN.set(time.perf_counter() - (age if 0 <= age < MAX_START_S else 0.0))


def seconds_since_start() -> float:
    """Return the seconds since the process began, or the command where it runs in another program."""
    return time.perf_counter() - _BEGAN.get()


def say_lines(text: str) -> None:
    """Print the lines of a text on standard output."""
    for line in text.splitlines():
        say(line)


def say_code(text: str) -> None:
    """Print code on standard output, with its lines as they are."""
    for line in text.splitlines():
        print(printable(line), file=results())


def say_summary(summary: Any) -> None:
    """Print the layers of a network on standard output."""
    from regraft.anatomy.summary_table import text_tree

    say_lines(text_tree(summary, screen_width(results())))


def say_text(text: str) -> None:
    """Print a text for programs on standard output, with its line ends as they are."""
    stream = results()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(newline="")  # a line break within a cell of a CSV stays what it is on Windows too
    print(text, end="", file=stream)


def say_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    print(json_text(value), end="", file=results())


def json_text(value: Any) -> str:
    """Return one JSON value as text."""
    return json.dumps(value, indent=2, allow_nan=False, default=str) + "\n"


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV, with cells in quotes where they need them."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; bytes of file names that are no UTF-8 become escapes."""
    from regraft.checkpoint.file.atomic import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def say_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool]) -> None:
    """Print aligned columns on standard output."""
    from regraft.anatomy.summary_table import aligned

    table = [head, *([printable(cell) for cell in row] for row in rows)]
    for line in aligned(table, right, screen_width(results())):
        say(line)


def guarded(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn the errors of a command into one line on standard error and an exit code.

    Output of other code meanwhile (torch.hub during downloads, a custom model) goes to standard error too.
    """

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        token = _RESULTS.set(sys.stdout)
        began = _BEGAN.set(_BEGAN.get(time.perf_counter()))
        try:
            with contextlib.redirect_stdout(sys.stderr), flags_in_messages():
                result = command(*args, **kwargs)
            print(end="", flush=True)  # flush here, where a closed pipe is handled
            return result
        except RegraftError as error:
            if error.is_told:  # of several ranks, one tells
                _print_error(f"error: {'' if error.rank is None else f'rank {error.rank}: '}{error}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interruption:
            if getattr(interruption, "is_told", True):
                _print_error(str(interruption) or "stopped by Ctrl-C. Nothing was written.")
            raise typer.Exit(getattr(interruption, "exit_code", INTERRUPTED)) from interruption
        except BrokenPipeError as error:  # the reader has closed the pipe, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
            raise typer.Exit(0) from error
        except OSError as error:  # a full disk, missing permissions
            if error.errno in WRONG_PATHS:
                name, reason = str(error.filename)[:60], str(error.strerror)
                _print_error(f"error: '{name}' cannot be used as a path: {reason}. Give another.")
                raise typer.Exit(InputError.exit_code) from error
            _print_error(f"error: {error}")
            raise typer.Exit(RegraftError.exit_code) from error
        finally:
            _RESULTS.reset(token)
            _BEGAN.reset(began)

    return run


def require(condition: bool, message: str) -> None:
    """Raise an error about the options unless a condition holds."""
    if not condition:
        raise InputError(message)


def require_report_target(report: Path, *, overwrite: bool) -> None:
    """Refuse a path that a report cannot be written to."""
    require(report.suffix.lower() in (".html", ".htm"), f"--report '{report}' does not end in .html.")
    require(report.parent.is_dir(), f"no folder '{report.parent}' to write '{report.name}' into. Create it first.")
    require(overwrite or not report.exists(), f"'{report}' exists. Choose another --report, or pass --overwrite.")


def require_order(command: str, checkpoint: str, data: Sequence[str]) -> None:
    """Refuse swapped arguments: a folder or a photo as the checkpoint, and a checkpoint among the data."""
    from regraft.checkpoint.file.format import INDEX_SUFFIX, SUFFIX, locate

    def is_checkpoint(path: str) -> bool:
        return locate(Path(path)).name.endswith((SUFFIX, INDEX_SUFFIX))

    found = next(filter(is_checkpoint, data), None) if not is_checkpoint(checkpoint) else None
    rest = [checkpoint, *(path for path in data if path != found)]
    require(found is None, f"the checkpoint comes first: regraft {command} {shlex.join([found or '', *rest])}.")


def _print_error(line: str) -> None:
    width = screen_width(sys.stderr)
    print("\n".join(wrapped(printable(part), width, len("error: ")) for part in line.splitlines()), file=sys.stderr)

"""The only module that prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, ParamSpec, TextIO, TypeVar

import typer

from regraft.console import LABEL, screen_width, wrapped
from regraft.display import printable
from regraft.errors import InputError, RegraftError
from regraft.wording import flags_in_messages

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print details too.")]

INTERRUPTED = 130
WRONG_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)  # errors that only another path can fix
_RESULTS: ContextVar[TextIO] = ContextVar("results")


def results() -> TextIO:
    """Return the stream for results: standard output as it was when the command began."""
    return _RESULTS.get(sys.stdout)


def say(line: str = "") -> None:
    """Print one line of a result on standard output; a terminal gets it in several where it is longer than one."""
    print(wrapped(printable(line), screen_width(results()), LABEL), file=results())


def say_lines(text: str) -> None:
    """Print the lines of a text on standard output."""
    for line in text.splitlines():
        say(line)


def say_summary(summary: Any) -> None:
    """Print the layers of a network on standard output."""
    from regraft.anatomy.summary_table import text_tree

    say_lines(text_tree(summary, screen_width(results())))


def say_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False, default=str), file=results())


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
        try:
            with contextlib.redirect_stdout(sys.stderr), flags_in_messages():
                result = command(*args, **kwargs)
            print(end="", flush=True)  # flush here, where a closed pipe is handled
            return result
        except RegraftError as error:
            _print_error(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interruption:
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

    return run


def require(condition: bool, message: str) -> None:
    """Raise an error about the options unless a condition holds."""
    if not condition:
        raise InputError(message)


def _print_error(line: str) -> None:
    width = screen_width(sys.stderr)
    print("\n".join(wrapped(printable(part), width, len("error: ")) for part in line.splitlines()), file=sys.stderr)

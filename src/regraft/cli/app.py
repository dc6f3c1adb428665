"""The command `regraft`. Importing this module is cheap: each command imports its libraries when it runs."""

import io
import sys

import typer

from regraft.cli.advise import advise
from regraft.cli.cache import cache
from regraft.cli.check import check
from regraft.cli.compare import compare
from regraft.cli.demo import demo
from regraft.cli.evaluate import evaluate
from regraft.cli.files.convert import convert
from regraft.cli.files.diff import diff
from regraft.cli.files.merge import merge
from regraft.cli.inspect import inspect
from regraft.cli.models import models
from regraft.cli.output import mark_process_start, say
from regraft.cli.predict import predict
from regraft.cli.surgery import surgery
from regraft.cli.train import train

app = typer.Typer(
    name="regraft",
    help="Train a pretrained network on your own photos, and look inside it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    *(check, advise, train, evaluate, predict, compare, inspect, surgery, convert, diff, merge, models, demo),
):
    app.command()(command)
app.add_typer(cache, name="cache")


def _show_version(wanted: bool) -> None:
    if wanted:
        from regraft.version import __version__

        say(f"regraft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Train a pretrained network on your own photos, and look inside it."""


def main() -> None:
    """Run the command line."""
    mark_process_start()
    for stream in (sys.stdout, sys.stderr):  # file names may have characters that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()

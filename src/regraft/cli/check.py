"""`regraft check`: look for what is wrong with photos before a network is trained on them."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from regraft.cli.output import csv_text, guarded, require, say, say_json, say_lines, write_text
from regraft.cli.train import choose_train_options
from regraft.console import ConsoleProgress

FOUND_ERRORS = 1  # exit code


@guarded
@choose_train_options(
    *("weights", "rename", "match", "entry", "accept", "validation_share", "seed", "image_size", "decoder", "device"),
    *("cache", "fast"),
)
def check(
    data: Annotated[str, Argument(help="Folder with train/ and val/, with a folder per class, or of shards; or .csv.")],
    model: Annotated[
        str | None, Option(help="Network to compare labels with.  [default: that of train, if it is here]")
    ] = None,
    labels: Annotated[bool, Option("--labels/--no-labels", help="Look for wrong labels, with a network.")] = True,
    csv: Annotated[Path | None, Option(help="Write the problems into this .csv file, to act on.")] = None,
    report: Annotated[Path | None, Option(help="Write a report with pictures, as in photos.html.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing files.")] = False,
    exit_zero: Annotated[bool, Option("--exit-zero", help="Exit with 0 also if there are errors.")] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the problems as JSON.")] = False,
    **train_options: Any,
) -> None:
    """Look for copies in training and validation, wrong labels, damaged photos and odd folders. Nothing is changed.

    Example: regraft check photos/ --csv problems.csv --report problems.html

    Exit code: 0 without errors (there may be warnings), 1 with errors, 2 if the data cannot be looked at.
    """
    for name, path, endings in (("csv", csv, (".csv",)), ("report", report, (".html", ".htm"))):
        if path is not None:
            require(path.suffix.lower() in endings, f"--{name} '{path}' does not end in {endings[0]}.")
            require(path.parent.is_dir(), f"no folder '{path.parent}' to write '{path.name}' into. Create it first.")
            require(overwrite or not path.exists(), f"'{path}' exists. Choose another --{name}, or pass --overwrite.")
    options = {name: value for name, value in train_options.items() if value is not None}
    progress = ConsoleProgress()
    with progress.status("starting"):  # imports PyTorch, which takes seconds
        from regraft.photo_checks import check as check_photos

        if report is not None:
            importlib.import_module("regraft.report")
    result = check_photos(data, model=model, labels=labels, trust_code=trust_code, progress=progress, **options)
    if csv is not None:
        write_text(csv, csv_text(result.rows()))
    if report is not None:
        from regraft.report import write_report

        with progress.status("writing the report"):
            write_report(result, report)
    if as_json:
        files = {name: str(path) for name, path in (("csv", csv), ("report", report)) if path is not None}
        say_json({**result.to_dict(), **files})
    else:
        say_lines(str(result))
        for name, path in (("table", csv), ("report", report)):
            if path is not None:
                say(f"{name:11}{path}")
    if result.errors and not exit_zero:
        raise typer.Exit(FOUND_ERRORS)

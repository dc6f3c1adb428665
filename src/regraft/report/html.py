"""Fill a template and write the page: one file that needs no other, and whose names from outside are inert."""

import functools
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from regraft.arguments import check_arguments, check_target
from regraft.checkpoint.file.atomic import atomic_write
from regraft.errors import RunError
from regraft.report.run_page import describe_run
from regraft.report.text import duration, number, percent, visible
from regraft.training.result import FitResult


def write_report(result: FitResult, path: str | os.PathLike[str]) -> Path:
    """Write what a training run found out as one HTML file, and return its path.

    The page refers to nothing outside itself. A photo that is gone since, or a name that looks like HTML, does no harm.

    Args:
        result: What `fit` returned.
        path: Where to; its folder must exist.

    Raises:
        RunError: The file cannot be written; a previous one is as it was.
    """
    check_arguments(write_report, locals())
    check_target(write_report, "path", path)
    return write_page(path, render("run.html", **describe_run(result)))


def render(template: str, **context: Any) -> str:
    """Fill the template of that name in `templates/`.

    Text is escaped; a variable that the template uses and `context` lacks is an error. The SVG that `plots` returns is
    shown by the macro `figure` of `parts.html`.

    Args:
        template: Name of a file, as in `run.html`.
        **context: What the template shows.
    """
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return _environment().get_template(template).render(written=written, **context)


def write_page(path: str | os.PathLike[str], html_text: str) -> Path:
    """Write a page, so that a reader finds either the old file or the whole new one.

    Raises:
        RunError: The file cannot be written; a previous one is as it was.
    """
    target = Path(path)
    try:
        with atomic_write(target) as temporary:
            temporary.write_bytes(html_text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunError(
            f"cannot write the report {str(target)!r}: {error.strerror or error}. A previous one is as it was. "
            "Check that its folder exists and has space, or choose another."
        ) from error
    return target


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("regraft.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "duration": duration}
    return environment


def _shown(value: Any) -> Any:
    # Not for Markup, a kind of str: that is HTML which a template made of parts that came through here.
    return visible(value) if type(value) is str else value

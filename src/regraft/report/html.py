"""Render a template and write the page: one self-contained file, with all external text escaped."""

import base64
import functools
import hashlib
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import nn

from regraft.advice.result import Advice, Ranking
from regraft.arguments import check_arguments, check_target
from regraft.checkpoint.file.atomic import atomic_write
from regraft.errors import ArgumentError, RunError
from regraft.photo_checks.data_report import DataReport
from regraft.report.advice_page import describe_advice
from regraft.report.comparison_page import describe_comparison
from regraft.report.data_page import describe_data
from regraft.report.evaluation_page import describe_evaluation
from regraft.report.run_page import describe_run
from regraft.report.text import duration, number, percent, visible
from regraft.training.metrics import Metrics
from regraft.training.result import FitResult
from regraft.trials.comparison import Comparison


def write_report(
    result: FitResult | Metrics | Advice | Ranking | Comparison | DataReport,
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    heat_maps: bool = True,
) -> Path:
    """Write the report of a run, an evaluation, an advice, a comparison or a check as one HTML file; return its path.

    The page loads nothing from elsewhere. Photos that no longer exist, and names that look like HTML, are safe.

    Args:
        result: What `fit`, `evaluate`, `advise`, `compare` or `check` returned, or what a run had reached when it was
            stopped (`error.result`).
        path: Path of the file; its folder must exist.
        model: The network that was evaluated, for heat maps of its mistakes; that of a run is known.
        heat_maps: Whether the page shows where in a photo lay what spoke for each of the wrong answers that it shows.
            They take a forward and a short backward for each of them.

    Raises:
        ArgumentError: The metrics are not those of `evaluate`, so their scores and photos are unknown.
        RunError: The file cannot be written; a previous one is unchanged.
    """
    check_arguments(write_report, locals())
    check_target(write_report, "path", path)
    began = time.perf_counter()
    if isinstance(result, FitResult):
        template, page, seconds = "run.html", describe_run(result, heat_maps=heat_maps), result.seconds
    elif isinstance(result, Comparison):
        return write_page(path, render("comparison.html", **describe_comparison(result)))
    elif isinstance(result, DataReport):
        template, page, seconds = "data.html", describe_data(result), result.seconds
    elif isinstance(result, (Advice, Ranking)):
        return write_page(path, render("advice.html", **describe_advice(result)))
    elif result.scores is not None:
        template, page = "evaluation.html", describe_evaluation(result, result.scores, model if heat_maps else None)
        seconds = result.scores.seconds
    else:
        raise ArgumentError(
            "write_report: result is Metrics without scores, as a run has them for each epoch. Pass what `fit` or "
            "`evaluate` returned."
        )
    seconds = {**seconds, "report": time.perf_counter() - began}  # all but the writing of the text, which is short
    return write_page(path, render(template, seconds=seconds, **page))


def render(template: str, **context: Any) -> str:
    """Render a template in `templates/`.

    Text is escaped, and a variable that is missing from `context` is an error. The macros of `parts.html` show figures,
    tables, pictures and notices; see "How a page is written" in `docs/architecture.md`.

    Args:
        template: Name of a file, as in `run.html`.
        **context: Variables of the template.
    """
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return _environment().get_template(template).render(written=written, **context)


def write_page(path: str | os.PathLike[str], html_text: str) -> Path:
    """Write a page atomically: a reader finds either the old file or the complete new one.

    Raises:
        RunError: The file cannot be written; a previous one is unchanged.
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
        finalize=_escape_invisible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The only script of a page, and its digest, by which the page's security policy allows it and no other.
    script = Path(__file__).with_name("templates").joinpath("sorting.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment.globals |= {"sorting_script": Markup(script), "sorting_digest": f"sha256-{digest}"}
    environment.filters |= {"percent": percent, "number": number, "duration": duration}
    return environment


def _escape_invisible(value: Any) -> Any:
    # Not for Markup, a subclass of str: that is HTML of a template, whose parts have passed through here.
    return visible(value) if type(value) is str else value

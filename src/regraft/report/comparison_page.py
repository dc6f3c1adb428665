"""The contents of the report of a comparison, and its plot as a file."""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regraft.checkpoint.file.atomic import atomic_write
from regraft.report import plots
from regraft.trials.cells import CellResult
from regraft.trials.comparison import Comparison, mean_and_spread, spread

PLOT = "comparison.svg"


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """Return the variables of the template `comparison.html`."""
    by_images, by_seconds = panels(comparison)
    accuracies, seconds = describe_tables(comparison)
    return {
        "comparison": comparison,
        "data": Path(comparison.data).name,
        "images_plot": plots.error_bars([by_images]),
        "seconds_plot": plots.error_bars([by_seconds]),
        "accuracies": accuracies,
        "seconds_rows": seconds,
        "has_spread": len(comparison.seeds) > 1,
    }


def describe_tables(comparison: Comparison) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the rows of two tables, accuracy and seconds: a number of images, and a text for each way."""
    return _rows(comparison, mean_and_spread), _rows(comparison, _seconds_text)


def panels(comparison: Comparison, title: str = "") -> tuple[plots.Panel, plots.Panel]:
    """Return the plots of the accuracy by images and by seconds."""
    measured = {
        way.title: [(images, found) for images in comparison.images if (found := comparison.results(way.name, images))]
        for way in comparison.ways
    }
    by_images = {
        title: [(comparison.per_class(images), 0.0, *_accuracy(results)) for images, results in points]
        for title, points in measured.items()
    }
    by_seconds = {
        title: [(*_seconds(results), *_accuracy(results)) for _, results in points]
        for title, points in measured.items()
    }
    ticks = {
        comparison.per_class(images): f"all ({comparison.per_class(images):.0f})" if images == "all" else images
        for images in comparison.images
    }
    return (
        plots.Panel(by_images, "images per class", "accuracy", title, ticks),
        plots.Panel(by_seconds, "seconds of training", "accuracy", title),
    )


def write_comparison_plot(comparisons: Sequence[tuple[str, Comparison]], path: str | os.PathLike[str]) -> Path:
    """Write the plots of one comparison or several as an SVG file for light and dark pages, and return its path.

    Args:
        comparisons: (title, comparison) of each, one below the other.
        path: Path of the file.

    Raises:
        OSError: It cannot be written.
    """
    drawn = [panel for title, comparison in comparisons for panel in panels(comparison, title)]
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(plots.standalone(plots.error_bars(drawn, columns=2)), encoding="utf-8")
    return Path(path)


def _rows(comparison: Comparison, text: Callable[[Sequence[CellResult]], str]) -> list[tuple[str, ...]]:
    return [
        (
            f"all ({comparison.per_class(images):.0f})" if images == "all" else images,
            *(text(comparison.results(way.name, images)) for way in comparison.ways),
        )
        for images in comparison.images
    ]


def _accuracy(results: Sequence[CellResult]) -> tuple[float, float]:
    values = [result.accuracy for result in results]
    return statistics.mean(values), spread(values) or 0.0


def _seconds(results: Sequence[CellResult]) -> tuple[float, float]:
    values = [result.total_s for result in results]
    return statistics.mean(values), spread(values) or 0.0


def _seconds_text(results: Sequence[CellResult]) -> str:
    if not results:
        return "–"
    mean, deviation = _seconds(results)
    return f"{mean:.3g} ± {deviation:.2g}" if len(results) > 1 else f"{mean:.3g}"

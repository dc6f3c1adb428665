"""The report of the demonstration."""

import os
from pathlib import Path
from typing import Any

from regraft.demo.run import SEEDS, SOURCE_EPOCHS, TARGET_EPOCHS, DemoResult, Outcome
from regraft.report import plots
from regraft.report.html import render, write_page


def write_demo_report(result: DemoResult, folder: str | os.PathLike[str]) -> Path:
    """Write the results of the demonstration as `report.html` in a folder, and return its path.

    Args:
        result: The result of `run_demo`.
        folder: Folder of the report; must exist.

    Raises:
        RunError: The file cannot be written; a previous one is unchanged.
    """
    return write_page(Path(folder) / "report.html", render("demo.html", **describe_demo(result)))


def describe_demo(result: DemoResult) -> dict[str, Any]:
    """Return the variables of the template `demo.html`."""
    methods = list(dict.fromkeys(outcome.method for outcome in result.outcomes))
    shots = list(dict.fromkeys(outcome.shots for outcome in result.outcomes))
    by_method = {(outcome.method, outcome.shots): outcome for outcome in result.outcomes}
    return {
        "result": result,
        "methods": methods,
        "shots": shots,
        "by_method": by_method,
        "winners": {count: max((by_method[method, count] for method in methods), key=_mean) for count in shots},
        "accuracy_plot": plots.sweep(_series(result, "accuracy"), "images per class", "accuracy"),
        "seconds_plot": plots.sweep(_series(result, "duration"), "images per class", "seconds", from_zero=True),
        "seeds": len(result.outcomes[0].accuracies) if result.outcomes else SEEDS,
        "source_epochs": SOURCE_EPOCHS,
        "target_epochs": TARGET_EPOCHS,
    }


def _series(result: DemoResult, figure: str) -> dict[str, list[tuple[float, float, float]]]:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for outcome in result.outcomes:
        series.setdefault(outcome.method, []).append((outcome.shots, *getattr(outcome, figure)))
    return series


def _mean(outcome: Outcome) -> float:
    return outcome.accuracy[0]

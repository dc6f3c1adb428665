"""What the demonstration's page shows, as values for its template."""

from typing import Any

from regraft.insight.demo import SEEDS, SOURCE_EPOCHS, TARGET_EPOCHS, DemoResult, Outcome
from regraft.report import plots


def describe_demo(result: DemoResult) -> dict[str, Any]:
    """Work out what the template `demo.html` shows."""
    methods = list(dict.fromkeys(outcome.method for outcome in result.outcomes))
    shots = list(dict.fromkeys(outcome.shots for outcome in result.outcomes))
    found = {(outcome.method, outcome.shots): outcome for outcome in result.outcomes}
    return {
        "result": result,
        "methods": methods,
        "shots": shots,
        "found": found,
        "winners": {count: max((found[method, count] for method in methods), key=_mean) for count in shots},
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

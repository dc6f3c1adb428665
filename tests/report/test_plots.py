"""Plots as SVG."""

import matplotlib
import pytest

from regraft.report import plots
from report.results import Page, assert_complete_in_itself


@pytest.mark.parametrize(("size", "numbered"), [(2, True), (25, True), (40, False)])
def test_plots_confusion_has_numbers_up_to_25_classes(size: int, numbered: bool) -> None:
    counts = [[777 if row == column else 0 for column in range(size)] for row in range(size)]
    names = [f"class {index}" for index in range(size)]
    drawn = Page(plots.confusion(counts, names) or "")
    assert drawn.text.count("777") == (size if numbered else 0)
    assert all(drawn.text.count(name) >= 2 for name in names)


def test_plots_sweep_draws_each_method_and_tick() -> None:
    series = {
        "linear probe": [(1.0, 0.5, 0.05), (10.0, 0.8, 0.02)],
        "<from> scratch": [(1.0, 0.2, 0.1), (10.0, 0.4, 0.1), (50.0, 0.6, 0.0)],
    }
    drawn = Page(plots.sweep(series, "photos per class", "accuracy"))
    assert_complete_in_itself(drawn)
    for text in ("linear probe", "<from> scratch", "photos per class", "accuracy", "1", "10", "50"):
        assert text in drawn.pieces
    assert Page(plots.sweep(series, "x", "y", log_x=False)).all("svg")


def test_plots_are_repeatable_and_leave_the_settings_alone() -> None:
    series = {"validation": [0.5, 0.7, 0.6]}
    matplotlib.rcParams["font.size"] = 23.0
    try:
        before = dict(matplotlib.rcParams)
        first, second = (plots.learning_curves(series, 2, "accuracy") for _ in range(2))
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcParams["font.size"] = matplotlib.rcParamsDefault["font.size"]
    assert first == second
    assert plots.learning_curves(series, 2, "accuracy") == first

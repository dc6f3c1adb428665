"""The plots of a comparison; its page is read in `tests/cli/test_compare.py`."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from regraft.report import plots
from regraft.report.comparison_page import describe_tables, panels, write_comparison_plot
from regraft.trials.cells import Cell, CellResult
from regraft.trials.comparison import Comparison, WaySummary, claims_of


def comparison(*, seeds: int = 2) -> Comparison:
    ways = tuple(
        WaySummary(name, title, "", (), ()) for name, title in (("scratch", "from scratch"), ("probe", "<probe>"))
    )
    cells = tuple(
        CellResult(
            Cell(way, images, seed),
            count,
            (),
            accuracy := (0.5 if way == "scratch" else 0.75) + 0.25 * seed * (images == "all"),
            0.7,
            "1" * round(8 * accuracy) + "0" * round(8 * (1 - accuracy)),
            ((2.0 * count, accuracy),),
            {"training": 2.0 * count},
            1.0,
            3.0,
        )
        for way in ("scratch", "probe")
        for images, count in (("5", 10), ("all", 30))
        for seed in range(seeds)
    )
    images, names = ("5", "all"), ("ants", "bees")
    return Comparison(
        *("tiny", "photos", names, 30, 8, 0.5, 25, images, tuple(range(seeds)), ways, cells),
        *(claims_of(cells, ways, images, 0.5), (), "cpu", 60.0, ""),
    )


def test_comparison_tables_have_mean_and_deviation_of_the_seeds() -> None:
    accuracies, seconds = describe_tables(comparison())
    assert accuracies == [("5", "0.500 ± 0.000", "0.750 ± 0.000"), ("all (15)", "0.625 ± 0.177", "0.875 ± 0.177")]
    assert seconds == [("5", "20 ± 0", "20 ± 0"), ("all (15)", "60 ± 0", "60 ± 0")]
    assert describe_tables(comparison(seeds=1))[0] == [("5", "0.500", "0.750"), ("all (15)", "0.500", "0.750")]


def test_comparison_of_a_session_shows_every_way() -> None:
    shown = comparison()
    assert "from scratch  5: 0.500 ± 0.000, all: 0.625 ± 0.177" in repr(shown)
    assert all(len(line) <= 80 for line in repr(shown).splitlines())
    assert "&lt;probe&gt;" in shown._repr_html_()


def test_panels_have_each_point_at_its_images_and_seconds() -> None:
    by_images, by_seconds = panels(comparison())
    assert by_images.series["<probe>"] == [(5.0, 0.0, 0.75, 0.0), (15.0, 0.0, 0.875, pytest.approx(0.1768, abs=1e-4))]
    assert by_images.ticks == {5.0: "5", 15.0: "all (15)"}
    assert [point[:2] for point in by_seconds.series["<probe>"]] == [(20.0, 0.0), (60.0, 0.0)]


def test_write_comparison_plot_writes_a_file_for_light_and_dark_pages(tmp_path: Path) -> None:
    file = write_comparison_plot([("ants & bees", comparison()), ("one", comparison(seeds=1))], tmp_path / "plot.svg")
    tree = ET.parse(file)
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("ants & bees") == texts.count("one") == 2
    assert {"from scratch", "<probe>", "all (15)", "images per class", "seconds of training"} <= set(texts)
    assert "prefers-color-scheme:dark" in file.read_text()


def test_plots_standalone_is_whole_where_a_panel_has_one_point() -> None:
    drawn = plots.error_bars([plots.Panel({"one": [(3.0, 0.0, 0.5, 0.0)]}, "seconds", "accuracy")])
    assert ET.fromstring(plots.standalone(drawn)).tag == "{http://www.w3.org/2000/svg}svg"

"""Pages as a browser shows them, at the width of a phone, a tablet and a desktop, light and dark.

The judge is `inspect_page.js`, which runs in Chromium; the first test holds that it sees what is wrong.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from regraft.report import write_report
from regraft.training.metrics import Scores
from report.browser import Browser, find_chromium
from report.results import classified, photos

WIDTHS = (360, 768, 1280)
PAPER_WIDTH = 718  # pixels between the margins of A4
FAULTY = """<!doctype html><body style="margin:0; background: #fff">
<p style="color: #999; font-size: 16px">pale</p> <p style="color: #767676">dark enough</p>
<img src="missing.png" alt="gone"> <img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">
<div style="width: 2000px">wide</div>
<div class="scroll" style="overflow: auto"><div style="width: 2000px">in a box</div></div>
<svg width="90" height="90"><rect width="90" height="90" fill="#000"/><text x="9" y="40" fill="#222">unread</text></svg>
<script>console.error("wrong")</script>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a browser for all tests of this file."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium here")
    with Browser(executable) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the page of a run, with long names, and that of an evaluation."""
    folder = tmp_path_factory.mktemp("pages")
    names = [f"a rather_long_name_of_a_photo_without_a_break_{index:02}.png" for index in range(60)]
    result = classified(("ant", "a_rather_long_name_of_a_class_without_a_break", "wasp"), paths=photos(folder, names))
    scores = Scores(result.outputs, result.targets, result.paths, model="tiny", data="/a/rather/long/path" * 9)
    return {
        "run": write_report(result, folder / "run.html"),
        "evaluation": write_report(replace(result.validation, scores=scores), folder / "evaluation.html"),
    }


def test_browser_inspection_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(FAULTY)
    browser.open(page, 360)
    problems = browser.inspect()
    assert [text.partition(":")[0] for text in problems["contrast"]] == ['p. "pale"', 'text. "unread"']
    assert [text.partition(":")[0] for text in problems["overflow"]] == ["page", 'div. "wide"']
    assert len(problems["pictures"]) == 2
    assert any("wrong" in text for text in problems["console"])


@pytest.mark.parametrize("name", ["run", "evaluation"])
def test_write_report_page_is_legible_at_every_width_and_in_both_schemes(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.open(pages[name], width, scheme)
            browser.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
            assert browser.inspect() == {"overflow": [], "pictures": [], "contrast": [], "console": []}, (width, scheme)


@pytest.mark.parametrize("name", ["run", "evaluation"])
def test_write_report_page_fits_on_paper_whatever_the_screen_prefers(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], PAPER_WIDTH, "dark", medium="print")
    assert browser.inspect() == {"overflow": [], "pictures": [], "contrast": [], "console": []}
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_write_report_tables_sort_by_a_click(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], 1280)
    column = "[...document.querySelectorAll('#classes tbody')[0].rows].map(row => row.cells[1].textContent)"
    click = "document.querySelectorAll('#classes thead th')[1].querySelector('button').click()"
    original = browser.evaluate(column)
    browser.evaluate(click)
    assert browser.evaluate(column) == sorted(original, key=float, reverse=True)
    browser.evaluate(click)
    assert browser.evaluate(column) == sorted(original, key=float)
    browser.evaluate(click)
    assert browser.evaluate(column) == original
    assert len(set(original)) == 3


def test_write_report_page_reads_the_same_without_scripts(browser: Browser, pages: dict[str, Path]) -> None:
    texts = []
    for scripts in (True, False):
        browser.open(pages["run"], 1280, scripts=scripts)
        texts.append(browser.evaluate("document.querySelector('main').innerText"))
    assert texts[0] == texts[1]

"""Pages are written whole or not at all."""

import os
from pathlib import Path

import pytest
from jinja2 import Template, UndefinedError

from regraft.errors import RunError
from regraft.report.html import _environment, render, write_page
from regraft.report.pictures import Picture
from report.results import Page


def test_write_page_that_fails_leaves_the_previous_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_page(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write the report '.*report\.html': No space left .* previous one is as"
    ):
        write_page(path, "after")
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_render_needs_every_variable() -> None:
    with pytest.raises(UndefinedError):
        render("run.html", result=None)


PARTS = """{% extends "base.html" %}
{% from "parts.html" import data_table, figure, findings, notice, picture_grid, tile %}
{% block title %}parts{% endblock %}
{% block main %}
<dl class="tiles">{{ tile("Accuracy", "93 %", "of <5> photos") }}</dl>
{% call notice("Look", "warning") %}<p>{{ text }}</p>{% endcall %}
{{ data_table([("class", "text"), ("photos", "number"), ("time", "number")], rows, "By class") }}
{{ picture_grid(pictures) }}
{{ findings([("<b>", "a & b")]) }}
{% endblock %}"""


def test_render_parts_show_plain_values_and_escape_them() -> None:
    page = Page(
        _parts().render(
            written="",
            text="<i>",
            rows=[("<ant>", 1234, ("1 min 2 s", 62.0)), ("bee", 0.25, None)],
            pictures=[Picture((None, "data:image/jpeg;base64,AA"), 'an "ant"', ("is <ant>",), "1.jpg")],
        )
    )
    assert "<ant> 1,234 1 min 2 s bee 0.25 –" in page.text
    assert [cell.get("data-value") for cell in page.all("td")] == ["1234", "62.0", "0.25", None]
    assert [image["alt"] for image in page.all("img")] == ['an "ant"']
    assert "the file is gone or can no longer be read is <ant> 1.jpg" in page.text
    assert all(text in page.text for text in ("93 % of <5> photos", "Look <i>", "<b> a & b"))
    assert not page.all("i")
    assert not page.all("b")


def _parts() -> Template:
    return _environment().from_string(PARTS)

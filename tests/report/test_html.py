"""Pages are written whole or not at all."""

import os
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from regraft.errors import RunError
from regraft.report.html import render, write_page


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

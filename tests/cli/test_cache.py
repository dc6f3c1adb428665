"""`regraft cache`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regraft.cli.app import app
from regraft.frontier.cache.store import Store
from training.factories import run, write_photos


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_cli_cache_lists_and_clears_what_is_kept(tmp_path: Path) -> None:
    assert call("list").startswith("0 entries, 0.0 MiB of 20 GiB")
    run(write_photos(tmp_path))
    folder = Store().folder
    listed = call("list")
    assert listed.count("12 photos × 1 at 'relu' in its forward") == 2
    assert f"in {folder}" in listed
    found = json.loads(call("list", "--json"))
    assert found["bytes"] == sum(entry["bytes"] for entry in found["entries"]) > 0
    assert len(found["entries"]) == 2
    (folder / "somebody's").mkdir()
    assert "freed" in call("clear")
    assert [path.name for path in folder.iterdir()] == ["somebody's"]
    assert json.loads(call("clear", "--json"))["bytes"] == 0


def test_cli_cache_takes_a_folder_that_was_never_made_as_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "none"))
    assert call("list").startswith("0 entries")
    assert call("clear").startswith("freed 0.0 MiB")

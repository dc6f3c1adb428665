"""`regraft predict`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.bad_folders import a_file, empty, missing
from hostile.crafted import write_with
from scene import Cli, assert_refused, nothing_written, only_json


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (missing, ("no file or folder '", "bad' (looked from ")),
        (empty, ("no photos in '", "bad'")),
        (a_file, ("none of 1 files can be read as a photo", "bad', for instance, not an image")),
    ],
    ids=["missing", "empty", "no photo"],
)
def test_cli_predict_refuses_a_folder_with_nothing_to_predict(
    make: Callable[[Path], None], parts: tuple[str, ...], workplace: Path, cli: Cli, saved: Path
) -> None:
    make(workplace / "bad")
    with nothing_written():
        assert_refused(cli("predict", saved, workplace / "bad", "--trust-code"), *parts)


def test_cli_predict_skips_unreadable_files_among_good_ones(
    cli: Cli, saved: Path, photos: Path, workplace: Path
) -> None:
    (workplace / "bad.jpg").write_text("no photo")
    with nothing_written():
        result = cli("predict", saved, workplace / "bad.jpg", photos / "cats" / "1.png", "--trust-code", "--json")
    assert [entry["path"] for entry in only_json(result.stdout)] == [str(photos / "cats" / "1.png")]
    assert result.stderr == f"skipped    {str(workplace / 'bad.jpg')!r}: not an image\n"


def test_cli_predict_and_inspect_show_class_names_as_text_and_never_as_paths(
    saved: Path, photos: Path, cli: Cli
) -> None:
    hostile = ["../outside", "\x1b[1mbold\x1b[0m <mark>1</mark>"]

    def change(known: dict[str, Any]) -> dict[str, str]:
        known["card"]["classes"] = hostile
        return {"regraft": json.dumps(known)}

    write_with(saved, Path("named.safetensors"), change)
    with nothing_written():
        words = ("named.safetensors", photos / "cats", "--trust-code")
        found = only_json(cli("predict", *words, "--json").stdout)
        assert {one["label"] for one in found} <= set(hostile)
        shown = cli("predict", *words)
        described = cli("inspect", "named.safetensors", "--trust-code")
        for result in (shown, described):
            assert result.exit_code == 0, result.stderr
            assert "\x1b" not in result.stdout

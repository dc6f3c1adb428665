"""`regraft train` on folders that are not what they should be, or oddly named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile.bad_folders import CASES
from scene import Cli, assert_refused, nothing_written, only_json, write_folder


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_cli_train_refuses_a_bad_folder(make: Callable[[Path], None], workplace: Path, cli: Cli) -> None:
    make(workplace / "bad")
    with nothing_written():
        assert_refused(cli("train", workplace / "bad", "--model", "no-such-model"), *CASES[make])


NAMES = [b"a b.png", b'it\'s "q".png', "é 猫.png".encode(), b"two\nlines.png", b"\xff.png", b"-h.png", b"[red]x[b].png"]


def test_cli_train_evaluate_and_predict_take_odd_file_and_class_names(
    workplace: Path, train_words: list[object], cli: Cli, tiny_net: str
) -> None:
    classes = ("it's <b>é\n", '[bold]-x "y"')
    data = write_folder(workplace / "odd data", classes, count=4)
    for name in classes:
        for file in NAMES:
            shutil.copy(data / name / "0.png", data / name / os.fsdecode(file))
    out = workplace / "odd 'out'"
    result = cli("train", data, *train_words[2:], "--out", out, "--validation-share", 0.5, "--json")
    assert result.exit_code == 0, result.stderr
    assert only_json(result.stdout)["classes"] == sorted(classes)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "metrics.csv", "config.toml", "report.html"}
    assert "two\nlines" not in result.stderr
    assert "\x1b" not in result.stderr

    shown = cli("predict", out / "model.safetensors", data, "--trust-code", "--json")
    assert {entry["path"] for entry in only_json(shown.stdout)} == {str(path) for path in data.rglob("*.png")}
    table = cli("predict", out / "model.safetensors", data, "--trust-code")
    assert len(table.stdout.splitlines()) == 1 + 2 * (4 + len(NAMES))
    measured = cli("evaluate", out / "model.safetensors", data, "--trust-code", "--json")
    assert only_json(measured.stdout)["count"] == 2 * ((4 + len(NAMES)) // 2 + 1)

"""`regraft predict`."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.bad_folders import a_file, empty, missing
from hostile.crafted import write_with
from regraft.cli.predict import _cell
from scene import Cli, assert_refused, nothing_written, only_json, write_photo


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


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_cli_predict_gives_a_csv_with_a_column_for_each_class(saved: Path, cli: Cli, photos: Path) -> None:
    names = ['a, "b".png', "new\nline.png", "=1+1.png"]
    for name in names:
        write_photo(Path(name))
    words = ("predict", saved, *names, "photos/cats", "--trust-code")
    expected = only_json(cli(*words, "--json", "--top", 2).stdout)
    result = cli(*words, "--csv", "--out", "all.csv")
    rows = table(result.stdout)
    assert Path("all.csv").read_bytes().decode() == result.stdout
    assert "\r" not in result.stdout
    assert [*rows[0]] == ["path", "label", "probability", "cats", "dogs"]
    assert [row["path"] for row in rows] == [*names[:2], "./=1+1.png", *(f"photos/cats/{n}.png" for n in range(6))]
    for row, one in zip(rows, expected, strict=True):
        shares = {entry["label"]: entry["probability"] for entry in one["top"]}
        assert (row["label"], float(row["probability"])) == (one["label"], one["probability"])
        assert {name: float(row[name]) for name in shares} == shares
    best = table(cli(*words, "--csv", "--top", 2).stdout)
    assert [*best[0]] == ["path", "label", "probability", "label_2", "probability_2"]
    assert [row["label_2"] for row in best] == [one["top"][1]["label"] for one in expected]


def test_cli_predict_writes_a_file_whole_or_not_at_all(
    saved: Path, cli: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("predict", saved, "photos", "--trust-code")
    result = cli(*words, "--out", "new.json")
    assert result.stdout == "predictions of 12 photos: new.json\n"
    assert only_json(Path("new.json").read_text()) == only_json(cli(*words, "--json").stdout)
    Path("folder.csv").mkdir()
    with nothing_written():
        assert_refused(cli(*words, "--out", "new.json"), "'new.json' exists. Choose another --out, or pass --overwrite")
        assert_refused(cli(*words, "--out", "new.txt"), "ends in '.txt', expected a file that ends in .csv or .json")
        assert_refused(cli(*words, "--out", "no/new.csv"), "no folder 'no' to write 'new.csv' into")
        assert_refused(cli(*words, "--out", "folder.csv", "--overwrite"), "'folder.csv' is a folder")
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert_refused(cli(*words, "--out", "new.json", "--overwrite"), "No space left", code=1)


def test_cli_predict_takes_patterns_that_the_shell_has_left_alone(saved: Path, cli: Cli, photos: Path) -> None:
    result = cli("predict", saved, "photos/*/[12].png", "--trust-code", "--json")
    paths = [f"photos/{name}/{number}.png" for name in ("cats", "dogs") for number in (1, 2)]
    assert [one["path"] for one in only_json(result.stdout)] == paths
    assert_refused(cli("predict", saved, "photos/*.jpg", "--trust-code"), "no file or folder 'photos/*.jpg'")


@pytest.mark.parametrize(
    ("name", "cell"), [("=A1", "'=A1"), ("@x", "'@x"), ("-10", "-10"), ("+1.5", "+1.5"), ("-x", "'-x"), ("a=b", "a=b")]
)
def test_cli_predict_gives_no_spreadsheet_a_formula(name: str, cell: str) -> None:
    assert _cell(name) == cell


def test_cli_predict_gives_the_numbers_of_a_regression_as_csv(cli: Cli, photos: Path, tiny_net: str) -> None:
    Path("t.csv").write_text(
        "path,target\n" + "".join(f"photos/{c}/{n}.png,{n}\n" for c in ("cats", "dogs") for n in range(6))
    )
    words = ("train", "t.csv", "--model", tiny_net, "--weights", "none", "--epochs", 1, "--trust-code", "--out", "run")
    assert cli(*words).exit_code == 0
    words = ("predict", "run/model.safetensors", "photos", "--trust-code")
    values = [one["value"] for one in only_json(cli(*words, "--json").stdout)]
    assert [float(row["value"]) for row in table(cli(*words, "--csv").stdout)] == values

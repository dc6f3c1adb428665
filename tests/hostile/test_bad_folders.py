"""Folders that are not what they should be: `train`, `evaluate` and `predict` say so, and write nothing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.testing
from scene import Recorder, assert_refused, nothing_written, only_json, write_folder, write_photo

import regraft
from regraft.errors import ConfigError, DataError

Cli = Callable[..., typer.testing.Result]
Fit = Callable[..., regraft.FitResult]


def missing(root: Path) -> None:
    pass


def empty(root: Path) -> None:
    root.mkdir()


def a_file(root: Path) -> None:
    root.write_text("photos")


def loose_files(root: Path) -> None:
    write_photo(root / "1.png")


def one_class(root: Path) -> None:
    write_folder(root, ("cats",))


def an_empty_class(root: Path) -> None:
    write_folder(root)
    (root / "emus").mkdir()


def only_hidden_photos(root: Path) -> None:
    write_folder(root)
    write_photo(root / "emus" / ".1.png")


def one_photo(root: Path) -> None:
    write_folder(root)
    write_photo(root / "emus" / "1.png")


def other_names_in_val(root: Path) -> None:
    write_folder(root / "train", ("cats", "dogs"))
    write_folder(root / "val", ("cats", "dog"))


def val_without_train(root: Path) -> None:
    write_folder(root / "val")


def a_name_in_no_encoding(root: Path) -> None:
    write_folder(root, ("cats", os.fsdecode(b"d\xffgs")))


CASES = {
    missing: ("no folder '", "bad' (looked from ", "Give the folder that holds your photos"),
    empty: ("bad' has nothing in it", "Expected a folder of photos for each class"),
    a_file: ("bad' is a file", "expected a folder with a folder of photos per class"),
    loose_files: ("bad' has 1 files but no folders in it", "Expected a folder of photos for each class"),
    one_class: ("bad' has one class only ('cats')", "two or more folders"),
    an_empty_class: ("no photos for 'emus' in '", "bad'", "Add some, or remove the folder"),
    only_hidden_photos: ("no photos for 'emus' in '", "bad'"),
    one_photo: ("only one photo for 'emus' in '", "bad'", "training and validation need one each", "Add photos"),
    other_names_in_val: (
        "the classes differ: only in '",
        "train': 'dogs'; only in '",
        "val': 'dog'",
        "Both need the same folders",
    ),
    val_without_train: ("bad' has 'val/' but no 'train/'", "Add it, or name its folder"),
    a_name_in_no_encoding: ("the folder 'd\\udcffgs' in '", "bad'", "no UTF-8", "rename it"),
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_training_on_a_bad_folder_is_refused(make: Callable[[Path], None], workplace: Path, cli: Cli) -> None:
    make(workplace / "bad")
    with nothing_written():
        assert_refused(cli("train", workplace / "bad", "--model", "no-such-model"), *CASES[make])


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_the_api_raises_the_same(make: Callable[[Path], None], workplace: Path, fit: Fit) -> None:
    make(workplace / "bad")
    with nothing_written(), pytest.raises(DataError) as caught:
        fit(workplace / "bad", out="run")
    for part in CASES[make]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (missing, ("no folder '", "bad' (looked from ", "Give the folder that holds your photos")),
        (empty, ("no photos in '", "bad'", "Expected a folder for each of 'cats', 'dogs'")),
        (a_file, ("bad' is a file", "expected a folder")),
        (
            lambda root: write_folder(root, ("cats", "emus", "yaks")),
            ("bad' has folders that are not classes of the model: 'emus', 'yaks'", "The model has 'cats', 'dogs'"),
        ),
        (lambda root: (root / "cats").mkdir(parents=True), ("no photos in '", "bad'")),
        (
            lambda root: write_photo(root / "cats" / "1.png").write_text("no photo"),
            ("none of 1 files can be read as a photo", "1.png', for instance, not an image"),
        ),
    ],
    ids=["missing", "empty", "a file", "unknown classes", "an empty class", "nothing readable"],
)
def test_measuring_on_a_bad_folder_is_refused(
    make: Callable[[Path], object], parts: tuple[str, ...], workplace: Path, cli: Cli, saved: Path
) -> None:
    make(workplace / "bad")
    with nothing_written():
        assert_refused(cli("evaluate", saved, workplace / "bad", "--trust-code"), *parts)


def test_some_of_the_classes_are_enough_to_measure_on(workplace: Path, saved: Path) -> None:
    model = regraft.load(saved, trust_code=True)
    metrics = regraft.evaluate(model, write_folder(workplace / "some", ("dogs",)))
    assert [(found.name, found.count) for found in metrics.per_class] == [("cats", 0), ("dogs", 6)]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (missing, ("no file or folder '", "bad' (looked from ")),
        (empty, ("no photos in '", "bad'")),
        (a_file, ("none of 1 files can be read as a photo", "bad', for instance, not an image")),
    ],
    ids=["missing", "empty", "no photo"],
)
def test_predicting_nothing_is_refused(
    make: Callable[[Path], None], parts: tuple[str, ...], workplace: Path, cli: Cli, saved: Path
) -> None:
    make(workplace / "bad")
    with nothing_written():
        assert_refused(cli("predict", saved, workplace / "bad", "--trust-code"), *parts)


def test_a_tenth_of_unreadable_files_is_skipped_and_told(fit: Fit, photos: Path) -> None:
    write_folder(photos, count=9)
    bad = [photos / "cats" / "zero.png", photos / "dogs" / "text.jpg"]
    bad[0].write_bytes(b"")
    bad[1].write_text("no photo")
    told = Recorder()
    result = fit(progress=told, validation_share=0.3)
    reasons = {found.path: found.reason for found in result.plan.unreadable}
    assert reasons == {bad[0]: "the file is empty", bad[1]: "not an image"}
    assert [line for line in told.lines if line.startswith("skipped")] == [
        f"skipped    {str(found.path)!r}: {found.reason}" for found in result.plan.unreadable
    ]
    assert (result.plan.train_count or 0) + (result.plan.validation_count or 0) == 18


def test_more_than_a_tenth_stops_unless_more_is_allowed(fit: Fit, photos: Path) -> None:
    for name in "abc":
        (photos / "cats" / f"{name}.jpg").write_text("no photo")
    with nothing_written(), pytest.raises(DataError, match=r"3 of 15 files cannot be read \('.*a\.jpg': not an image"):
        fit(out="run")
    with pytest.raises(DataError, match=r"Repair or remove them, or allow more with --max-unreadable \(now 0\.1\)"):
        fit()
    assert len(fit(max_unreadable=0.2).plan.unreadable) == 3


def test_a_class_without_a_readable_photo_stops_whatever_is_allowed(fit: Fit, photos: Path) -> None:
    for photo in (photos / "cats").iterdir():
        photo.write_text("no photo")
    with nothing_written(), pytest.raises(DataError, match=r"none of the photos of 'cats' can be read\. Add some"):
        fit(max_unreadable=1.0, out="run")


def test_no_readable_photo_at_all_stops(fit: Fit, photos: Path) -> None:
    for photo in photos.rglob("*.png"):
        photo.write_text("no photo")
    with nothing_written(), pytest.raises(DataError, match=r"none of 10 files can be read as a photo: '.*', for inst"):
        fit(max_unreadable=1.0, out="run")


NAMES = [b"a b.png", b'it\'s "q".png', "é 猫.png".encode(), b"two\nlines.png", b"\xff.png", b"-h.png", b"[red]x[b].png"]


def test_odd_file_and_class_names_go_all_the_way(
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
    assert only_json(measured.stdout)["count"] == 2 * (4 + len(NAMES))


@pytest.mark.parametrize("option", ["data", "out"])
def test_a_path_that_the_options_file_cannot_hold_is_refused(
    option: str, fit: Fit, photos: Path, workplace: Path
) -> None:
    odd = os.fsdecode(b"odd\xff")
    shutil.copytree(photos, workplace / odd)
    shutil.copytree(photos, workplace / "plain")
    paths = {"data": workplace / "plain", "out": "run", option: odd}
    with (
        nothing_written(),
        pytest.raises(ConfigError, match=rf"'{option}' cannot be 'odd\\udcff': .* no UTF-8.*rename"),
    ):
        fit(paths["data"], out=paths["out"])


def test_pipes_and_folders_named_like_photos_are_not_opened(fit: Fit, photos: Path) -> None:
    os.mkfifo(photos / "cats" / "pipe.png")
    (photos / "dogs" / "folder.png").mkdir()
    unreadable = fit().plan.unreadable
    assert [(found.path.name, found.reason) for found in unreadable] == [("pipe.png", "not a file")]


def test_links_that_lead_nowhere_or_in_circles_do_no_harm(fit: Fit, photos: Path) -> None:
    (photos / "cats" / "dangling.png").symlink_to("nowhere.png")
    (photos / "cats" / "circle").symlink_to("..")
    unreadable = fit().plan.unreadable
    assert [(found.path.name, found.reason) for found in unreadable] == [("dangling.png", "no such file")]


def test_unreadable_files_among_good_ones_are_skipped_when_predicting(
    cli: Cli, saved: Path, photos: Path, workplace: Path
) -> None:
    (workplace / "bad.jpg").write_text("no photo")
    with nothing_written():
        result = cli("predict", saved, workplace / "bad.jpg", photos / "cats" / "1.png", "--trust-code", "--json")
    assert [entry["path"] for entry in only_json(result.stdout)] == [str(photos / "cats" / "1.png")]
    assert result.stderr == f"skipped    {str(workplace / 'bad.jpg')!r}: not an image\n"

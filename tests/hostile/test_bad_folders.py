"""Folders that are not what they should be: `train`, `evaluate` and `predict` say so, and write nothing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import regraft
from hostile.bad_folders import CASES
from regraft.errors import ConfigError, DataError
from scene import Fit, Recorder, nothing_written, write_folder


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_fit_refuses_a_bad_folder(make: Callable[[Path], None], workplace: Path, fit: Fit) -> None:
    make(workplace / "bad")
    with nothing_written(), pytest.raises(DataError) as caught:
        fit(workplace / "bad", out="run")
    for part in CASES[make]:
        assert part in str(caught.value)


def test_evaluate_takes_some_of_the_classes(workplace: Path, saved: Path) -> None:
    model = regraft.load(saved, trust_code=True)
    metrics = regraft.evaluate(model, write_folder(workplace / "some", ("dogs",)))
    assert [(found.name, found.count) for found in metrics.per_class] == [("cats", 0), ("dogs", 6)]


def test_fit_skips_a_tenth_of_unreadable_files_and_tells(fit: Fit, photos: Path) -> None:
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


def test_fit_stops_at_more_than_a_tenth_of_unreadable_files_unless_more_is_allowed(fit: Fit, photos: Path) -> None:
    for name in "abc":
        (photos / "cats" / f"{name}.jpg").write_text("no photo")
    with nothing_written(), pytest.raises(DataError, match=r"3 of 15 files cannot be read \('.*a\.jpg': not an image"):
        fit(out="run")
    with pytest.raises(DataError, match=r"Repair or remove them, or allow more with max_unreadable \(now 0\.1\)"):
        fit()
    assert len(fit(max_unreadable=0.2).plan.unreadable) == 3


def test_fit_stops_at_a_class_without_a_readable_photo_whatever_is_allowed(fit: Fit, photos: Path) -> None:
    for photo in (photos / "cats").iterdir():
        photo.write_text("no photo")
    with nothing_written(), pytest.raises(DataError, match=r"none of the photos of 'cats' can be read\. Add some"):
        fit(max_unreadable=1.0, out="run")


def test_fit_stops_where_no_photo_is_readable(fit: Fit, photos: Path) -> None:
    for photo in photos.rglob("*.png"):
        photo.write_text("no photo")
    with nothing_written(), pytest.raises(DataError, match=r"none of 10 files can be read as a photo: '.*', for inst"):
        fit(max_unreadable=1.0, out="run")


@pytest.mark.parametrize("option", ["data", "out"])
def test_fit_refuses_a_path_that_the_options_file_cannot_hold(
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


def test_fit_does_not_open_pipes_and_folders_named_like_photos(fit: Fit, photos: Path) -> None:
    os.mkfifo(photos / "cats" / "pipe.png")
    (photos / "dogs" / "folder.png").mkdir()
    unreadable = fit().plan.unreadable
    assert [(found.path.name, found.reason) for found in unreadable] == [("pipe.png", "not a file")]


def test_fit_takes_no_harm_from_links_that_lead_nowhere_or_in_circles(fit: Fit, photos: Path) -> None:
    (photos / "cats" / "dangling.png").symlink_to("nowhere.png")
    (photos / "cats" / "circle").symlink_to("..")
    unreadable = fit().plan.unreadable
    assert [(found.path.name, found.reason) for found in unreadable] == [("dangling.png", "no such file")]

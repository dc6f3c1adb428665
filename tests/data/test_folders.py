"""Folders and tables → listings."""

import os
from pathlib import Path

import pytest

from regraft.data.folders import list_data, list_labelled, list_regression, photos_in
from regraft.data.samples import Listing, Sample, stratified_split
from regraft.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number:03}.png" for number in range(count)]


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation"), ("Train", "VALID")])
def test_list_data_keeps_a_split_that_exists(train: str, val: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{train}/b/1.png", f"{train}/a/2.png", f"{train}/a/x/3.png", f"{val}/a/4.png", f"{val}/b/5.png")
    found = list_data(tmp_path)
    assert found.task == "classification"
    assert found.classes == ("a", "b")
    assert found.train == (
        Sample(tmp_path / train / "a/2.png", 0),
        Sample(tmp_path / train / "a/x/3.png", 0),
        Sample(tmp_path / train / "b/1.png", 1),
    )
    assert found.validation == (Sample(tmp_path / val / "a/4.png", 0), Sample(tmp_path / val / "b/5.png", 1))
    assert found.counts() == [("a", 2, 1), ("b", 1, 1)]
    assert found.split == f"as found in {train}/ and {val}/"


@pytest.mark.parametrize("root", ["", "train"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_list_data_keeps_a_share_of_each_class_for_validation(root: str, share: float, tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 10, "c": 97}
    for name, size in sizes.items():
        touch(tmp_path / root, *numbered(name, size))
    found = list_data(tmp_path, validation_share=share)
    for name, train, validation in found.counts():
        assert train + validation == sizes[name]
        assert train >= 1
        assert validation == max(1, min(round(sizes[name] * share), sizes[name] - 1))
    assert not {sample.path for sample in found.train} & {sample.path for sample in found.validation}


def test_list_data_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a", 30), *numbered("b", 30))
    assert list_data(tmp_path, seed=1) == list_data(str(tmp_path), seed=1)
    assert list_data(tmp_path, seed=1).validation != list_data(tmp_path, seed=2).validation


def test_list_data_moves_no_class_between_the_parts_for_a_new_one(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a", 30), *numbered("b", 30))
    before = {sample.path for sample in list_data(tmp_path).validation}
    touch(tmp_path, *numbered("c", 30))
    assert before < {sample.path for sample in list_data(tmp_path).validation}


def test_list_data_leaves_out_hidden_files_and_folders_and_loose_files(tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a", 2), *numbered("b", 2), "a/.hidden.png", "a/.cache/1.png", ".git/1.png", "README.md")
    found = list_data(tmp_path)
    assert found.classes == ("a", "b")
    assert {sample.path.name for sample in found.train + found.validation} == {"000.png", "001.png"}


def test_photos_in_lists_in_one_order_whatever_the_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "b.png", "a.png", "x/2.png", "x/1.png", "B.png", os.fsdecode(b"\xff.png"))
    names = [str(path.relative_to(tmp_path)) for path in photos_in(tmp_path)]
    assert names == ["B.png", "a.png", "b.png", os.fsdecode(b"\xff.png"), "x/1.png", "x/2.png"]
    real = os.walk
    monkeypatch.setattr(os, "walk", lambda folder: ((p, f, sorted(n, reverse=True)) for p, f, n in real(folder)))
    assert [str(path.relative_to(tmp_path)) for path in photos_in(tmp_path)] == names


def test_list_data_follows_linked_folders_and_files_and_no_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", *numbered("cats", 3))
    touch(tmp_path / "data", *numbered("dogs", 3))
    (tmp_path / "data" / "cats").symlink_to("../elsewhere/cats")
    (tmp_path / "data" / "dogs" / "link.png").symlink_to("000.png")
    (tmp_path / "data" / "dogs" / "circle").symlink_to("..")
    found = list_data(tmp_path / "data")
    assert [(name, train + validation) for name, train, validation in found.counts()] == [("cats", 3), ("dogs", 4)]


def test_photos_in_follows_links_wherever_they_lie_and_lists_no_photo_twice(tmp_path: Path) -> None:
    touch(tmp_path / "disk", *numbered("tabby", 2), *numbered("wild/lynx", 2))
    touch(tmp_path / "data", *numbered("cats", 2), *numbered("dogs", 2))
    cats = tmp_path / "data" / "cats"
    (cats / "more").symlink_to(tmp_path / "disk")
    (cats / "again").symlink_to(tmp_path / "disk" / "tabby")  # which `more` has listed, or will
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "disk" / "itself").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "wild" / "loop").symlink_to("loop")
    found = [os.path.realpath(path) for path in photos_in(cats)]
    expected = [*cats.glob("*.png"), *(tmp_path / "disk").rglob("[0-9]*.png")]
    assert sorted(found) == sorted(os.path.realpath(path) for path in [*expected, tmp_path / "disk/wild/loop"])
    assert photos_in(cats) == photos_in(cats)


@pytest.mark.parametrize(
    "name",
    [
        "Thumbs.db",
        "thumbs.db",
        "desktop.ini",
        "Desktop.ini",
        ".DS_Store",
        "._000.png",
        "__MACOSX/._000.png",
        "@eaDir/000.png",
        "Icon\r",
    ],
)
def test_list_data_takes_what_systems_leave_behind_for_no_photo_and_no_class(name: str, tmp_path: Path) -> None:
    touch(tmp_path, *numbered("a", 2), *numbered("b", 2), f"a/{name}", f"a/deep/{name}", name)
    found = list_data(tmp_path)
    assert found.classes == ("a", "b")
    assert {sample.path.name for sample in found.train + found.validation} == {"000.png", "001.png"}
    touch(tmp_path, f"c/{name}")
    with pytest.raises(DataError, match=r"no photos for 'c' in .*, not counting hidden and system files"):
        list_data(tmp_path)


@pytest.mark.parametrize("name", ["0.JPG", "0.JPEG", "0.Png", "0.jfif", "0", "0.jpg.download"])
def test_list_data_decides_nothing_by_the_ending_of_a_name(name: str, tmp_path: Path) -> None:
    touch(tmp_path, f"a/{name}", "a/1.png", "b/0.png", "b/1.png")
    assert [sum(counts) for _, *counts in list_data(tmp_path).counts()] == [2, 2]


def listing_of(tmp_path: Path, text: str) -> Listing:
    (tmp_path / "table.csv").write_text(text)
    return list_data(tmp_path / "table.csv")


def test_list_data_splits_a_table_where_it_does_not_say_how(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,{number / 2}\n" for number in range(20))
    found = listing_of(tmp_path, "path,target\n" + rows)
    assert (found.task, found.classes) == ("regression", None)
    assert (len(found.train), len(found.validation)) == (16, 4)
    samples = {sample.path: sample.target for sample in found.train + found.validation}
    assert samples == {tmp_path / f"{number}.png": number / 2 for number in range(20)}


def test_list_regression_keeps_the_split_of_a_table(tmp_path: Path) -> None:
    text = "split,target,path,note\nTrain,1,a.png,x\n val ,2,/abs/b.png,y\nvalidation,-3e2,c.png,z\n,9,d.png,\n"
    found = listing_of(tmp_path, text)
    assert found.train == (Sample(tmp_path / "a.png", 1.0),)
    assert found.validation == (Sample(Path("/abs/b.png"), 2.0), Sample(tmp_path / "c.png", -300.0))
    assert list_regression(tmp_path / "table.csv") == found.validation
    assert found.split == "as the column 'split' says"


@pytest.mark.parametrize("value", ["nan", "inf", "-Infinity", "1e999", "", "cat", "1,5"])
def test_list_data_refuses_what_is_no_finite_number_with_its_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"table\.csv', line 3: the target '.*' is not a number\. Expected a finite one"
    ):
        listing_of(tmp_path, f'path,target\na.png,1\nb.png,"{value}"\n')


def test_list_labelled_follows_the_classes_of_the_model(tmp_path: Path) -> None:
    touch(tmp_path, "dogs/1.png", "cats/2.png")
    assert list_labelled(tmp_path, ("dogs", "emus", "cats")) == (
        Sample(tmp_path / "cats/2.png", 2),
        Sample(tmp_path / "dogs/1.png", 0),
    )
    touch(tmp_path / "whole", "val/cats/1.png", "train/cats/2.png")
    assert list_labelled(tmp_path / "whole", ("cats",)) == (Sample(tmp_path / "whole/val/cats/1.png", 0),)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_stratified_split_of_numbers_keeps_order_and_loses_nothing(share: float) -> None:
    samples = [Sample(Path(f"{number}.png"), float(number)) for number in range(10)]
    train, validation = stratified_split(samples, share, 0)
    assert sorted(train + validation, key=lambda sample: sample.target) == samples
    assert list(train) == sorted(train, key=lambda sample: sample.target)
    assert len(validation) == {0.0: 1, 0.3: 3, 1.0: 9}[share]

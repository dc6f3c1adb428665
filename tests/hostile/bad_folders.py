"""Folders that are not what they should be, and what the refusal of each says."""

import os
from pathlib import Path

from scene import write_folder, write_photo


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
    one_photo: ("only one photo for 'emus' in '", "bad'", "cannot be both learned from and measured on", "Add photos"),
    other_names_in_val: (
        "the classes differ: only in '",
        "train': 'dogs'; only in '",
        "val': 'dog'",
        "Both need the same folders",
    ),
    val_without_train: ("bad' has 'val/' but no 'train/'", "Add it, or name its folder"),
    a_name_in_no_encoding: ("the folder 'd\\udcffgs' in '", "bad'", "no UTF-8", "rename it"),
}

"""List the photos of a folder or table with their targets and split, before any photo is opened."""

import csv
import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.card import Split
from regraft.errors import DataError

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
# Files of Windows, macOS, Synology and ext4; names in lower case.
# fmt: off
SYSTEM_FILES = frozenset((
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "$recycle.bin",
    "system volume information", "lost+found",
))
# fmt: on

Target = int | float
Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class Sample:
    """A photo and its target: a class index, or a number for regression."""

    path: Path
    target: Target


def size_of(sample: Sample) -> int:
    """Return the bytes of a photo's file; -1 where it cannot be read."""
    try:
        return sample.path.stat().st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class Listing:
    """The contents of a folder or a table.

    Attributes:
        root: The folder or the table.
        task: Classification (a folder per class) or regression (a table with a number per photo).
        classes: Class names in the order of their indices; None for regression.
        train: Training photos.
        validation: Validation photos.
        split: How the data was split, as text.
        draw: The draw of the validation photos; None if the data says itself which they are.
    """

    root: Path
    task: Task
    classes: tuple[str, ...] | None
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    split: str
    draw: Split | None = None

    def counts(self) -> list[tuple[str, int, int]]:
        """Count the photos of each class: (class, training photos, validation photos)."""
        train, validation = (Counter(sample.target for sample in part) for part in (self.train, self.validation))
        return [(name, train[index], validation[index]) for index, name in enumerate(self.classes or ())]


def list_data(path: str | os.PathLike[str], *, validation_share: float = 0.2, seed: int = 0) -> Listing:
    """List training and validation photos.

    Args:
        path: A folder with `train/` and `val/`, each with a folder per class; a folder with a folder per class, from
            which a stratified share is held out for validation; or a `.csv` table with the columns `path` (relative to
            the table) and `target` (a number), and optionally `split` (`train` or `val`).
        validation_share: Share of each class that is held out for validation if the data has no split.
        seed: Random seed of that split.

    Raises:
        DataError: The folder is missing or empty, has a single class or an empty class, or training and validation
            have different classes.
    """
    root = Path(path)
    if root.suffix.lower() == ".csv":
        return _list_table(root, validation_share, seed)
    _require_folder(root)
    train_folder, validation_folder = _find(root, TRAIN_NAMES), _find(root, VALIDATION_NAMES)
    if train_folder is None:
        if validation_folder is not None:
            raise DataError(f"'{root}' has '{validation_folder.name}/' but no 'train/'. Add it, or name its folder.")
        return _split_folder(root, root, validation_share, seed)
    if validation_folder is None:
        return _split_folder(root, train_folder, validation_share, seed)
    classes = _class_names(train_folder)
    validation_classes = _class_names(validation_folder)
    if set(classes) != set(validation_classes):
        raise DataError(
            f"the classes differ: only in '{train_folder}': {_names(set(classes) - set(validation_classes))}; only in "
            f"'{validation_folder}': {_names(set(validation_classes) - set(classes))}. Both need the same folders."
        )
    train, validation = _samples(train_folder, classes), _samples(validation_folder, classes)
    split = f"as found in {train_folder.name}/ and {validation_folder.name}/"
    return Listing(root, "classification", classes, train, validation, split)


def list_labelled(path: str | os.PathLike[str], classes: Sequence[str]) -> tuple[Sample, ...]:
    """List photos in folders that are named after the classes of a model.

    Args:
        path: A folder with a folder per class, or one that holds such a folder named `val/`.
        classes: The model's class names; not every class needs a folder.

    Raises:
        DataError: The folder is missing or empty, or a folder is not a class of the model.
    """
    root = Path(path)
    _require_folder(root)
    folder = _find(root, VALIDATION_NAMES) or root
    names = [entry.name for entry in _subfolders(folder)]
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(
            f"'{folder}' has folders that are not classes of the model: {_names(set(unknown))}. "
            f"The model has {', '.join(map(repr, classes))}. Give a folder that holds folders of those names."
        )
    samples = tuple(Sample(file, classes.index(name)) for name in names for file in photos_in(folder / name))
    if not samples:
        raise DataError(f"no photos in '{folder}'. Expected a folder for each of {', '.join(map(repr, classes))}.")
    return samples


def list_regression(path: str | os.PathLike[str]) -> tuple[Sample, ...]:
    """List the photos and targets of a `.csv` table: those of the split `val`, or all without a split.

    Raises:
        DataError: The table is missing, empty or malformed.
    """
    rows = _read_table(Path(path))
    return tuple(sample for sample, split in rows if split == "val") or tuple(sample for sample, _ in rows)


def photos_in(folder: Path) -> list[Path]:
    """List all files below a folder in a fixed order, without hidden files and system files.

    Links to folders are followed, except to folders that are already listed and to parents of the link.
    """
    return _photos_below(folder, (), set())


def _photos_below(folder: Path, parents: tuple[Path, ...], seen: set[str]) -> list[Path]:
    """List files below a folder, those in linked folders last.

    Args:
        folder: Folder to list.
        parents: Resolved paths of the folders whose links led here.
        seen: Resolved paths of the folders that are already listed; newly listed ones are added.
    """
    photos, links = [], []
    parents = (*parents, folder.resolve())
    for parent, folders, files in os.walk(folder):
        resolved = os.path.realpath(parent)
        if resolved in seen:
            folders.clear()
            continue
        seen.add(resolved)
        folders[:] = sorted(name for name in folders if not _is_ignored(name))
        photos += [Path(parent, name) for name in sorted(files) if not _is_ignored(name)]
        links += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
    for link in links:
        target = link.resolve()
        if not any(path.is_relative_to(target) for path in parents):
            photos += _photos_below(link, parents, seen)
    return photos


def _is_ignored(name: str) -> bool:
    """Return whether a file or folder is hidden or a system file."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def stratified_split(
    samples: Sequence[Sample], share: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split off a random share of each class (of everything for regression): at least one sample, and never all."""
    groups: dict[Target, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.target if isinstance(sample.target, int) else 0, []).append(sample)
    kept: set[Sample] = set()
    for target in sorted(groups):
        group = groups[target]
        count = min(max(1, round(len(group) * share)), len(group) - 1)
        kept.update(random.Random(f"{seed}/{target}").sample(group, count))
    return tuple(s for s in samples if s not in kept), tuple(s for s in samples if s in kept)


def held_out(samples: Sequence[Sample], draw: Split | None) -> tuple[Sample, ...] | None:
    """Return those of the samples that an earlier draw held out; None if it was a draw from other samples."""
    if draw is None or _draw_of(samples, draw.share, draw.seed) != draw:
        return None
    return stratified_split(samples, draw.share, draw.seed)[1]


def _draw_of(samples: Sequence[Sample], share: float, seed: int) -> Split:
    # Without the folders above, so that it is the same draw wherever the data lies.
    names = sorted(f"{sample.target} {sample.path.parent.name}/{sample.path.name}" for sample in samples)
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return Split(samples=digest, share=share, seed=seed)


def _require_folder(root: Path) -> None:
    if not root.exists():
        raise DataError(f"no folder '{root}' (looked from {Path.cwd()}). Give the folder that holds your photos.")
    if not root.is_dir():
        raise DataError(f"'{root}' is a file, expected a folder with a folder of photos per class, or a .csv table.")


def _find(root: Path, names: Sequence[str]) -> Path | None:
    return next((entry for entry in _subfolders(root) if entry.name.lower() in names), None)


def _subfolders(root: Path) -> list[Path]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _is_ignored(entry.name))
    return [root / name for name in names]  # the order of paths ignores case on Windows


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(entry.name for entry in _subfolders(folder))
    if not names:
        loose = len(photos_in(folder))
        contents = f"{loose} files but no folders" if loose else "nothing"
        raise DataError(f"'{folder}' has {contents} in it. Expected a folder of photos for each class.")
    if unnamed := [name for name in names if not _is_unicode(name)]:
        raise DataError(
            f"the folder {unnamed[0]!r} in '{folder}' has bytes in its name that are no UTF-8. The name of a class "
            "has to be text: rename it."
        )
    if len(names) == 1:
        raise DataError(
            f"'{folder}' has one class only ('{names[0]}'). Classification needs two or more folders, one per class."
        )
    return names


def _samples(folder: Path, classes: Sequence[str], *, at_least: int = 1) -> tuple[Sample, ...]:
    files = {name: photos_in(folder / name) for name in classes}
    if empty := [name for name, photos in files.items() if not photos]:
        raise DataError(
            f"no photos for {_names(set(empty))} in '{folder}', not counting hidden and system files. Add "
            "some, or remove the folder."
        )
    if few := [name for name, photos in files.items() if len(photos) < at_least]:
        raise DataError(
            f"only one photo for {_names(set(few))} in '{folder}': training and validation need one each. "
            "Add photos, or make folders train/ and val/."
        )
    return tuple(Sample(file, index) for index, name in enumerate(classes) for file in files[name])


def _split_folder(root: Path, folder: Path, share: float, seed: int) -> Listing:
    classes = _class_names(folder)
    samples = _samples(folder, classes, at_least=2)
    train, validation = stratified_split(samples, share, seed)
    split = f"{share:.0%} of each class kept for validation, drawn with seed {seed}"
    return Listing(root, "classification", classes, train, validation, split, _draw_of(samples, share, seed))


def _list_table(path: Path, share: float, seed: int) -> Listing:
    rows = _read_table(path)
    draw = None
    if any(split for _, split in rows):
        train = tuple(sample for sample, split in rows if split == "train")
        validation = tuple(sample for sample, split in rows if split == "val")
        split = "as the column 'split' says"
    else:
        samples = [sample for sample, _ in rows]
        train, validation = stratified_split(samples, share, seed)
        draw = _draw_of(samples, share, seed)
        split = f"{share:.0%} of the rows kept for validation, drawn with seed {seed}"
    if not train or not validation:
        raise DataError(f"'{path}' has {len(train)} rows for training and {len(validation)} for validation.")
    return Listing(path, "regression", None, train, validation, split, draw)


def _read_table(path: Path) -> list[tuple[Sample, str]]:
    if not path.is_file():
        raise DataError(f"no file '{path}' (looked from {Path.cwd()}). Give a .csv with the columns path,target.")
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"path", "target"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"'{path}' has the columns {reader.fieldnames}, expected path,target (and maybe split)."
                )
            for row in reader:
                rows.append(_read_row(path, reader.line_num, row))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is no .csv table in UTF-8: {error}.") from error
    if len(rows) < 2:
        raise DataError(f"'{path}' has {len(rows)} rows; training and validation need at least 2.")
    return rows


def _read_row(path: Path, line: int, row: dict[str, str]) -> tuple[Sample, str]:
    if not row["path"]:
        raise DataError(
            f"'{path}', line {line}: there is no path. Expected the path of a photo, relative to the table."
        )
    try:
        target = float(row["target"])
    except (TypeError, ValueError):
        target = math.nan
    if not math.isfinite(target):
        raise DataError(
            f"'{path}', line {line}: the target '{row['target'] or ''}' is not a number. Expected a finite one, as 3.5."
        )
    split = (row.get("split") or "").strip().lower()
    if split not in ("", "train", *VALIDATION_NAMES):
        raise DataError(f"'{path}', line {line}: the split '{split}' is neither 'train' nor 'val'.")
    return Sample(path.parent / row["path"], target), "val" if split in VALIDATION_NAMES else split


def _is_unicode(name: str) -> bool:
    return name.encode("utf-8", errors="ignore").decode("utf-8") == name


def _names(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"

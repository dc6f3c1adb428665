"""Which photos there are, also where training would refuse them, and folders that were probably meant otherwise."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.data.folders import list_data, photos_in
from regraft.data.hugging_face import list_datasets
from regraft.data.samples import TRAIN_NAMES, VALIDATION_NAMES, Listing, Sample, stratified_split
from regraft.data.shards.layout import find_shards, part_of
from regraft.data.system_files import is_ignored
from regraft.errors import DataError
from regraft.photo_checks.data_report import DataFinding, Severity

MAX_NAMED = 3
SWAPPED = 1.5  # times as many photos for validation as for training


@dataclass(frozen=True)
class FolderContents:
    """The photos of a folder, and what is odd about how they lie.

    Attributes:
        listing: All photos; it may have one class, or classes of one part only.
        findings: What is odd.
        is_usable: Whether `fit` takes the data.
    """

    listing: Listing
    findings: tuple[DataFinding, ...]
    is_usable: bool


def list_contents(data: Any, *, validation_share: float, seed: int) -> FolderContents:
    """List the photos of a folder, shards, a table, or datasets of Hugging Face.

    What training would refuse in a folder becomes a finding.

    Raises:
        DataError: The data is missing; it is a table or shards that training would refuse; or of another kind.
    """
    if not isinstance(data, (str, os.PathLike)):
        listing = list_datasets(data, validation_share, seed)
        if listing is None:
            raise DataError(
                f"data is a {type(data).__name__}, expected a folder, shards, a .csv table, or datasets of Hugging "
                "Face: the checks look at files."
            )
        return FolderContents(listing, (), is_usable=True)
    root = Path(data)
    is_folder = root.is_dir()
    try:
        listing = list_data(root, validation_share=validation_share, seed=seed)
    except DataError as error:
        if not is_folder or _has_shards(root):
            raise
        refusal = DataFinding("layout", "error", root, f"Training would refuse it: {error}", "Mend this first.")
        findings = _odd_folders(root)
        usable = [] if any(finding.severity == "error" for finding in findings) else [refusal]
        return FolderContents(_list_anyhow(root, validation_share, seed), (*usable, *findings), is_usable=False)
    findings = _odd_folders(root) if is_folder and not _has_shards(root) else []
    return FolderContents(listing, tuple(findings), is_usable=True)


def _has_shards(root: Path) -> bool:
    try:
        return bool(find_shards(root))
    except DataError:
        return True


def _list_anyhow(root: Path, share: float, seed: int) -> Listing:
    """List the photos of a folder that training would refuse."""
    train_folder, validation_folder = _part(root, TRAIN_NAMES), _part(root, VALIDATION_NAMES)
    parts = [folder for folder in (train_folder or (None if validation_folder else root), validation_folder) if folder]
    classes = tuple(sorted({entry.name for folder in parts for entry in _folders(folder) if photos_in(entry)}))

    def samples_in(folder: Path | None) -> tuple[Sample, ...]:
        if folder is None:
            return ()
        if not classes:
            return tuple(Sample(photo, 0) for photo in photos_in(folder))
        return tuple(Sample(photo, index) for index, name in enumerate(classes) for photo in photos_in(folder / name))

    if train_folder is None and validation_folder is None:
        train, validation = stratified_split(samples_in(root), share, seed)
        split = f"{share:.0%} of each class kept for validation, drawn with seed {seed}"
    else:
        train, validation = samples_in(train_folder), samples_in(validation_folder)
        split = "as found in the folders"
    return Listing(root, "classification", classes, train, validation, split)


def _part(root: Path, names: Sequence[str]) -> Path | None:
    return next((entry for entry in _folders(root) if entry.name.lower() in names), None)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_ignored(entry.name))


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_file() and not is_ignored(entry.name))


def _odd_folders(root: Path) -> list[DataFinding]:
    train, validation = _part(root, TRAIN_NAMES), _part(root, VALIDATION_NAMES)
    parts = [folder for folder in (train, validation) if folder is not None] or [root]
    findings = [finding for folder in parts for finding in _about_depth(folder, is_part=folder != root)]
    if train is not None and validation is not None:
        findings += _about_sizes(train, validation)
    elif train is not None and (test := _part(root, ("test", "testing"))) is not None:
        findings.append(
            _layout(
                "warning",
                test,
                f"'{test.name}/' is not used: a share of '{train.name}/' is kept for validation instead.",
                f"To validate on it, name it 'val'; else keep it for `regraft evaluate`: {test}.",
            )
        )
    if train is not None:
        others = [entry for entry in _folders(root) if entry not in parts and not part_of(entry.name)]
        if others and any(photos_in(entry) for entry in others):
            names = _named([f"{entry.name}/" for entry in others])
            findings.append(
                _layout(
                    "warning",
                    root,
                    f"Beside '{train.name}/' there are {names}, which are not used.",
                    "Move them out, or into the parts.",
                )
            )
    for folder in parts:
        findings += [*_about_loose_files(folder), *_about_names(folder)]
    return findings


def _about_depth(folder: Path, *, is_part: bool) -> Iterator[DataFinding]:
    """Look for classes that are not where they should be."""
    classes = _folders(folder)
    inner = [_innermost(entry) for entry in classes]
    if not classes or any(_files(entry) for entry in inner if entry in classes):
        named_as_parts = [entry for entry in classes if part_of(entry.name)]
        if len(classes) > 1 and len(named_as_parts) == len(classes):
            yield _as_parts(folder, classes, inner)
        return
    named_as_parts = [entry for entry in classes if part_of(entry.name)]
    if len(classes) == 1:
        target = inner[0] if _folders(inner[0]) else folder
        yield _layout(
            "error",
            folder,
            f"'{folder}' holds one folder only, '{classes[0].name}/', which holds folders: that is one too many.",
            f"Move {_named([f'{entry.name}/' for entry in _folders(target)])} up into '{folder.name}/'."
            if is_part
            else f"Give the inner folder instead: regraft check {target}",
        )
    elif len(named_as_parts) > 0:
        yield _as_parts(folder, classes, inner)
    elif all(_folders(entry) and all(part_of(child.name) for child in _folders(entry)) for entry in classes):
        example = classes[0] / _folders(classes[0])[0].name
        yield _layout(
            "error",
            folder,
            f"Each class holds the parts, as '{example.relative_to(folder)}/'; all of their photos would be mixed.",
            "Exchange the levels: train/CLASS/ and val/CLASS/.",
        )
    elif any(len(_folders(entry)) > 1 for entry in inner):
        children = [f"{entry.name}/{child.name}/" for entry in inner for child in _folders(entry)]
        yield _layout(
            "warning",
            folder,
            f"No class has photos of its own, only folders of photos, as {_named(children)}; those count as one class.",
            "If the inner folders are the classes, give the folder that holds them.",
        )


def _as_parts(folder: Path, classes: Sequence[Path], inner: Sequence[Path]) -> DataFinding:
    training = next((entry for entry in inner if part_of(entry.name) == "train"), None) or next(
        (deep for entry, deep in zip(classes, inner, strict=True) if part_of(entry.name) == "train"), inner[0]
    )
    within = _named([f"{entry.name}/" for entry in _folders(training)]) if _folders(training) else "photos"
    return _layout(
        "error",
        folder,
        f"{_named([f'{entry.name}/' for entry in classes])} would be the classes, but look like parts of the data. "
        f"'{training.relative_to(folder)}/' holds {within}.",
        f"Name the parts 'train' and 'val', with the classes in them; or give one part: regraft train {training}",
    )


def _innermost(folder: Path) -> Path:
    """Follow folders that hold nothing but one other folder."""
    while not _files(folder) and len(inside := _folders(folder)) == 1:
        (folder,) = inside
    return folder


def _about_sizes(train: Path, validation: Path) -> Iterator[DataFinding]:
    counts = [{entry.name: len(photos_in(entry)) for entry in _folders(folder)} for folder in (train, validation)]
    sizes = [sum(count.values()) for count in counts]
    if 0 < SWAPPED * sizes[0] < sizes[1]:
        yield _layout(
            "warning",
            train,
            f"'{validation.name}/' has {sizes[1]:,} photos and '{train.name}/' {sizes[0]:,}: they may be swapped.",
            "Exchange their names if so; most photos should be there to learn from.",
        )
    for folder, own, other, elsewhere in (
        (train, counts[0], counts[1], validation),
        (validation, counts[1], counts[0], train),
    ):
        for name in sorted(set(own) - set(other)):
            yield _layout(
                "error",
                folder / name,
                f"The class '{name}' is in '{folder.name}/' only ({own[name]:,} photos); '{elsewhere.name}/' lacks it.",
                f"Move some of its photos into '{elsewhere / name}', or the class out of '{folder.name}/'.",
            )


def _about_loose_files(folder: Path) -> Iterator[DataFinding]:
    files = _files(folder)
    if files and _folders(folder):
        yield _layout(
            "warning",
            folder,
            f"{len(files):,} files lie beside the classes, as '{files[0].name}', and are not used.",
            "Move photos into the folders of their classes.",
        )
    for entry in _folders(folder):
        if not photos_in(entry):
            yield _layout(
                "error",
                entry,
                f"The class '{entry.name}' in '{folder.name}/' has no photos.",
                "Add some, or remove it.",
            )


def _about_names(folder: Path) -> Iterator[DataFinding]:
    """Look for classes whose names are the same but for case, spaces and signs between words."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for entry in _folders(folder):
        plain = unicodedata.normalize("NFKC", entry.name).casefold()
        alike["".join(sign for sign in plain if sign.isalnum()) or plain].append(entry.name)
    for names in alike.values():
        if len(names) > 1:
            yield _layout(
                "error",
                folder / names[0],
                f"{' and '.join(map(repr, names))} are two classes, and probably one is meant.",
                "Put their photos into one folder.",
            )


def _layout(severity: Severity, path: Path, detail: str, suggestion: str) -> DataFinding:
    return DataFinding("layout", severity, path, detail, suggestion)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:MAX_NAMED]))
    return f"{shown} and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else shown

"""List the photos in shards with their classes, from headers and labels alone: no photo is read.

A tar shard has the layout of webdataset: the members of a sample share their name up to its first dot. `0001.jpg` is
the photo, and `0001.cls` (a class by index or name) or `0001.json` (with the key "label") says what it shows. Tables
are those of Hugging Face `datasets`. Labels are kept once each, and the path of a shard once for all of its photos, so
that a sample takes a few hundred bytes.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from regraft.data.samples import Listing, Sample, drawn_listing
from regraft.data.shards.layout import IMAGE_ENDINGS, SUFFIXES, TABLES
from regraft.data.shards.tables import TableRow, list_rows
from regraft.data.shards.tar import Entry, TarMember, list_members
from regraft.data.sources import ShardMember
from regraft.errors import DataError

NAMES_FILES = ("classnames.txt", "classes.txt")  # a class in each line, in the order of their indices
LABEL_KEYS = ("label", "cls", "class")  # in KEY.json
MAX_LABEL_BYTES = 2**20
MAX_SHOWN = 5

Label = int | str


@dataclass
class LabelledPhotos:
    """Photos with their labels as shards write them.

    Attributes:
        members: The photos.
        numbers: The number of the label of each photo; -1 for none.
        labels: Numbers of the labels.
        names: Names of the classes that the labels count; None if the shards do not say.
    """

    members: list[ShardMember] = field(default_factory=list)
    numbers: "array[int]" = field(default_factory=lambda: array("i"))
    labels: dict[Label, int] = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    def add(self, member: ShardMember, label: Label | None) -> None:
        """Add a photo."""
        self.members.append(member)
        self.numbers.append(-1 if label is None else self.labels.setdefault(label, len(self.labels)))

    def class_names(self, root: Path, names: tuple[str, ...] | None) -> dict[Label, str]:
        """Return the class of each label.

        Raises:
            DataError: A photo has no label, or one that is no class.
        """
        if without := self.numbers.count(-1):
            example = self.members[self.numbers.index(-1)]
            raise DataError(
                f"{without} of {len(self.members)} photos in '{root}' have no label, as '{example}'. Expected KEY.cls, "
                'or KEY.json with a "label", beside KEY.jpg in a tar shard, and a class in each row of a table. Add '
                "them, or remove these photos."
            )
        if len(kinds := {type(label) for label in self.labels}) > 1:
            examples = ", ".join(repr(next(label for label in self.labels if type(label) is kind)) for kind in kinds)
            raise DataError(f"some labels in '{root}' are numbers and some are names ({examples}). Use one kind.")
        if names is None:
            return {label: str(label) for label in self.labels}
        classes: dict[Label, str] = {}
        for label, number in self.labels.items():
            if isinstance(label, int) and 0 <= label < len(names):
                classes[label] = names[label]
            elif label in names:
                classes[label] = str(label)
            else:
                example = self.members[self.numbers.index(number)]
                raise DataError(
                    f"the label {label!r} of '{example}' is none of the {len(names)} classes "
                    f"({_some([*map(repr, names)])}), which count from 0. Mend it, or the names of the classes."
                )
        return classes

    def samples(self, classes: Mapping[Label, str], indices: Mapping[str, int]) -> tuple[Sample, ...]:
        """Return the photos with the indices of their classes."""
        targets = [indices[classes[label]] for label in self.labels]
        return tuple(Sample(member, targets[number]) for member, number in zip(self.members, self.numbers, strict=True))


def list_shards(root: Path, shards: Mapping[str, Sequence[Path]], share: float, seed: int) -> Listing:
    """List training and validation photos of a folder of shards.

    Args:
        root: The folder.
        shards: Its shards, as `find_shards` returns them. Without any for validation, those of `test` are taken, and
            without these a share is drawn.
        share: Share of each class that is drawn.
        seed: Random seed of that draw.

    Raises:
        DataError: A shard is damaged or ends early, a photo has no label, or one that is no class; there are fewer
            than two classes, or validation has others than training.
    """
    held = "validation" if "validation" in shards else "test"
    if "train" in shards and "" in shards:
        raise DataError(
            f"'{root}' has shards that are named train ('{shards['train'][0].name}') and others that are not "
            f"('{shards[''][0].name}'). Put train, validation or test into each name, or into none."
        )
    if not (training := shards.get("train") or shards.get("")):
        raise DataError(
            f"'{root}' has shards for {' and '.join(sorted(shards))}, and none for training. Add train-*.tar, or a "
            "folder train/."
        )
    train = _scan(training)
    train.names = train.names or _names_in(root)
    validation = _scan(shards[held]) if held in shards else None
    split = f"as found in the shards named train and {held}"
    if held != "test" and "test" in shards:
        split += ", without those named test"
    return listing_of(root, train, validation, share, seed, split=split)


def list_shards_labelled(
    root: Path, shards: Mapping[str, Sequence[Path]], classes: Sequence[str]
) -> tuple[Sample, ...]:
    """List the photos of a folder of shards for a model with these classes: those for validation, where there are any.

    Raises:
        DataError: A shard is damaged, or a label is not a class of the model.
    """
    part = _scan(
        shards.get("validation") or shards.get("test") or [file for files in shards.values() for file in files]
    )
    part.names = part.names or _names_in(root)
    return labelled(root, part, classes)


def members_of(shards: Mapping[str, Sequence[Path]]) -> list[ShardMember]:
    """List all photos of shards, with labels or without.

    Raises:
        DataError: A shard is damaged.
    """
    return _scan([file for files in shards.values() for file in files]).members


def find_member(path: Path) -> ShardMember | None:
    """Return the photo in a shard whose text is this path, as `train-000.tar/0001.jpg`; None if there is none."""
    shard = next((parent for parent in path.parents if parent.suffix.lower() in SUFFIXES and parent.is_file()), None)
    return next((one for one in members_of({"": [shard]}) if str(one) == str(path)), None) if shard else None


def listing_of(
    root: Path, train: LabelledPhotos, validation: LabelledPhotos | None, share: float, seed: int, *, split: str
) -> Listing:
    """Return the listing of two parts, or of one that is split.

    Raises:
        DataError: As of `list_shards`.
    """
    names = train.names
    classes = train.class_names(root, names)
    used = set(classes.values())
    order = [name for name in names if name in used] if names else [classes[label] for label in _sorted(train.labels)]
    if len(order) < 2:
        raise DataError(
            f"the photos for training in '{root}' show one class only ({order[0]!r}). Classification needs two or more."
        )
    indices = {name: index for index, name in enumerate(order)}
    samples = train.samples(classes, indices)
    if validation is None:
        counts = Counter(sample.target for sample in samples)
        if few := [name for name, index in indices.items() if counts[index] < 2]:
            raise DataError(
                f"only one photo for {_some([*map(repr, few)])} in '{root}': training and validation need one each. "
                "Add photos, or shards for validation."
            )
        return drawn_listing(root, tuple(order), samples, share, seed)
    others = validation.class_names(root, validation.names or names)
    if unknown := sorted({*others.values()} - used):
        raise DataError(
            f"the classes differ: no photo for training in '{root}' shows {_some([*map(repr, unknown)])}, and some for "
            "validation do."
        )
    return Listing(root, "classification", tuple(order), samples, validation.samples(others, indices), split)


def labelled(root: Path, part: LabelledPhotos, classes: Sequence[str]) -> tuple[Sample, ...]:
    """Return photos with the places of their classes among those of a model.

    Raises:
        DataError: A photo has no label, or one that is not a class of the model.
    """
    names = part.class_names(root, part.names)
    if unknown := sorted({*names.values()} - set(classes)):
        raise DataError(
            f"'{root}' has labels that are not classes of the model: {_some([*map(repr, unknown)])}. The model has "
            f"{_some([*map(repr, classes)])}. Name the classes in classnames.txt, or relabel them."
        )
    return part.samples(names, {name: index for index, name in enumerate(classes)})


def _scan(shards: Sequence[Path]) -> LabelledPhotos:
    part = LabelledPhotos()
    for shard in shards:
        count = len(part.members)
        if shard.suffix.lower() in TABLES:
            _scan_table(shard, part)
        else:
            _scan_tar(shard, part)
        if len(part.members) == count:
            raise DataError(f"the shard '{shard}' holds no photo. Write it again, or remove it.")
    return part


def _scan_table(shard: Path, part: LabelledPhotos) -> None:
    head, labels = list_rows(shard)
    if part.members and head.classes != part.names:
        raise DataError(f"'{shard}' names other classes than the shards before it. Write them with the same names.")
    part.names = head.classes
    for row, label in enumerate(labels):
        part.add(TableRow(shard, row), label)


def _scan_tar(shard: Path, part: LabelledPhotos) -> None:
    photos: dict[str, Entry] = {}
    labels: dict[str, Label] = {}
    seen: set[str] = set()
    with shard.open("rb", buffering=4096) as file:  # a header, and the label after it
        for entry in list_members(shard, file):
            folder, slash, name = entry.name.removeprefix("./").rpartition("/")
            stem, dot, ending = name.partition(".")
            if not stem or not dot or stem.startswith("__"):
                continue  # hidden, or about the shard
            key, ending = f"{folder}{slash}{stem}", ending.lower()
            is_photo = ending.rpartition(".")[2] in IMAGE_ENDINGS
            if not is_photo and ending not in ("cls", "json"):
                continue
            if entry.name in seen:
                raise DataError(
                    f"the shard '{shard}' holds '{entry.name}' twice. The photos of a shard need different names."
                )
            seen.add(entry.name)
            if is_photo:
                _add_photo(shard, photos, key, ending, entry)
            elif (label := _label_in(shard, file, entry, ending)) is not None and (
                ending == "cls" or key not in labels
            ):
                labels[key] = label
    if lonely := sorted(labels.keys() - photos.keys()):
        raise DataError(
            f"the shard '{shard}' has a label for '{lonely[0]}' and no photo. Add KEY.jpg (or another format) beside "
            "it."
        )
    for key, entry in photos.items():
        part.add(TarMember(shard, entry.name, entry.offset, entry.size), labels.get(key))


def _add_photo(shard: Path, photos: dict[str, Entry], key: str, ending: str, entry: Entry) -> None:
    """Add the photo of a sample; KEY.jpg goes before KEY.mask.png.

    Raises:
        DataError: Two photos have as much right to it.
    """
    if (other := photos.get(key)) is not None:
        is_plain, was_plain = "." not in ending, Path(other.name).name.count(".") == 1
        if is_plain == was_plain:
            raise DataError(
                f"the shard '{shard}' holds the photos '{other.name}' and '{entry.name}' of one sample. Give each a "
                "sample of its own, by a name that differs before the first dot."
            )
        if was_plain:
            return
    photos[key] = entry


def _label_in(shard: Path, file: BinaryIO, entry: Entry, ending: str) -> Label | None:
    """Read the label in KEY.cls or KEY.json; None without one.

    Raises:
        DataError: It is neither an integer nor a name.
    """
    file.seek(entry.offset)
    content = file.read(min(entry.size, MAX_LABEL_BYTES))
    try:
        text = content.decode().strip()
        if ending == "cls":
            return _int_or_text(text)
        value = json.loads(text)
        if isinstance(value, dict):
            value = next((value[key] for key in LABEL_KEYS if key in value), None)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the label '{shard}/{entry.name}' cannot be read: {error}. Expected an index, or a name in UTF-8."
        ) from error
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return value
    if value is None or isinstance(value, list):  # says something else of the photo
        return None
    raise DataError(f"the label in '{shard}/{entry.name}' is {value!r}, expected a class: an integer or a name.")


def _int_or_text(text: str) -> Label | None:
    return int(text) if re.fullmatch("-?[0-9]{1,9}", text) else text or None


def _names_in(root: Path) -> tuple[str, ...] | None:
    """Return the names of the classes that stand in a file beside the shards."""
    folder = root if root.is_dir() else root.parent
    for file in (folder / name for name in NAMES_FILES):
        if file.is_file():
            return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return None


def _sorted(labels: Mapping[Label, int]) -> Iterator[Label]:
    yield from sorted(labels, key=lambda label: (label, "") if isinstance(label, int) else (0, label))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")

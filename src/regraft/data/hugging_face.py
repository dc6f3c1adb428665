"""Datasets of Hugging Face that the caller has opened: rows with a photo and a class → listings, as of folders."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.data.samples import Listing, Sample
from regraft.data.shards.layout import part_of
from regraft.data.shards.listing import LabelledPhotos, labelled, listing_of
from regraft.data.shards.tables import checked_label, head_of
from regraft.data.sources import ShardMember
from regraft.errors import DataError

ROOT = Path("dataset")  # in messages


@dataclass(frozen=True, slots=True, eq=False)
class DatasetRow(ShardMember):
    """A row of a dataset with a column of photos that are not decoded."""

    dataset: Any
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.dataset.split or 'dataset'}/{self.row}"

    def count_bytes(self) -> int:
        """Return the number of rows, as the size of the photo is not known without reading it."""
        return len(self.dataset)

    def read(self) -> bytes:
        """Return the photo in this row, or in the file that the row names, as `imagefolder` does."""
        value = self.dataset[self.row][self.column]
        if value and value["bytes"] is None and value["path"]:
            return Path(value["path"]).read_bytes()
        if not value or value["bytes"] is None:
            raise DataError("the row has no photo")
        return value["bytes"]


def is_dataset(data: Any) -> bool:
    """Return whether this is a dataset of Hugging Face with random access, without a format or transform of its own."""
    library: Any = sys.modules.get("datasets")  # whoever has such a value has imported it
    return library is not None and isinstance(data, library.Dataset) and data.format["type"] is None


def list_datasets(data: Any, share: float, seed: int) -> Listing | None:
    """List the rows of a dataset that is split, of a pair (train, validation), or of a dict of parts; None for others.

    Raises:
        DataError: There is no column of photos or of classes, or the classes differ.
    """
    parts = _parts_of(data)
    if parts is None:
        return None
    train, validation = parts
    split = "as given"
    return listing_of(
        ROOT, _scan(train), _scan(validation) if validation is not None else None, share, seed, split=split
    )


def list_dataset_labelled(data: Any, classes: Sequence[str]) -> tuple[Sample, ...] | None:
    """List the rows of a dataset, or those for validation of a dict of parts, for a model; None for other data.

    Raises:
        DataError: A class is not one of the model.
    """
    parts = _parts_of(data)
    return None if parts is None else labelled(ROOT, _scan(parts[0] if parts[1] is None else parts[1]), classes)


def _parts_of(data: Any) -> tuple[Any, Any] | None:
    if is_dataset(data):
        return data, None
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(map(is_dataset, data)):
        return data[0], data[1]
    if isinstance(data, Mapping) and data and all(map(is_dataset, data.values())):
        named = {part_of(str(name)): part for name, part in data.items()}
        if "train" not in named:
            names = ", ".join(map(repr, data))
            raise DataError(f"the dataset has the parts {names}, expected 'train' and 'validation'. Rename them.")
        return named["train"], named.get("validation", named.get("test"))
    return None


def _scan(dataset: Any) -> LabelledPhotos:
    import datasets

    if len(dataset) == 0:
        raise DataError(f"a {type(dataset).__name__} of Hugging Face has no rows. Give one with photos in it.")
    head = head_of(str(ROOT), dataset.features.arrow_schema)
    photos = LabelledPhotos(names=head.classes)
    encoded = dataset.select_columns([head.image]).cast_column(head.image, datasets.Image(decode=False))
    labels: list[Any] = [None] * len(dataset)
    if head.label is not None:
        labels = dataset.select_columns([head.label]).with_format("arrow")[:][head.label].to_pylist()
    for row, label in enumerate(labels):
        photos.add(DatasetRow(encoded, head.image, row), checked_label(ROOT, head, label))
    return photos

"""What is learned from and measured on: folders, tables, datasets and loaders → batches."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from regraft.card import Preprocessing
from regraft.data.decode import Unreadable
from regraft.data.folders import Listing, Task, list_data
from regraft.data.photos import Photos, loader, read_photos
from regraft.data.transforms import augmentation
from regraft.errors import DataError
from regraft.progress import Progress
from regraft.training.config import TrainConfig


@dataclass(frozen=True)
class Material:
    """What is learned from and measured on.

    Attributes:
        train: Batches to learn from, in a new order each epoch.
        validation: Batches to measure on, in one order.
        task: Classification or regression.
        classes: Class names; None for regression.
        listing: What the folder held; None for datasets and loaders.
        paths: The validation photos, in order; empty for datasets that are no files.
        unreadable: Files that are skipped.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    task: Task
    classes: tuple[str, ...] | None
    listing: Listing | None = None
    paths: tuple[Path, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()


def list_if_folder(data: Any, config: TrainConfig) -> Listing | None:
    """List the photos where `data` names a folder or a table; None for a pair of datasets or loaders."""
    if isinstance(data, (str, Path)):
        return list_data(data, validation_share=config.validation_share, seed=config.seed)
    return None


def read_material(
    data: Any, listing: Listing | None, preprocessing: Preprocessing, config: TrainConfig, progress: Progress
) -> Material:
    """Decode the photos of a folder, or take datasets and loaders as they are."""
    if listing is None:
        return _given_material(data, config)
    parts, unreadable = [], []
    for samples, description in ((listing.train, "reading photos"), (listing.validation, "reading validation photos")):
        photos, failed = read_photos(
            samples, preprocessing, classes=listing.classes, description=description, progress=progress
        )
        parts.append(photos)
        unreadable += failed
    _require_readable(unreadable, len(listing.train) + len(listing.validation), config.max_unreadable)
    material = _photo_material(parts[0], parts[1], config)
    _require_all_classes(material.classes, parts[0])
    return Material(
        material.train,
        material.validation,
        listing.task,
        listing.classes,
        listing,
        tuple(sample.path for sample in parts[1].samples),
        tuple(unreadable),
    )


def _given_material(data: Any, config: TrainConfig) -> Material:
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise DataError(
            f"data is a {type(data).__name__}, expected a folder, a .csv table, or a pair (train, validation) of "
            "Datasets or DataLoaders."
        )
    train, validation = data
    if isinstance(train, Photos) and isinstance(validation, Photos):
        return _photo_material(train, validation, config)
    batches, measured = _batches(train, config, shuffle=True), _batches(validation, config, shuffle=False)
    for part, found in (("training", batches), ("validation", measured)):
        if isinstance(found, Sized) and len(found) == 0:
            raise DataError(f"the {part} data is empty. Give at least one batch.")
    _, targets = first_batch(batches)
    dataset = getattr(train, "dataset", train)
    if targets.is_floating_point():
        return Material(batches, measured, "regression", None)
    names = getattr(dataset, "classes", None)
    return Material(batches, measured, "classification", tuple(map(str, names)) if names else None)


def _photo_material(train: Photos, validation: Photos, config: TrainConfig) -> Material:
    changed = train.augmented(augmentation(config.augment, train.preprocessing))
    return Material(
        loader(changed, config.batch_size, shuffle_seed=config.seed, workers=config.workers),
        loader(validation, config.batch_size, workers=config.workers),
        "regression" if train.classes is None else "classification",
        train.classes,
        paths=tuple(sample.path for sample in validation.samples),
    )


def _batches(data: Any, config: TrainConfig, *, shuffle: bool) -> Iterable[Any]:
    if not isinstance(data, Dataset):
        if not isinstance(data, Iterable):
            raise DataError(
                f"a {type(data).__name__} is no data. Expected a Dataset, a DataLoader, or a list of batches."
            )
        return data
    count = len(data) if isinstance(data, Sized) else 0
    return DataLoader(
        data,
        config.batch_size,
        shuffle=shuffle,
        num_workers=config.workers or 0,
        generator=torch.Generator().manual_seed(config.seed),
        drop_last=shuffle and count > config.batch_size and count % config.batch_size == 1,  # batch norm needs two
    )


def first_batch(batches: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the first (inputs, targets), or say what else was there."""
    first = next(iter(batches), None)
    if not (isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(x, torch.Tensor) for x in first)):
        raise DataError(
            f"the training data yields {type(first).__name__}, expected pairs (inputs, targets) of tensors: "
            "let the dataset return tensors, as with torchvision.transforms.ToTensor()."
        )
    return first[0], first[1]


def _require_readable(unreadable: list[Unreadable], count: int, limit: float) -> None:
    if len(unreadable) > limit * count:
        examples = "; ".join(f"'{found.path}': {found.reason}" for found in unreadable[:3])
        raise DataError(
            f"{len(unreadable)} of {count} files cannot be read ({examples}). Repair or remove them, or allow more "
            f"with --max-unreadable (now {limit:g})."
        )


def _require_all_classes(classes: tuple[str, ...] | None, train: Photos) -> None:
    seen = {sample.target for sample in train.samples}
    if lost := [name for index, name in enumerate(classes or ()) if index not in seen]:
        raise DataError(f"none of the photos of {', '.join(map(repr, lost))} can be read. Add some that can.")

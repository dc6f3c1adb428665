"""What is learned from and measured on: folders, tables, datasets and loaders → batches."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from regraft.card import Preprocessing
from regraft.data.decode import Unreadable
from regraft.data.folders import Listing, Task, list_data
from regraft.data.photos import Photos, SeededShuffle
from regraft.data.transforms import augmentation
from regraft.errors import DataError
from regraft.frontier.key import checksum
from regraft.frontier.partition import Partition
from regraft.frontier.store import Store
from regraft.progress import Progress
from regraft.training.config import TrainConfig
from regraft.training.extract import Extractor
from regraft.training.features import FeatureBatches, Features
from regraft.training.loop import Inputs
from regraft.training.lost import Partial, tolerant_loader
from regraft.training.pixels import read_or_find_photos
from regraft.training.result import ComputedOnce

MEASURED_AT_A_TIME = 256


@dataclass(frozen=True)
class Frontier:
    """What is computed once, and what runs in every epoch.

    Attributes:
        parts: The two parts of the network.
        train: Features to learn from.
        validation: Features to measure on.
        sum: `checksum` of the constant part.
    """

    parts: Partition
    train: Features
    validation: Features
    sum: int

    @classmethod
    def of(cls, extractor: Extractor, features: Sequence[Features]) -> "Frontier":
        """Put together what an extractor computed for the photos to learn from and for those to measure on."""
        train, validation = features
        return cls(extractor.parts, train, validation, checksum(extractor.parts.prefix))

    def is_valid(self) -> bool:
        """Say whether the constant part is what it was when the features were computed."""
        return checksum(self.parts.prefix) == self.sum

    def summary(self, epochs: int) -> ComputedOnce:
        """Say what was computed once for so many epochs, and what that saved."""
        parts, both = self.parts, (self.train, self.validation)
        constant, live = parts.multiply_adds
        an_epoch_s = sum(part.cost_s / part.views for part in both)
        seconds = sum(part.seconds for part in both)
        return ComputedOnce(
            frontier=tuple((cut.place, cut.shape) for cut in parts.frontier),
            share=constant / max(constant + live, 1),
            views=self.train.views,
            bytes=sum(part.bytes for part in both),
            where=self.train.where,
            was_found=all(part.was_found for part in both),
            seconds=seconds,
            saved_s=max(0.0, epochs * an_epoch_s - seconds),
            note=parts.note,
        )

    def lines(self) -> list[str]:
        """Say what was computed once, a line each."""
        seconds = self.train.seconds + self.validation.seconds
        how = "found in the cache" if self.train.was_found and self.validation.was_found else "computed once"
        views = f", {self.train.views} versions of each photo" if self.train.views > 1 else ""
        kept = f"kept {self.train.where}"
        if self.train.precision != "full":
            error = max(self.train.error, self.validation.error)
            kept += f" as {self.train.precision} (wrong by {error:.2%} of the largest value at most)"
        return [f"frontier   {self.parts}", f"           {how} in {seconds:.1f} s{views}, {kept}"]


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
        photos: The photos to learn from and those to measure on, where the data is photos.
        frontier: What was computed once for all epochs; None where the whole network runs in each.
        not_once_because: Why it does; None where there is nothing to say.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    task: Task
    classes: tuple[str, ...] | None
    listing: Listing | None = None
    paths: tuple[Path, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    photos: tuple[Photos, Photos] | None = None
    frontier: Frontier | None = None
    not_once_because: str | None = None


def list_if_folder(data: Any, config: TrainConfig) -> Listing | None:
    """List the photos where `data` names a folder or a table; None for a pair of datasets or loaders."""
    if isinstance(data, (str, Path)):
        return list_data(data, validation_share=config.validation_share, seed=config.seed)
    return None


def read_material(
    data: Any,
    listing: Listing | None,
    preprocessing: Preprocessing,
    config: TrainConfig,
    progress: Progress,
    extractor: Extractor | None = None,
) -> Material:
    """Decode the photos of a folder, or take datasets and loaders as they are.

    With an extractor, the batches are of what its constant part gives for photos (`FeatureBatches`).
    """
    if listing is None:
        return _given_material(data, config, extractor)
    store = Store() if config.cache else None
    versions = (augmentation(config.augment, preprocessing, config.views), augmentation("none", preprocessing))
    photos, unreadable, features = [], [], []
    for samples, seen, description in (
        (listing.train, versions[0], "reading photos"),
        (listing.validation, versions[1], "reading validation photos"),
    ):
        if extractor is not None:
            found, part, failed = extractor.of_samples(samples, seen, listing.classes, description=description)
            features.append(found)
        else:
            part, failed = read_or_find_photos(
                samples, preprocessing, listing.classes, store, description=description, progress=progress
            )
        photos.append(part.augmented(seen))
        unreadable += failed
    _require_readable(unreadable, len(listing.train) + len(listing.validation), config.max_unreadable)
    frontier = Frontier.of(extractor, features) if extractor is not None else None
    material = _photo_material(photos[0], photos[1], config, frontier)
    _require_all_classes(material.classes, photos[0])
    return replace(material, task=listing.task, classes=listing.classes, listing=listing, unreadable=tuple(unreadable))


def again(material: Material, config: TrainConfig, extractor: Extractor | None) -> Material:
    """Return the same photos for a network whose flags have changed."""
    assert material.photos is not None
    features = [extractor.of_photos(part) for part in material.photos] if extractor is not None else None
    frontier = Frontier.of(extractor, features) if extractor is not None and features is not None else None
    fresh = _photo_material(*material.photos, config, frontier)
    return replace(material, train=fresh.train, validation=fresh.validation, frontier=frontier)


def _given_material(data: Any, config: TrainConfig, extractor: Extractor | None) -> Material:
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise DataError(
            f"data is a {type(data).__name__}, expected a folder, a .csv table, or a pair (train, validation) of "
            "Datasets or DataLoaders."
        )
    train, validation = data
    if isinstance(train, Photos) and isinstance(validation, Photos):
        train = train.augmented(augmentation(config.augment, train.preprocessing, config.views))
        features = [extractor.of_photos(part) for part in (train, validation)] if extractor is not None else []
        frontier = Frontier.of(extractor, features) if extractor is not None else None
        return _photo_material(train, validation, config, frontier)
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


def _photo_material(train: Photos, validation: Photos, config: TrainConfig, frontier: Frontier | None) -> Material:
    if frontier is not None:
        sampler = SeededShuffle(len(train), config.seed)
        batches: Iterable[Any] = FeatureBatches(frontier.train, train, config.batch_size, sampler)
        measured: Iterable[Any] = FeatureBatches(frontier.validation, validation, MEASURED_AT_A_TIME)
    else:
        batches = tolerant_loader(train, config.batch_size, shuffle_seed=config.seed, workers=config.workers)
        measured = tolerant_loader(validation, config.batch_size, workers=config.workers)
    return Material(
        batches,
        measured,
        "regression" if train.classes is None else "classification",
        train.classes,
        paths=tuple(sample.path for sample in validation.samples),
        photos=(train, validation),
        frontier=frontier,
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


def first_batch(batches: Iterable[Any]) -> tuple[Inputs, torch.Tensor]:
    """Take the first (inputs, targets), or say what else was there."""
    if isinstance(batches, FeatureBatches):
        return next(iter(batches))
    found = (batch.batch if isinstance(batch, Partial) else batch for batch in batches)
    first = next((batch for batch in found if batch is not None), None)
    return _pair(first, "training data")


def pairs_of(batches: Any) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Yield batches of a user's own, each checked.

    Raises:
        DataError: There is none, or one is no pair of tensors of the same length.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (torch.Tensor, np.ndarray)):
        raise DataError(
            f"a {type(batches).__name__} is no data. Expected a folder, a Dataset, a DataLoader, or a list of batches."
        )
    is_empty = True
    for batch in batches:
        is_empty = False
        yield _pair(batch, "data")
    if is_empty:
        raise DataError("the data is empty. Give at least one batch.")


def _pair(batch: Any, what: str) -> tuple[Inputs, torch.Tensor]:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, torch.Tensor) for x in batch)):
        raise DataError(
            f"the {what} yields {type(batch).__name__}, expected pairs (inputs, targets) of tensors: "
            "let the dataset return tensors, as with torchvision.transforms.ToTensor()."
        )
    inputs, targets = batch
    if 0 in (inputs.ndim, targets.ndim) or len(inputs) != len(targets) or not len(targets):
        raise DataError(
            f"the {what} yields inputs of shape {tuple(inputs.shape)} with targets of shape {tuple(targets.shape)}, "
            "expected (N, …) and (N,), N at least 1."
        )
    if targets.dtype == torch.bool or targets.is_complex():
        raise DataError(
            f"the {what} yields targets of {targets.dtype}, expected int64 classes or floats. Convert them."
        )
    return inputs, targets


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

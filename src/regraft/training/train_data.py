"""Training and validation batches, from folders, tables, datasets or loaders."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from regraft.card import Preprocessing
from regraft.data.decoding.files import Unreadable
from regraft.data.folders import list_data
from regraft.data.hugging_face import list_datasets
from regraft.data.items import ItemCollate, class_names_of, is_torch_dataset, item_loader, length_of
from regraft.data.photos import Photos, SeededShuffle
from regraft.data.samples import Listing, Task
from regraft.data.sources import Source
from regraft.data.transforms import augmentation
from regraft.errors import DataError, ModelError
from regraft.frontier.cache.store import Store
from regraft.progress import Progress
from regraft.training.checks.targets import labels_in_memory, require_labels, task_of
from regraft.training.config import TrainConfig
from regraft.training.features.batches import FeatureBatches, Features, PickedBatches
from regraft.training.features.extract import Extractor
from regraft.training.features.frontier import Frontier
from regraft.training.features.photo_batches import PhotoBatches, fit_device
from regraft.training.features.pixels import read_or_load
from regraft.training.loop import Inputs
from regraft.training.losses import Loss
from regraft.training.partial_batches import PartialBatch, SharedPhotos, fault_tolerant_loader
from regraft.training.ranks.group import MIN_ROWS, SINGLE, Ranks
from regraft.training.resume.rng import random_states, set_random_states
from regraft.wording import for_caller, option

VALIDATION_BATCH_SIZE = 256


@dataclass(frozen=True)
class TrainData:
    """Training and validation batches, with what is known about them.

    Attributes:
        train: Training batches, in a new order each epoch.
        validation: Validation batches, in a fixed order.
        task: Classification or regression.
        classes: Class names; None for regression.
        listing: Contents of the folder or table; None for datasets and loaders.
        paths: The validation photos, in order; empty for datasets without files.
        unreadable: Files that are skipped.
        photos: Training and validation photos; None for other data.
        frontier: Features that were computed once; None if the whole network runs in every epoch.
        cache_disabled_reason: Why it runs in every epoch; None without a reason to report.
        first_targets: Targets of the first training batch; None for photos.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    task: Task
    classes: tuple[str, ...] | None
    listing: Listing | None = None
    paths: tuple[Source, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    photos: tuple[Photos, Photos] | None = None
    frontier: Frontier | None = None
    cache_disabled_reason: str | None = None
    first_targets: torch.Tensor | None = None


def list_if_known(data: Any, config: TrainConfig) -> Listing | None:
    """List the photos of a folder, a table, or datasets of Hugging Face; None for other datasets and loaders."""
    if isinstance(data, (str, Path)):
        return list_data(data, validation_share=config.validation_share, seed=config.seed)
    return list_datasets(data, config.validation_share, config.seed)


def load_train_data(
    data: Any,
    listing: Listing | None,
    preprocessing: Preprocessing,
    config: TrainConfig,
    device: torch.device,
    progress: Progress,
    ranks: Ranks = SINGLE,
    extractor: Extractor | None = None,
) -> TrainData:
    """Decode the photos of a folder, or use datasets and loaders as they are.

    Of several ranks, each decodes its share, and all get all photos.

    With an extractor, the batches hold the features of its constant part instead of images (`FeatureBatches`). Without
    one, photos that fit into the memory of a GPU stay there (`PhotoBatches`).
    """
    parts = _photos_of(data, listing, preprocessing, config)
    if parts is None:
        return _from_batches(data, preprocessing, config)
    train_data = _from_photos(parts, config, device, progress, ranks, extractor)
    if listing is None:
        return train_data
    assert train_data.photos is not None
    _require_all_classes(train_data.classes, train_data.photos[0])
    return replace(train_data, task=listing.task, listing=listing)


def with_features(
    train_data: TrainData,
    config: TrainConfig,
    device: torch.device,
    progress: Progress,
    ranks: Ranks,
    extractor: Extractor | None,
) -> TrainData:
    """Return the same photos with the features of a new extractor, after the network's flags have changed."""
    assert train_data.photos is not None
    fresh = _from_photos(train_data.photos, config, device, progress, ranks, extractor)
    unreadable = train_data.unreadable + fresh.unreadable
    return replace(fresh, task=train_data.task, listing=train_data.listing, unreadable=unreadable)


def _photos_of(
    data: Any, listing: Listing | None, preprocessing: Preprocessing, config: TrainConfig
) -> tuple[Photos, Photos] | None:
    """Return training and validation photos with their views, decoded or not; None for data of another kind."""
    plain = augmentation("none", preprocessing)
    if listing is not None:
        train, validation = (
            Photos(samples, preprocessing, plain, listing.classes) for samples in (listing.train, listing.validation)
        )
    elif isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Photos) for part in data):
        train, validation = data
    else:
        return None
    return train.augmented(augmentation(config.augment, train.preprocessing, config.views)), validation


def _from_photos(
    parts: tuple[Photos, Photos],
    config: TrainConfig,
    device: torch.device,
    progress: Progress,
    ranks: Ranks,
    extractor: Extractor | None,
) -> TrainData:
    """Decode photos that are not decoded yet, or compute their features, and make batches of either."""
    store = Store() if config.cache else None
    readable: list[Photos] = []
    features: list[Features] = []
    unreadable: list[Unreadable] = []
    for photos, description in zip(parts, ("reading photos", "reading validation photos"), strict=True):
        if extractor is not None:
            computed, part, failed = extractor.features_of(photos, description)
            features.append(computed)
        else:
            part, failed = read_or_load(photos, store, ranks, description=description, progress=progress)
        readable.append(part)
        unreadable += failed
    _require_readable(unreadable, sum(map(len, parts)), config.max_unreadable)
    train, validation = readable
    frontier = Frontier.of(extractor, features) if extractor is not None else None
    if frontier is not None:
        sampler = SeededShuffle(len(train), config.seed)
        batches: Iterable[Any] = FeatureBatches(frontier.train, train, config.batch_size, sampler)
        validation_batches: Iterable[Any] = FeatureBatches(frontier.validation, validation, VALIDATION_BATCH_SIZE)
    elif all(ranks.objects(fit_device((train, validation), device))):
        sampler = SeededShuffle(len(train), config.seed)
        batches = PhotoBatches(train, config.batch_size, device, sampler)
        validation_batches = PhotoBatches(validation, VALIDATION_BATCH_SIZE, device)
        train, validation = batches.dataset, validation_batches.dataset
    else:
        # Mixup blends photos of the whole batch, which every rank reads then.
        train_ranks, workers = SINGLE if config.mixup else ranks, config.workers
        batches = fault_tolerant_loader(
            train, config.batch_size, train_ranks, shuffle_seed=config.seed, workers=workers
        )
        validation_batches = fault_tolerant_loader(validation, config.batch_size, ranks, workers=workers)
    return TrainData(
        batches,
        validation_batches,
        "regression" if train.classes is None else "classification",
        train.classes,
        paths=tuple(sample.path for sample in validation.samples),
        unreadable=tuple(unreadable),
        photos=(train, validation),
        frontier=frontier,
    )


def _from_batches(data: Any, preprocessing: Preprocessing, config: TrainConfig) -> TrainData:
    """Take datasets and loaders of the caller's."""
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise DataError(
            f"data is a {type(data).__name__}, expected a folder, a .csv table, or a pair (train, validation) of "
            "Datasets or DataLoaders."
        )
    train, validation = data
    augmented = ItemCollate(preprocessing, augmentation(config.augment, preprocessing, config.views))
    batches = _batches(train, augmented, config, shuffle=True)
    plain = ItemCollate(preprocessing, augmentation("none", preprocessing))
    validation_batches = _batches(validation, plain, config, shuffle=False)
    for part, part_batches in (("training", batches), ("validation", validation_batches)):
        if length_of(part_batches) == 0:
            raise DataError(f"the {part} data is empty. Give at least one batch.")
    _, targets = first_batch(batches)
    if targets.is_floating_point():
        return TrainData(batches, validation_batches, "regression", None, first_targets=targets)
    return TrainData(batches, validation_batches, "classification", _names(train), first_targets=targets)


def _batches(data: Any, collate: ItemCollate, config: TrainConfig, *, shuffle: bool) -> Iterable[Any]:
    if not is_torch_dataset(data):
        if not isinstance(data, Iterable):
            raise DataError(
                f"a {type(data).__name__} is no data. Expected a Dataset, a DataLoader, or a list of batches."
            )
        return data
    return item_loader(data, config.batch_size, collate, shuffle=shuffle, workers=config.workers or 0, seed=config.seed)


def first_batch(batches: Iterable[Any]) -> tuple[Inputs, torch.Tensor]:
    """Return the first pair (inputs, targets), or raise an error that describes what the data yields instead."""
    if isinstance(batches, PickedBatches):
        return next(iter(batches))
    readable = (batch.batch if isinstance(batch, PartialBatch) else batch for batch in batches)
    try:
        first = next((batch for batch in readable if batch is not None), None)
        if first is None and isinstance(photos := getattr(batches, "dataset", None), SharedPhotos):
            few = [photos[index] for index in range(min(MIN_ROWS, len(photos)))]  # no batch has rows for this rank
            first = batches.collate_fn(few)  # pyright: ignore[reportAttributeAccessIssue]
    except TypeError as error:
        if "default_collate" not in str(error):
            raise
        raise DataError(
            f"the items of the training data cannot be put into a batch: {error}. Let the dataset return tensors and "
            "numbers, or give the loader a collate_fn."
        ) from error
    return _require_pair(first, "training")


def pairs_of(batches: Any) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Yield the batches of user data after checking each.

    Raises:
        DataError: There is no batch, or one is not a pair of tensors of equal length.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (torch.Tensor, np.ndarray)):
        raise DataError(
            f"a {type(batches).__name__} is no data. Expected a folder, a Dataset, a DataLoader, or a list of batches."
        )
    is_empty = True
    for batch in batches:
        is_empty = False
        _require_pair(batch, "given")
        inputs, targets = batch
        if 0 in (inputs.ndim, targets.ndim) or len(inputs) != len(targets) or not len(targets):
            raise DataError(
                f"the data yields inputs of shape {tuple(inputs.shape)} with targets of shape {tuple(targets.shape)}, "
                "expected (N, …) and (N,), N at least 1."
            )
        yield inputs, targets
    if is_empty:
        raise DataError("the data is empty. Give at least one batch.")


def _require_pair(batch: Any, part: str) -> tuple[Inputs, torch.Tensor]:
    is_sequence = isinstance(batch, (tuple, list))
    if is_sequence and len(batch) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in batch):
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        kind = f"a {type(batch).__name__} with {', '.join(map(repr, batch)) or 'nothing'}"
        advice = "pass the dataset itself, which may yield dicts, or give the loader a collate_fn that returns the two"
    elif is_sequence and len(batch) != 2:
        kind = f"a {type(batch).__name__} of {len(batch)}"
        advice = "let the dataset return the two, without a third"
    elif is_sequence:
        kind = f"a {type(batch).__name__} of {' and '.join(type(entry).__name__ for entry in batch)}"
        advice = "let the dataset return tensors and numbers, as with torchvision.transforms.ToTensor()"
    else:
        kind, advice = type(batch).__name__, "let the dataset return tensors, as with torchvision.transforms.ToTensor()"
    raise DataError(f"the {part} data yields {kind}, expected pairs (inputs, targets) of tensors: {advice}.")


def with_task(train_data: TrainData, loss: Loss | None, loss_name: str | None) -> TrainData:
    """Set the task of datasets and loaders from their targets and the loss; folders have a task already.

    Raises:
        DataError: The targets do not suit the loss, or are ambiguous.
    """
    if train_data.photos is not None:
        return train_data
    assert train_data.first_targets is not None
    targets = train_data.first_targets
    with _random_states_restored(train_data.validation):
        first_validation = _peek(train_data.validation)
        if first_validation is not None:
            _require_pair(first_validation, "validation")
    expected = None if first_validation is None else first_validation[1]
    task = task_of(train_data.task, loss, loss_name, targets, expected)
    if task == "classification" and expected is not None and expected.is_floating_point() and expected.ndim != 2:
        raise DataError(
            f"the validation targets are {str(expected.dtype).removeprefix('torch.')}, and the training targets are "
            "classes. Let both return classes (N,) of integers."
        )
    if task == train_data.task:
        return train_data
    return replace(train_data, task=task, classes=None if task == "regression" else _names(train_data.train))


def _require_known_labels(train_data: TrainData, classes: int, ignored: int | None) -> None:
    """Refuse labels outside of the classes, as far as labels are known without reading data.

    Raises:
        DataError: A label is not a class; the message names it and the part of the data.
    """
    if train_data.photos is not None:
        return
    for part, batches in (("training ", train_data.train), ("validation ", train_data.validation)):
        labels = labels_in_memory(batches)
        if labels is None:
            with _random_states_restored(batches):
                batch = _peek(batches)
            labels = batch[1] if batch is not None else None
        if labels is not None and (labels.ndim == 1 or labels.shape[1:].numel() == 1):
            require_labels(labels, classes, ignored=ignored, part=part)


def require_scores(
    model: nn.Module, output: torch.Tensor, targets: torch.Tensor, train_data: TrainData, ignored: int | None
) -> None:
    """Refuse outputs that are not scores (N, K) of the data's classes, and labels without a score.

    Raises:
        ModelError: The outputs have another shape, or another number of classes than the data.
        DataError: A label is not a class.
    """
    if output.ndim != 2:
        raise ModelError(
            f"{type(model).__name__} gives outputs of shape {tuple(output.shape)} for {len(targets)} samples, expected "
            "scores (N, K) of K classes. End the network with nn.Flatten and nn.Linear, or return floats as targets "
            "to predict numbers."
        )
    labels = targets if targets.ndim != 2 or targets.shape[1] == 1 else targets.argmax(1)
    labels = labels[labels != ignored] if ignored is not None else labels
    known = train_data.classes is not None
    wanted = len(train_data.classes) if train_data.classes is not None else int(labels.max()) + 1 if len(labels) else 0
    if targets.ndim == 2 and targets.shape[1] > 1:
        known, wanted = True, targets.shape[1]
    if output.shape[1] < wanted or (known and output.shape[1] != wanted):
        raise ModelError(
            f"{type(model).__name__} gives {output.shape[1]} scores, the data has {wanted} classes. "
            + for_caller(
                python=f"Use model = regraft.replace_head(model, {wanted}).",
                command=f"Let the network end with a layer of {wanted} outputs.",
            )
        )
    _require_known_labels(train_data, output.shape[1], ignored)


def _peek(batches: Any) -> Any:
    """Return the first batch if reading it is cheap and consumes nothing, as for lists and loaders without workers."""
    is_cheap = isinstance(batches, (list, tuple)) or (isinstance(batches, DataLoader) and batches.num_workers == 0)
    return next(iter(batches), None) if is_cheap else None


@contextlib.contextmanager
def _random_states_restored(*batches: Any) -> Iterator[None]:
    states = random_states(*batches)
    try:
        yield
    finally:
        set_random_states(states, *batches)


def _names(batches: Any) -> tuple[str, ...] | None:
    return class_names_of(getattr(batches, "dataset", batches))


def _require_readable(unreadable: list[Unreadable], count: int, limit: float) -> None:
    if len(unreadable) > limit * count:
        examples = "; ".join(f"'{file.path}': {file.reason}" for file in unreadable[:3])
        raise DataError(
            f"{len(unreadable)} of {count} files cannot be read ({examples}). Repair or remove them, or allow more "
            f"with {option('max_unreadable')} (now {limit:g})."
        )


def _require_all_classes(classes: tuple[str, ...] | None, train: Photos) -> None:
    seen = {sample.target for sample in train.samples}
    if lost := [name for index, name in enumerate(classes or ()) if index not in seen]:
        raise DataError(f"none of the photos of {', '.join(map(repr, lost))} can be read. Add some that can.")

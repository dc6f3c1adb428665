"""Items of datasets of the caller's that hold photos: dicts or pairs with a `PIL.Image`, bytes, or pixels, and a class.

So datasets of Hugging Face, webdataset and litdata go to `fit` as they are, and stream where they stream: nothing of
them is listed, and no photo is kept.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from regraft.card import Preprocessing
from regraft.data.decoding.files import decode, quiet_decoders
from regraft.data.shards.tables import IMAGE_NAMES, LABEL_NAMES
from regraft.data.sources import ShardMember
from regraft.data.transforms import Views, normalize
from regraft.errors import DataError

INPUT_NAMES = ("pixel_values", *IMAGE_NAMES)
MAX_DRAW = 2**62


@dataclass(frozen=True)
class EncodedPhoto(ShardMember):
    """The bytes of a photo that a dataset yields."""

    content: bytes

    def __str__(self) -> str:
        return f"{len(self.content):,} bytes"

    def read(self) -> bytes:
        """Return the bytes."""
        return self.content


@dataclass(frozen=True)
class ItemCollate:
    """Puts items into a batch: photos are decoded, cropped as `views` say, and normalized; tensors stay as they are."""

    preprocessing: Preprocessing
    views: Views

    def __call__(self, items: list[Any]) -> Any:
        """Return a batch (inputs, targets).

        Raises:
            DataError: An item has no photo or no class, or its photo cannot be read.
        """
        pairs = [_pair_of(item) for item in items]
        if not all(map(_is_photo, pairs, items)):
            return default_collate(pairs)
        pixels = torch.stack([self._view(pair[0]) for pair in pairs])
        return normalize(pixels, self.preprocessing), default_collate([_target(pair[1]) for pair in pairs])

    def _view(self, photo: Any) -> torch.Tensor:
        try:
            with quiet_decoders():
                pixels = decode(_decodable(photo), self.preprocessing).cpu()
        except DataError as error:
            raise DataError(
                f"a photo of the data ({type(photo).__name__}) cannot be read: {error}. Leave it out of the dataset."
            ) from error
        draw = 0 if self.views.count == 1 else int(torch.randint(MAX_DRAW, ()))
        return self.views.of(0, pixels, draw)


def item_loader(
    dataset: Any, batch_size: int, collate: ItemCollate, *, shuffle: bool = False, workers: int = 0, seed: int = 0
) -> DataLoader[Any]:
    """Return a loader of a dataset; one that is only iterated is neither shuffled nor counted.

    Args:
        dataset: A Dataset or IterableDataset of torch, or a value with their methods.
        batch_size: Items per batch; when shuffling, a last batch of a single item is dropped, as batch norm cannot
            train on it.
        collate: Puts items into a batch.
        shuffle: Whether the order is new in each epoch.
        workers: Number of processes.
        seed: Seed of the order.
    """
    shuffle = shuffle and not isinstance(dataset, IterableDataset)
    count = length_of(dataset) or 0
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        drop_last=shuffle and count > batch_size and count % batch_size == 1,
    )


def is_torch_dataset(data: Any) -> bool:
    """Return whether a loader of torch takes it: a Dataset of torch, or one of Hugging Face with a format."""
    library: Any = sys.modules.get("datasets")
    return isinstance(data, Dataset) or (library is not None and isinstance(data, library.Dataset))


def length_of(data: Any) -> int | None:
    """Return the length of data; None where it has none, as streams and loaders of them."""
    try:
        return len(data)
    except TypeError:
        return None


def class_names_of(data: Any) -> tuple[str, ...] | None:
    """Return the names of the classes that a dataset knows, as those of torchvision and Hugging Face do."""
    names = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    if not names and isinstance(features, Mapping):
        names = next((features[key].names for key in LABEL_NAMES if hasattr(features.get(key), "names")), None)
    return tuple(map(str, names)) if isinstance(names, Iterable) and names else None


def _pair_of(item: Any) -> Any:
    """Return the photo and the class of an item that is a dict; others are returned as they are.

    Raises:
        DataError: The dict has no photo or no class, or several.
    """
    if not isinstance(item, Mapping):
        return item
    photos = [key for key in item if str(key).lower() in INPUT_NAMES]
    labels = [key for key in item if str(key).lower() in LABEL_NAMES]
    if len(photos) == len(labels) == 1:
        return item[photos[0]], _number(item[labels[0]])
    raise DataError(
        f"the items of the data are dicts with {', '.join(map(repr, item))}, expected one photo ('image') and one "
        "class ('label'). Rename or remove the others, or let the dataset return pairs (photo, class)."
    )


def _is_photo(pair: Any, item: Any) -> bool:
    """Return whether the input of a pair is a photo; pixels of uint8 are one in a dict, which names it so."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    value: Any = pair[0]
    if isinstance(value, (Image.Image, bytes)) or (isinstance(value, Mapping) and "bytes" in value):
        return True
    is_pixels = getattr(value, "ndim", 0) == 3 and str(getattr(value, "dtype", "")).endswith("uint8")
    return isinstance(item, Mapping) and is_pixels


def _decodable(photo: Any) -> Image.Image | EncodedPhoto:
    if isinstance(photo, Image.Image):
        return photo
    if isinstance(photo, Mapping):
        photo = photo["bytes"]
    if isinstance(photo, bytes):
        return EncodedPhoto(photo)
    pixels = np.asarray(photo)
    if pixels.shape[0] in (1, 3) and isinstance(photo, torch.Tensor):
        pixels = pixels.transpose(1, 2, 0)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _number(label: Any) -> Any:
    """Return a label of webdataset, which are the bytes of KEY.cls unless its pipeline decodes them, as a number."""
    if isinstance(label, bytes):
        label = label.decode(errors="replace").strip()
    return int(label) if isinstance(label, str) and label.isdecimal() else label


def _target(label: Any) -> Any:
    if isinstance(label, (str, type(None))):
        raise DataError(
            f"a label of the data is {label!r}, expected a number. Let the dataset return the index of the class."
        )
    return label

"""Decoded photos in the cache on disk, for data that is read in each epoch and does not fit into memory."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from regraft.card import Preprocessing
from regraft.data.decode import Unreadable
from regraft.data.folders import Sample
from regraft.data.photos import Photos, estimate_bytes, fit_memory, positions, read_photos, without
from regraft.data.transforms import augmentation
from regraft.frontier.cache.key import features_key
from regraft.frontier.cache.store import Rows, Store
from regraft.frontier.cache.writer import FeatureWriter
from regraft.progress import Progress


class StoredPixels(Sequence[torch.Tensor]):
    """Photos (C, H, W) of uint8 of several sizes, concatenated in an entry of the store."""

    def __init__(self, rows: tuple[Rows, ...]) -> None:
        self._bytes, sizes = rows
        self._sizes = sizes[torch.arange(len(sizes))]  # (N, 3)
        self._ends = self._sizes.prod(1).cumsum(0)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        end, size = int(self._ends[index]), self._sizes[index].tolist()
        return self._bytes[slice(end - int(self._sizes[index].prod()), end)].view(size)


def read_or_load_photos(
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    classes: tuple[str, ...] | None,
    store: Store | None,
    *,
    description: str,
    progress: Progress,
) -> tuple[Photos, tuple[Unreadable, ...]]:
    """Decode photos once, into memory or the store; if neither has room, they are decoded on access.

    Args:
        samples: Files with their targets.
        preprocessing: Gives their size.
        classes: Class names; None for regression.
        store: Store for photos that do not fit into memory; None stores nothing.
        description: Label of the progress bar.
        progress: Reports progress.

    Raises:
        DataError: No photo can be read.
    """
    if store is None or fit_memory(len(samples), preprocessing):
        return read_photos(samples, preprocessing, classes=classes, description=description, progress=progress)
    key = features_key("pixels", [sample.path for sample in samples], preprocessing=preprocessing.model_dump())
    entry = store.find(key)
    if entry is not None:
        readable, unreadable = without(samples, entry.note["unreadable"])
        pixels = StoredPixels(entry.tensors(in_memory=False))
        return Photos(readable, preprocessing, augmentation("none", preprocessing), classes, pixels), unreadable
    size = estimate_bytes(len(samples), preprocessing)
    with FeatureWriter(store, key, size, in_memory=False, progress=progress) as writer:
        photos, unreadable = read_photos(
            samples,
            preprocessing,
            classes=classes,
            description=description,
            progress=progress,
            on_photo=lambda _, pixels: writer.append([pixels.reshape(-1), torch.tensor([pixels.shape])]),
            keep=False,
        )
        note = {"unreadable": positions(samples, unreadable), "holds": f"{len(photos)} photos, decoded"}
        rows = writer.finish(note)
    return (replace(photos, pixels=StoredPixels(rows)) if rows is not None else photos), unreadable

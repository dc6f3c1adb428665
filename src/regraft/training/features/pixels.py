"""Decoded photos in the cache on disk, for data that is read in each epoch and does not fit into memory."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from regraft.data.decoding.files import Unreadable
from regraft.data.photos import Photos, estimate_bytes, fit_memory, positions
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


def read_or_load(
    photos: Photos, store: Store | None, *, description: str, progress: Progress
) -> tuple[Photos, tuple[Unreadable, ...]]:
    """Decode photos once, into memory or the store; if neither has room, they are decoded on access.

    Args:
        photos: The photos; decoded ones are returned as they are.
        store: Store for photos that do not fit into memory; None stores nothing.
        description: Label of the progress bar.
        progress: Reports progress.

    Raises:
        DataError: No photo can be read.
    """
    if photos.pixels is not None:
        return photos, ()
    if store is None or fit_memory(len(photos), photos.preprocessing):
        return photos.read(description=description, progress=progress)
    paths = [sample.path for sample in photos.samples]
    key = features_key("pixels", paths, preprocessing=photos.preprocessing.cache_key())
    entry = store.find(key)
    if entry is not None:
        readable, unreadable = photos.without(entry.note["unreadable"])
        return replace(readable, pixels=StoredPixels(entry.tensors(in_memory=False))), unreadable
    size = estimate_bytes(len(photos), photos.preprocessing)
    with FeatureWriter(store, key, size, in_memory=False, progress=progress) as writer:
        readable, unreadable = photos.read(
            description=description,
            progress=progress,
            on_photo=lambda pixels: writer.append([pixels.reshape(-1), torch.tensor([pixels.shape])]),
            keep=False,
        )
        note = {
            "unreadable": positions(photos.samples, unreadable),
            "holds": f"{len(readable)} photos, decoded",
        }
        rows = writer.finish(note)
    return (replace(readable, pixels=StoredPixels(rows)) if rows is not None else readable), unreadable

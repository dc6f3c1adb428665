"""Decoded photos in the cache on disk, for data that is read in each epoch and does not fit into memory."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from regraft.data.decoding.files import Unreadable
from regraft.data.photos import Photos, estimate_bytes, fit_memory, positions, require_readable
from regraft.frontier.cache.key import features_key, file_digests
from regraft.frontier.cache.rows import Rows
from regraft.frontier.cache.store import Store
from regraft.frontier.cache.writer import FeatureWriter
from regraft.progress import Progress
from regraft.training.features.shards import ShardedWriter
from regraft.training.ranks.group import SINGLE, Ranks


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
    photos: Photos, store: Store | None, ranks: Ranks = SINGLE, *, description: str, progress: Progress
) -> tuple[Photos, tuple[Unreadable, ...]]:
    """Decode photos once, into memory or the store; if neither has room, they are decoded on access.

    Args:
        photos: The photos; decoded ones are returned as they are.
        store: Store for photos that do not fit into memory; None stores nothing.
        ranks: Each decodes its share, and all get all photos.
        description: Label of the progress bar.
        progress: Reports progress.

    Raises:
        DataError: No photo can be read.
    """
    if photos.pixels is not None:
        return photos, ()
    is_in_memory = fit_memory(len(photos), photos.preprocessing)
    if ranks.size > 1:
        is_in_memory = all(ranks.objects(is_in_memory))
    if store is None and not is_in_memory:
        return photos.read(description=description, progress=progress, keep=False)
    if ranks.size == 1 and (store is None or is_in_memory):
        return _stored(photos, store) or photos.read(description=description, progress=progress)
    key = entry = None
    if not is_in_memory and store is not None:
        key = _key(photos, ranks)
        entry = store.find(key)
    if all(ranks.objects(entry is not None)) and entry is not None:
        readable, unreadable = photos.without(entry.note["unreadable"])
        return replace(readable, pixels=StoredPixels(entry.tensors(in_memory=False))), unreadable
    size = estimate_bytes(len(photos), photos.preprocessing)
    share = photos.subset(range(len(photos))[ranks.share(len(photos))])
    writer: FeatureWriter | ShardedWriter
    if ranks.size == 1:
        writer = FeatureWriter(store, key or "", size, in_memory=False, progress=progress)
    else:
        writer = ShardedWriter(
            store if key else None, key or "", size, in_memory=is_in_memory, progress=progress, ranks=ranks
        )
    with writer:
        _, unreadable = share.read(
            description=description,
            progress=progress,
            on_photo=lambda pixels: writer.append([pixels.reshape(-1), torch.tensor([pixels.shape])]),
            keep=False,
            may_be_empty=ranks.size > 1,
        )
        lost = ranks.union(positions(photos.samples, unreadable))
        readable, unreadable = photos.without(lost)
        require_readable(photos, unreadable)
        note = {"unreadable": lost, "holds": f"{len(readable)} photos, decoded"}
        rows = writer.finish(note)
    if rows is None:
        return readable, unreadable
    stored = StoredPixels(rows)
    return replace(readable, pixels=tuple(stored) if is_in_memory else stored), unreadable


def store_pixels(photos: Photos, decoded: Photos, unreadable: dict[int, str], store: Store, progress: Progress) -> None:
    """Write decoded photos into the store, where `read_or_load` finds them, if it has room.

    Args:
        photos: All photos.
        decoded: The readable ones.
        unreadable: The others, by their indices, with the reasons.
        store: The store.
        progress: Reports progress.
    """
    key, size = _key(photos, SINGLE), estimate_bytes(len(decoded), photos.preprocessing)
    if store.find(key) is not None:
        return
    with FeatureWriter(store, key, size, in_memory=False, progress=progress) as writer:
        if not writer.has_place:
            return
        for index in range(len(decoded)):
            pixels = decoded.decoded(index)
            writer.append([pixels.reshape(-1), torch.tensor([pixels.shape])])
        writer.finish({"unreadable": unreadable, "holds": f"{len(decoded)} photos, decoded"})


def _key(photos: Photos, ranks: Ranks) -> str:
    spread = functools.partial(ranks.spread, file_digests)
    paths = [sample.path for sample in photos.samples]
    return features_key("pixels", paths, digests_of=spread, preprocessing=photos.preprocessing.cache_key())


def _stored(photos: Photos, store: Store | None) -> tuple[Photos, tuple[Unreadable, ...]] | None:
    """Return photos that fit into memory, where an earlier call has decoded them, as `advise` does; else None."""
    entry = store.find(_key(photos, SINGLE)) if store is not None and store.has_entries() else None
    if entry is None:
        return None
    readable, unreadable = photos.without(entry.note["unreadable"])
    return replace(readable, pixels=tuple(StoredPixels(entry.tensors(in_memory=True)))), unreadable

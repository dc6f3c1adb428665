"""Batches without the photos that became unreadable during training; these are reported beside the batch."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.data.decoding.files import Unreadable
from regraft.data.photos import Key, Photos, loader
from regraft.errors import DataError
from regraft.training.ranks.group import MIN_ROWS, SINGLE, OwnRows, Ranks, share_of


@dataclass(frozen=True)
class PartialBatch:
    """A batch without its unreadable photos; `batch` is None where all of them are unreadable."""

    batch: Any
    lost: tuple[Unreadable, ...]


class TolerantPhotos(Photos):
    """Photos that are decoded on access; an unreadable one becomes `Unreadable` instead of an error."""

    def __getitem__(self, key: Key) -> Any:
        index = key[0] if isinstance(key, tuple) else key
        try:
            return super().__getitem__(key)
        except DataError as error:
            return Unreadable(self.samples[index].path, str(error))


@dataclass(frozen=True, eq=False)
class SharedPhotos(TolerantPhotos):
    """Photos of which each rank reads its part of every batch.

    Attributes:
        place: Number of this rank, and number of ranks.
    """

    place: tuple[int, int] = (0, 1)

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """Return the items of this rank among those of a batch."""
        return [self[key] for key in keys[share_of(*self.place, len(keys), min_rows=MIN_ROWS)]]


def as_tolerant(photos: Photos) -> Photos:
    """Return the same photos, with `Unreadable` items instead of errors."""
    return photos if photos.pixels is not None else TolerantPhotos(**vars(photos))


def fault_tolerant_loader(photos: Photos, batch_size: int, ranks: Ranks = SINGLE, **options: Any) -> Any:
    """Return a `loader` of photos that yields a `PartialBatch` where some photos became unreadable.

    Of several ranks, each gets its rows of every batch (`OwnRows`).
    """
    place = (ranks.rank, ranks.size)
    tolerant = SharedPhotos(**vars(photos), place=place) if ranks.size > 1 else as_tolerant(photos)
    if (
        ranks.size > 1 and photos.pixels is None and options.get("workers") is None
    ):  # ranks share the cores of a machine
        options["workers"] = max(1, (os.cpu_count() or 1) // ranks.local_size)
    batches = loader(tolerant, batch_size, **options)
    batches.collate_fn = functools.partial(_collate_rest, collate=batches.collate_fn, is_shared=ranks.size > 1)
    return batches


def _collate_rest(items: list[Any], *, collate: Callable[[list[Any]], Any], is_shared: bool = False) -> Any:
    lost = tuple(item for item in items if isinstance(item, Unreadable))
    rest = [item for item in items if not isinstance(item, Unreadable)]
    batch = collate(rest) if rest else None
    if is_shared and batch is not None:
        batch = OwnRows(*batch)
    return batch if batch is not None and not lost else PartialBatch(batch, lost)

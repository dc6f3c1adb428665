"""Batches without the photos that became unreadable during training; these are reported beside the batch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regraft.data.decoding.files import Unreadable
from regraft.data.photos import Key, Photos, loader
from regraft.errors import DataError


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


def as_tolerant(photos: Photos) -> Photos:
    """Return the same photos, with `Unreadable` items instead of errors."""
    return photos if photos.pixels is not None else TolerantPhotos(**vars(photos))


def fault_tolerant_loader(photos: Photos, batch_size: int, **options: Any) -> Any:
    """Return a `loader` of photos that yields a `PartialBatch` where some photos became unreadable."""
    batches = loader(as_tolerant(photos), batch_size, **options)
    batches.collate_fn = functools.partial(_collate_rest, collate=batches.collate_fn)
    return batches


def _collate_rest(items: list[Any], *, collate: Callable[[list[Any]], Any]) -> Any:
    lost = tuple(item for item in items if isinstance(item, Unreadable))
    if not lost:
        return collate(items)
    rest = [item for item in items if not isinstance(item, Unreadable)]
    return PartialBatch(collate(rest) if rest else None, lost)

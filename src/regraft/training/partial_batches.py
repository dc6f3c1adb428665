"""Photos that can no longer be read while a run goes on: left out of their batch, and passed on to be counted."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regraft.data.decode import Unreadable
from regraft.data.photos import Key, Photos, loader
from regraft.errors import DataError


@dataclass(frozen=True)
class PartialBatch:
    """A batch without those of its photos that cannot be read; None where none can."""

    batch: Any
    lost: tuple[Unreadable, ...]


class TolerantPhotos(Photos):
    """Photos that are decoded when they are needed; one that cannot be read is `Unreadable` instead of an error."""

    def __getitem__(self, key: Key) -> Any:
        index = key[0] if isinstance(key, tuple) else key
        try:
            return super().__getitem__(key)
        except DataError as error:
            return Unreadable(self.samples[index].path, str(error))


def tolerant(photos: Photos) -> Photos:
    """Return the same photos, of which a file that cannot be read any more stops nobody."""
    return photos if photos.pixels is not None else TolerantPhotos(**vars(photos))


def tolerant_loader(photos: Photos, batch_size: int, **options: Any) -> Any:
    """Return `loader` of photos, whose batches are `PartialBatch` where some of them cannot be read any more."""
    batches = loader(tolerant(photos), batch_size, **options)
    batches.collate_fn = functools.partial(_collate_rest, collate=batches.collate_fn)
    return batches


def _collate_rest(items: list[Any], *, collate: Callable[[list[Any]], Any]) -> Any:
    lost = tuple(item for item in items if isinstance(item, Unreadable))
    if not lost:
        return collate(items)
    rest = [item for item in items if not isinstance(item, Unreadable)]
    return PartialBatch(collate(rest) if rest else None, lost)

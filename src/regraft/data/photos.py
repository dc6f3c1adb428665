"""Photos as a Dataset that decodes each file once, and loaders of normalized batches.

    samples ──read──► decoded pixels ──views──► augmented pixels ──loader──► normalized batches

`Photos` is one value for all of these stages: each method returns the same photos one stage further on.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from regraft.card import Preprocessing
from regraft.data.decoding.files import Unreadable, decode, decode_all, quiet_decoders
from regraft.data.samples import Sample
from regraft.data.transforms import Views, augmentation, normalize
from regraft.errors import DataError
from regraft.progress import SILENT, Progress

Batch = tuple[torch.Tensor, torch.Tensor]
Key = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Photos(Dataset[tuple[torch.Tensor, int | float]]):
    """Readable photos with their targets; item i is (pixels (C, size, size) of uint8, target).

    An item with the key (index, draw) is the view of the photo for that draw. So views depend neither on the number of
    workers nor on earlier draws.

    Attributes:
        samples: The photos with their targets.
        preprocessing: Gives their size.
        views: The views of each photo.
        classes: Class names; None for regression.
        pixels: All photos, decoded and resized, in memory or in a file; None if they are decoded on access.
    """

    samples: tuple[Sample, ...]
    preprocessing: Preprocessing
    views: Views
    classes: tuple[str, ...] | None = None
    pixels: Sequence[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int | float]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        return self.views.of(index, self.decoded(index), draw), self.samples[index].target

    def read(
        self,
        *,
        description: str = "reading photos",
        progress: Progress = SILENT,
        on_photo: Callable[[torch.Tensor], None] | None = None,
        keep: bool = True,
        may_be_empty: bool = False,
        is_ahead: bool = False,
    ) -> tuple["Photos", tuple[Unreadable, ...]]:
        """Decode the photos, and keep them in memory if they fit (see `fit_memory`); decoded ones are not read again.

        Args:
            description: Label of the progress bar.
            progress: Reports progress.
            on_photo: Called with the pixels (C, H, W) of each readable photo, in order, as soon as it is decoded.
            keep: Whether decoded photos may stay in memory.
            may_be_empty: Whether it is no error if none can be read, as of a share of the photos.
            is_ahead: Whether photos are decoded while `on_photo` works; see `decode_all`.

        Returns:
            The readable photos, and the unreadable files.

        Raises:
            DataError: No photo can be read.
        """
        count, is_decoded = len(self), self.pixels is not None
        keep = keep and not is_decoded and fit_memory(count, self.preprocessing)
        paths = [sample.path for sample in self.samples]
        decoded = (
            iter(self.pixels) if self.pixels is not None else decode_all(paths, self.preprocessing, is_ahead=is_ahead)
        )
        kept, readable, unreadable = [], [], []
        for sample, photo in zip(self.samples, progress.track(decoded, description, count), strict=True):
            if isinstance(photo, Unreadable):
                unreadable.append(photo)
                continue
            readable.append(sample)
            if on_photo is not None:
                on_photo(photo)
            if keep:
                kept.append(photo.cpu())
        if not readable and not may_be_empty:
            require_readable(self, unreadable)
        pixels = tuple(kept) if keep else self.pixels
        return replace(self, samples=tuple(readable), pixels=pixels), tuple(unreadable)

    def without(self, lost: Mapping[Any, str]) -> tuple["Photos", tuple[Unreadable, ...]]:
        """Return the readable photos, and the others with the reasons; keys of `lost` are indices, possibly as text."""
        reasons = {int(index): reason for index, reason in lost.items()}
        readable = self.subset([index for index in range(len(self)) if index not in reasons]) if reasons else self
        return readable, tuple(Unreadable(self.samples[index].path, reason) for index, reason in reasons.items())

    def augmented(self, views: Views) -> "Photos":
        """Return the same photos with other views; the decoded pixels are shared."""
        return replace(self, views=views)

    def subset(self, indices: Sequence[int]) -> "Photos":
        """Return a subset of the photos; the decoded pixels are shared."""
        pixels = None if self.pixels is None else tuple(self.pixels[index] for index in indices)
        return replace(self, samples=tuple(self.samples[index] for index in indices), pixels=pixels)

    def decoded(self, index: int) -> torch.Tensor:
        """Return a photo, decoded and resized, as (C, H, W) of uint8: where it is kept, else on the CPU."""
        if self.pixels is not None:
            return self.pixels[index]
        with quiet_decoders():
            return decode(self.samples[index].path, self.preprocessing).cpu()


def read_photos(
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    *,
    classes: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> tuple[Photos, tuple[Unreadable, ...]]:
    """Decode photos, and keep them in memory if they fit (see `fit_memory`).

    Args:
        samples: Files with their targets.
        preprocessing: Gives their size.
        classes: Class names; None for regression.
        progress: Reports progress.

    Returns:
        The readable photos, with the center crop as their view, and the unreadable files.

    Raises:
        DataError: No photo can be read.
    """
    names = tuple(classes) if classes is not None else None
    return Photos(tuple(samples), preprocessing, augmentation("none", preprocessing), names).read(progress=progress)


def require_readable(photos: Photos, unreadable: Sequence[Unreadable]) -> None:
    """Refuse photos of which none can be read.

    Raises:
        DataError: No photo can be read.
    """
    if len(unreadable) == len(photos):
        example = f": '{unreadable[0].path}', for instance, {unreadable[0].reason}" if unreadable else ""
        raise DataError(f"none of {len(photos)} files can be read as a photo{example}.")


def positions(samples: Sequence[Sample], unreadable: Sequence[Unreadable]) -> dict[int, str]:
    """Return the indices of the unreadable samples with the reasons, in the form that `Photos.without` takes."""
    reasons = {file.path: file.reason for file in unreadable}
    return {index: reasons[sample.path] for index, sample in enumerate(samples) if sample.path in reasons}


def loader(photos: Photos, batch_size: int, *, shuffle_seed: int | None = None, workers: int | None = None) -> Any:
    """Return a DataLoader of normalized batches ((N, C, H, W) of float32, targets (N,)).

    Args:
        photos: The photos.
        batch_size: N; when shuffling, a last batch of a single photo is dropped, as batch norm cannot train on it.
        shuffle_seed: Seed of order and views in each epoch, together with `set_epoch` of the loader's sampler; None
            keeps the order.
        workers: Number of processes; None: none for photos in memory, else one per core.
    """
    if workers is None:
        workers = 0 if photos.pixels is not None else os.cpu_count() or 1
    drops_last = shuffle_seed is not None and leaves_one(len(photos), batch_size)
    return DataLoader(
        photos,
        batch_size,
        sampler=SeededShuffle(len(photos), shuffle_seed) if shuffle_seed is not None else None,
        num_workers=workers,
        drop_last=drops_last,
        collate_fn=functools.partial(_collate, preprocessing=photos.preprocessing),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # for the seeds of its workers; the global generator is not used
    )


def leaves_one(count: int, batch_size: int) -> bool:
    """Return whether the last of several batches has a single item, on which batch norm cannot be trained."""
    return count > batch_size and count % batch_size == 1


class SeededShuffle(Sampler[tuple[int, int]]):
    """Yields (index, draw) of every item in a random order that depends only on seed and epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch, which decides order and draws of the next pass, and the position at which it begins."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, draws = self.draw()
        return iter(zip(order[self.first :].tolist(), draws[self.first :].tolist(), strict=True))

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return order and draws of this pass, both (N,) of int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        return order, torch.randint(2**62, (self.length,), generator=generator)


def _collate(items: list[tuple[torch.Tensor, int | float]], *, preprocessing: Preprocessing) -> Batch:
    pixels = torch.stack([item for item, _ in items])  # (N, C, H, W)
    return normalize(pixels, preprocessing), torch.tensor([target for _, target in items])  # int64 or float32


def free_memory_bytes() -> int:
    """Return the memory in bytes that can be taken without swapping, the system's caches included."""
    return psutil.virtual_memory().available


def fit_memory(count: int, preprocessing: Preprocessing) -> bool:
    """Return whether `count` decoded photos need less than a quarter of the free memory."""
    return estimate_bytes(count, preprocessing) < free_memory_bytes() / 4


def estimate_bytes(count: int, preprocessing: Preprocessing) -> int:
    """Estimate the bytes of `count` decoded photos, whose long side is 1.5 times the short one."""
    return round(count * preprocessing.channels * preprocessing.resize**2 * 1.5)

"""Photos as a Dataset that decodes each file once, and loaders of normalized batches."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from regraft.card import Preprocessing
from regraft.data.decode import Unreadable, decode, decode_all, quiet_decoders
from regraft.data.folders import Sample
from regraft.data.transforms import Views, augmentation, normalize
from regraft.errors import DataError
from regraft.progress import SILENT, Progress

Batch = tuple[torch.Tensor, torch.Tensor]
Key = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Photos(Dataset[tuple[torch.Tensor, int | float]]):
    """Readable photos with their targets; item i is (pixels (C, size, size) of uint8, target).

    An item asked for as (index, draw) is the version of the photo that this number stands for, so that what a network
    sees depends neither on the number of workers nor on what was drawn before.

    Attributes:
        samples: The photos and what they show.
        preprocessing: Their size.
        versions: What a network may see of them.
        classes: Class names; None for regression.
        pixels: All photos, decoded and resized, in memory or in a file; None where they are decoded when needed.
    """

    samples: tuple[Sample, ...]
    preprocessing: Preprocessing
    versions: Views
    classes: tuple[str, ...] | None = None
    pixels: Sequence[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int | float]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        return self.versions.of(index, self.decoded(index), draw), self.samples[index].target

    def augmented(self, versions: Views) -> "Photos":
        """Return other versions of the same photos; the decoded pixels are shared."""
        return replace(self, versions=versions)

    def subset(self, indices: Sequence[int]) -> "Photos":
        """Return some of the photos; the decoded pixels are shared."""
        pixels = None if self.pixels is None else tuple(self.pixels[index] for index in indices)
        return replace(self, samples=tuple(self.samples[index] for index in indices), pixels=pixels)

    def decoded(self, index: int) -> torch.Tensor:
        """Return a photo, decoded and resized: (C, H, W) of uint8."""
        if self.pixels is not None:
            return self.pixels[index]
        with quiet_decoders():
            return decode(self.samples[index].path, self.preprocessing)


def read_photos(
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    *,
    classes: Sequence[str] | None = None,
    description: str = "reading photos",
    progress: Progress = SILENT,
    on_photo: Callable[[Sample, torch.Tensor], None] | None = None,
    keep: bool = True,
) -> tuple[Photos, tuple[Unreadable, ...]]:
    """Decode photos, and keep them in memory where they fit (see `fit_memory`).

    Args:
        samples: Files and what they show.
        preprocessing: Their size.
        classes: Class names; None for regression.
        description: What is said of it while it goes on.
        progress: Is told what happens.
        on_photo: Is given each readable photo, in order, as soon as it is decoded.
        keep: Whether decoded photos may stay in memory.

    Returns:
        The readable photos, of which a network sees the middle, and the files that cannot be read.

    Raises:
        DataError: No photo can be read.
    """
    keep = keep and fit_memory(len(samples), preprocessing)
    decoded = decode_all([sample.path for sample in samples], preprocessing)
    kept, readable, unreadable = [], [], []
    for sample, photo in zip(samples, progress.track(decoded, description, len(samples)), strict=True):
        if isinstance(photo, Unreadable):
            unreadable.append(photo)
        else:
            readable.append(sample)
            if on_photo is not None:
                on_photo(sample, photo)
            if keep:
                kept.append(photo)
    if not readable:
        example = f": '{unreadable[0].path}', for instance, {unreadable[0].reason}" if unreadable else ""
        raise DataError(f"none of {len(samples)} files can be read as a photo{example}.")
    photos = Photos(
        samples=tuple(readable),
        preprocessing=preprocessing,
        versions=augmentation("none", preprocessing),
        classes=tuple(classes) if classes is not None else None,
        pixels=tuple(kept) if keep else None,
    )
    return photos, tuple(unreadable)


def positions(samples: Sequence[Sample], unreadable: Sequence[Unreadable]) -> dict[int, str]:
    """Write down which of the samples cannot be read, and why, by their numbers; `without` reads it."""
    places = {sample.path: index for index, sample in enumerate(samples)}
    return {places[file.path]: file.reason for file in unreadable}


def without(samples: Sequence[Sample], lost: Mapping[Any, str]) -> tuple[tuple[Sample, ...], tuple[Unreadable, ...]]:
    """Return the samples that can be read, and the others; `lost` has the numbers of those, be it as text."""
    reasons = {int(index): reason for index, reason in lost.items()}
    readable = tuple(sample for index, sample in enumerate(samples) if index not in reasons)
    return readable, tuple(Unreadable(samples[index].path, reason) for index, reason in reasons.items())


def loader(photos: Photos, batch_size: int, *, shuffle_seed: int | None = None, workers: int | None = None) -> Any:
    """Return a DataLoader of normalized batches ((N, C, H, W) of float32, targets (N,)).

    Args:
        photos: What to load.
        batch_size: N; a last batch of a single photo is left out when shuffling, as batch norm cannot learn from it.
        shuffle_seed: Shuffle and transform anew in each epoch, decided by this seed and `set_epoch` of the loader's
            sampler; None keeps the order.
        workers: Processes; None takes none for photos in memory, and one per core for others.
    """
    if workers is None:
        workers = 0 if photos.pixels is not None else os.cpu_count() or 1
    lonely = shuffle_seed is not None and leaves_one(len(photos), batch_size)
    return DataLoader(
        photos,
        batch_size,
        sampler=SeededShuffle(len(photos), shuffle_seed) if shuffle_seed is not None else None,
        num_workers=workers,
        drop_last=lonely,
        collate_fn=functools.partial(_collate, preprocessing=photos.preprocessing),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # of its workers; torch's own stays as it is
    )


def leaves_one(count: int, batch_size: int) -> bool:
    """Return whether batches of that many items end with a single one, from which batch norm cannot learn."""
    return count > batch_size and count % batch_size == 1


class SeededShuffle(Sampler[tuple[int, int]]):
    """Yields (index, draw) of every item in a random order that depends on the seed and the epoch alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the order and the draws of the next pass, which begins with the item at that place of the order."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, draws = self.draw()
        return iter(zip(order[self.first :].tolist(), draws[self.first :].tolist(), strict=True))

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this pass's order and the number that each item draws, both (N,) of int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        return order, torch.randint(2**62, (self.length,), generator=generator)


def _collate(items: list[tuple[torch.Tensor, int | float]], *, preprocessing: Preprocessing) -> Batch:
    pixels = torch.stack([item for item, _ in items])  # (N, C, H, W)
    return normalize(pixels, preprocessing), torch.tensor([target for _, target in items])  # int64 or float32


def free_memory_bytes() -> int:
    """Return how much memory is free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit_memory(count: int, preprocessing: Preprocessing) -> bool:
    """Return whether that many decoded photos need less than a quarter of the memory that is free."""
    return estimate_bytes(count, preprocessing) < free_memory_bytes() / 4


def estimate_bytes(count: int, preprocessing: Preprocessing) -> int:
    """Estimate the bytes of that many decoded photos, which are wider than high."""
    return round(count * preprocessing.channels * preprocessing.resize**2 * 1.5)

"""Photos with their targets, and how they are split: the values that every kind of listing ends in."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.card import Split
from regraft.data.sources import Source, short_name

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")

Target = int | float
Task = Literal["classification", "regression"]


@dataclass(frozen=True, slots=True)  # there may be ten millions
class Sample:
    """A photo and its target: a class index, or a number for regression."""

    path: Source
    target: Target


@dataclass(frozen=True)
class Listing:
    """The contents of a folder, a table, or of datasets of Hugging Face.

    Attributes:
        root: The folder or the table; the working folder for datasets.
        task: Classification (a folder per class, or labels in shards) or regression (a table with a number per photo).
        classes: Class names in the order of their indices; None for regression.
        train: Training photos.
        validation: Validation photos.
        split: How the data was split, as text.
        draw: The draw of the validation photos; None if the data says itself which they are.
    """

    root: Path
    task: Task
    classes: tuple[str, ...] | None
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    split: str
    draw: Split | None = None

    def counts(self) -> list[tuple[str, int, int]]:
        """Count the photos of each class: (class, training photos, validation photos)."""
        train, validation = (Counter(sample.target for sample in part) for part in (self.train, self.validation))
        return [(name, train[index], validation[index]) for index, name in enumerate(self.classes or ())]


def stratified_split(
    samples: Sequence[Sample], share: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split off a random share of each class (of everything for regression): at least one sample, and never all."""
    groups: dict[Target, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.target if isinstance(sample.target, int) else 0, []).append(sample)
    kept: set[Sample] = set()
    for target in sorted(groups):
        group = groups[target]
        count = min(max(1, round(len(group) * share)), len(group) - 1)
        kept.update(random.Random(f"{seed}/{target}").sample(group, count))
    return tuple(s for s in samples if s not in kept), tuple(s for s in samples if s in kept)


def drawn_listing(root: Path, classes: tuple[str, ...], samples: Sequence[Sample], share: float, seed: int) -> Listing:
    """Return the listing of photos of which a share of each class is drawn for validation."""
    train, validation = stratified_split(samples, share, seed)
    split = f"{share:.0%} of each class kept for validation, drawn with seed {seed}"
    return Listing(root, "classification", classes, train, validation, split, draw_of(samples, share, seed))


def held_out(samples: Sequence[Sample], draw: Split | None) -> tuple[Sample, ...] | None:
    """Return those of the samples that an earlier draw held out; None if it was a draw from other samples."""
    if draw is None or draw_of(samples, draw.share, draw.seed) != draw:
        return None
    return stratified_split(samples, draw.share, draw.seed)[1]


def draw_of(samples: Sequence[Sample], share: float, seed: int) -> Split:
    """Return what tells a draw from all others: what it was drawn from, and how."""
    # Without the folders above, so that it is the same draw wherever the data lies.
    names = sorted(f"{sample.target} {short_name(sample.path)}" for sample in samples)
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return Split(samples=digest, share=share, seed=seed)

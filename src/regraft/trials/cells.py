"""The cells of a grid: what each is, which photos it learns from, and what was measured in it."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regraft.data.samples import Listing
from regraft.errors import DataError
from regraft.trials.ways import Options
from regraft.wording import option

EVERYTHING = "all"


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a way of training, images per class (a number or `all`), and a seed."""

    way: str
    images: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.way}-{self.images}-{self.seed}"


@dataclass(frozen=True)
class CellResult:
    """What was measured in a cell.

    Attributes:
        cell: The cell.
        count: Training photos.
        stages: Options of its runs.
        accuracy: Accuracy on the validation photos after the last epoch.
        loss: The same for the mean cross-entropy.
        right: Whether each validation photo was classified correctly, as a text of `1` and `0`.
        curve: (seconds, accuracy) after each epoch.
        seconds: Seconds of each phase: decoding the photos, features, setup, training. Those of decoding and of
            features are what this run would have needed alone, though the grid computes them once.
        validation_s: Seconds of the validation after each epoch, which no way needs: not among `seconds`.
        measured_s: Seconds that the cell took in the grid.
    """

    cell: Cell
    count: int
    stages: tuple[Options, ...]
    accuracy: float
    loss: float
    right: str
    curve: tuple[tuple[float, float], ...]
    seconds: Mapping[str, float]
    validation_s: float
    measured_s: float

    @property
    def total_s(self) -> float:
        """Seconds from the first photo read to the last step."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {**asdict(self), "stages": [dict(stage) for stage in self.stages], "seconds": dict(self.seconds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CellResult":
        """Read JSON data.

        Raises:
            TypeError, KeyError, ValueError: It is damaged.
        """
        values = dict(values)
        values["cell"] = Cell(**values["cell"])
        values["stages"] = tuple(values["stages"])
        values["curve"] = tuple((float(seconds), float(accuracy)) for seconds, accuracy in values["curve"])
        values["seconds"] = {str(phase): float(seconds) for phase, seconds in values["seconds"].items()}
        return cls(**values)


def in_words(images: str) -> str:
    """Return a number of images per class in words.

    >>> in_words("5"), in_words("all")
    ('5 images a class', 'all images')
    """
    return "all images" if images == EVERYTHING else f"{images} image{'s' * (images != '1')} a class"


def draw(targets: Sequence[int], images: str, seed: int) -> list[int]:
    """Draw the indices of so many photos of each class, in their order; fewer are always a part of more.

    >>> draw([0, 0, 0, 1, 1, 1], "all", 0)
    [0, 1, 2, 3, 4, 5]
    """
    if images == EVERYTHING:
        return list(range(len(targets)))
    by_class = defaultdict(list)
    for index, target in enumerate(targets):
        by_class[target].append(index)
    drawn = []
    for target, indices in by_class.items():
        random.Random(f"{seed}/{target}").shuffle(indices)
        drawn += indices[: int(images)]
    return sorted(drawn)


def usable_images(requested: Sequence[str], listing: Listing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the numbers of images per class that can be measured, in order, and what is said of the others.

    Raises:
        DataError: None of them can be.
    """
    fewest, smallest, _ = min((train, name, val) for name, train, val in listing.counts())
    numbers = sorted({int(images) for images in requested if images != EVERYTHING})
    is_balanced = len({train for _, train, _ in listing.counts()}) == 1
    wants_all = EVERYTHING in requested
    notes = [
        f"{number} images a class were left out: '{smallest}' has {fewest} training photos."
        for number in numbers
        if number > fewest
    ]
    same = wants_all and is_balanced and fewest in numbers
    notes += [f"{fewest} images a class are all images, and were measured once."] if same else []
    kept = [number for number in numbers if number < fewest or (number == fewest and not same)]
    if not kept and not wants_all:
        raise DataError(
            f"{option('images')} asks for {min(numbers)} images a class or more, and '{smallest}' has {fewest} "
            f"training photos. Ask for {fewest} at most, or for 'all'."
        )
    return (*map(str, kept), *([EVERYTHING] if wants_all else [])), tuple(notes)

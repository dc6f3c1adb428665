"""The demonstration: how much a network trained on the digits 0-4 helps to learn 5-9 from a few images."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from regraft.anatomy.model_summary import summary
from regraft.anatomy.modes import preserved_randomness, thread_count
from regraft.anatomy.summary_table import ModelSummary
from regraft.card import attach
from regraft.checkpoint.read import load
from regraft.checkpoint.write import save
from regraft.data.digits import PREPROCESSING, write_digits
from regraft.data.folders import list_data
from regraft.data.photos import Photos, read_photos
from regraft.freezing.flags import freeze, unfreeze
from regraft.progress import SILENT, Progress
from regraft.surgery.head import replace_head
from regraft.training.fitting import fit
from regraft.training.metrics import Metrics

SOURCE_DIGITS, TARGET_DIGITS = range(5), range(5, 10)
SHOTS = (1, 2, 5, 10, 20)
SEEDS = 5
SOURCE_EPOCHS = 12
TARGET_EPOCHS = 25
LR = 5e-3  # the same for all methods, so that only initial weights and freezing differ
HEAD = "12"
HALF = "5"  # the last layer of the first half


@dataclass(frozen=True)
class Outcome:
    """The results of one method with one number of images per class, over all seeds.

    Attributes:
        method: Name of the training method.
        shots: Images per class.
        accuracies: Accuracy on the held-out images after the last epoch, one per seed.
        seconds: Time of training and evaluation, one per seed.
    """

    method: str
    shots: int
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean and standard deviation of the accuracy."""
        return statistics.mean(self.accuracies), statistics.stdev(self.accuracies)

    @property
    def duration(self) -> tuple[float, float]:
        """Mean and standard deviation of the seconds."""
        return statistics.mean(self.seconds), statistics.stdev(self.seconds)


@dataclass(frozen=True)
class DemoResult:
    """The results of the demonstration.

    Attributes:
        source: Metrics of the source network on held-out images of its own digits.
        layers: The network with its new head, first half frozen.
        outcomes: One for each method and number of images.
        held_out: Number of images on which every run was evaluated.
        seconds: Total time.
        checkpoint: Checkpoint of the source network.
    """

    source: Metrics
    layers: ModelSummary
    outcomes: tuple[Outcome, ...]
    held_out: int
    seconds: float
    checkpoint: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON data."""
        return {
            "source": self.source.to_dict(),
            "held_out": self.held_out,
            "seconds": self.seconds,
            "checkpoint": str(self.checkpoint),
            "outcomes": [
                {
                    "method": outcome.method,
                    "images_per_class": outcome.shots,
                    "accuracy_mean": outcome.accuracy[0],
                    "accuracy_std": outcome.accuracy[1],
                    "seconds_mean": outcome.duration[0],
                    "seconds_std": outcome.duration[1],
                    "accuracies": outcome.accuracies,
                }
                for outcome in self.outcomes
            ],
        }


def digit_network(outputs: int = 5) -> nn.Sequential:
    """Build a network of three convolutions and a linear layer for gray images of 8 × 8 pixels, with random weights."""
    return nn.Sequential(
        *_convolution(1, 8),  # 0-2
        *_convolution(8, 16),  # 3-5
        nn.MaxPool2d(2),
        *_convolution(16, 32),  # 7-9
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, outputs),
    )


def run_demo(
    folder: Path, *, shots: Sequence[int] = SHOTS, seeds: int = SEEDS, progress: Progress = SILENT
) -> DemoResult:
    """Train on the digits 0-4, and compare four methods to learn 5-9 from a few images per class.

    The methods are: a network from scratch; a new head on the frozen network; the same with only the first half frozen;
    and with nothing frozen. All are trained for the same number of epochs with the same learning rate, and evaluated
    after the last epoch on the same held-out images, which are used for no choice.

    Args:
        folder: Folder for images and the source network; must exist.
        shots: Numbers of images per class.
        seeds: Number of repetitions, each with another seed of images, new weights and order; at least 2.
        progress: Reports progress; silent by default.
    """
    with thread_count(1):  # for such small operations, synchronizing threads takes longer than computing
        return _run_demo(folder, tuple(shots), seeds, progress)


def _run_demo(folder: Path, shots: tuple[int, ...], seeds: int, progress: Progress) -> DemoResult:
    began = time.perf_counter()
    source, target = write_digits(folder / "source", SOURCE_DIGITS), write_digits(folder / "target", TARGET_DIGITS)
    with preserved_randomness(seed=0):
        fresh = _prepared(digit_network())
    progress.say("source     training on the digits 0-4 from scratch")
    learned = fit(fresh, source, epochs=SOURCE_EPOCHS, augment="none", progress=_only_bars(progress))
    checkpoint = save(learned.model, folder / "source.safetensors")
    progress.say(f"source     {learned.validation.headline()} on held-out images, saved as {checkpoint}")

    train, held_out = _read(target)
    plan = [(count, seed, method) for count in shots for seed in range(seeds) for method in METHODS]
    accuracies, durations = defaultdict(list), defaultdict(list)
    for count, seed, method in progress.track(plan, "target: digits 5-9", len(plan)):
        with preserved_randomness(seed):
            model = METHODS[method](checkpoint)
        few = train.subset(_draw(train, count, seed))
        start = time.perf_counter()
        result = fit(model, (few, held_out), epochs=TARGET_EPOCHS, augment="none", seed=seed, lr=LR, progress=False)
        durations[method, count].append(time.perf_counter() - start)
        accuracies[method, count].append(result.history[-1].validation.accuracy or 0.0)
    return DemoResult(
        source=learned.validation,
        layers=summary(_half_frozen(checkpoint)),
        outcomes=tuple(
            Outcome(method, count, tuple(accuracies[method, count]), tuple(durations[method, count]))
            for method in METHODS
            for count in shots
        ),
        held_out=len(held_out),
        seconds=time.perf_counter() - began,
        checkpoint=checkpoint,
    )


def _from_scratch(checkpoint: Path) -> nn.Module:
    return _prepared(digit_network())


def _all_layers(checkpoint: Path) -> nn.Module:
    return replace_head(load(checkpoint), len(TARGET_DIGITS))


def _head_only(checkpoint: Path) -> nn.Module:
    model = _all_layers(checkpoint)
    freeze(model)
    unfreeze(model, HEAD)
    return model


def _half_frozen(checkpoint: Path) -> nn.Module:
    model = _all_layers(checkpoint)
    freeze(model, until=HALF)
    return model


METHODS: dict[str, Callable[[Path], nn.Module]] = {
    "from scratch": _from_scratch,
    "head only": _head_only,
    "first half frozen": _half_frozen,
    "all layers": _all_layers,
}


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]


def _prepared(model: nn.Module) -> nn.Module:
    return attach(model, preprocessing=PREPROCESSING)


def _read(folder: Path) -> tuple[Photos, Photos]:
    listing = list_data(folder)
    train, _ = read_photos(listing.train, PREPROCESSING, classes=listing.classes)
    held_out, _ = read_photos(listing.validation, PREPROCESSING, classes=listing.classes)
    return train, held_out


def _draw(photos: Photos, count: int, seed: int) -> list[int]:
    """Draw the indices of `count` photos of each class."""
    by_class = defaultdict(list)
    for index, sample in enumerate(photos.samples):
        by_class[sample.target].append(index)
    return [index for target in by_class for index in random.Random(f"{seed}/{target}").sample(by_class[target], count)]


class _OnlyBars(Progress):
    """Passes on what shows that a step is running, and drops lines."""

    def __init__(self, inner: Progress) -> None:
        self.track, self.status = inner.track, inner.status


def _only_bars(progress: Progress) -> Progress:
    return _OnlyBars(progress)

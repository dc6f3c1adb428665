"""Photos, datasets, and progress that the tests of training share."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import regraft
import tiny
from oracles import identical
from regraft.progress import Progress

# at ten times the rate, a change of one weight by 1e-7 moves the loss of some of these untrained networks by 0.03
EXACT: dict[str, Any] = {"augment": "none", "fast": False, "optimizer": "sgd", "lr": 0.001, "batch_size": 6}


class Lines(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def detail(self, line: str) -> None:
        self.lines.append(line)

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


def write_photos(root: Path, count: int = 12) -> Path:
    drawn = np.random.default_rng(3)
    for part in ("train", "val"):
        for label in ("dark", "light"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count // 2):
                base = 80 if label == "dark" else 160
                pixels = np.clip(base + drawn.normal(0, 40, (70, 80, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def half_frozen() -> nn.Module:
    model = tiny.PlainCnn(num_classes=2)
    regraft.freeze(model, "conv1", "bn1")
    return model


def run(photos: Path, model: nn.Module | None = None, **options: Any) -> tuple[regraft.FitResult, Lines]:
    torch.manual_seed(0)
    lines = Lines()
    options = {**EXACT, "epochs": 2, "image_size": tiny.SIDE, **options}
    return regraft.fit(model or half_frozen(), photos, progress=lines, **options), lines


def dataset(count: int = 24, seed: int = 0) -> TensorDataset:
    """Draw images whose brightest channel is their class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    images = torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=generator) / 2
    images[torch.arange(count), targets] += 1.5
    return TensorDataset(images, targets)


def three_classes() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return tiny.PlainCnn(num_classes=3)


class StopsAt(Progress):
    """Sends a signal to this process when a batch is about to be learned from, and keeps what is said."""

    def __init__(self, epoch: int, step: int, number: int = signal.SIGINT) -> None:
        self._epoch, self._step, self._number = epoch, step, number
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def track(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
        for step, item in enumerate(items, start=1):
            if description.startswith(f"epoch {self._epoch}/") and step == self._step:
                signal.raise_signal(self._number)
            yield item


def assert_same(ours: regraft.FitResult, theirs: regraft.FitResult) -> None:
    for name, tensor in theirs.model.state_dict().items():
        assert identical(tensor, ours.model.state_dict()[name]), name
    assert identical(ours.outputs, theirs.outputs)
    assert ours.validation == theirs.validation
    assert ours.paths == theirs.paths
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert (one.epoch, one.train_loss, one.validation, one.lr) == (
            other.epoch,
            other.train_loss,
            other.validation,
            other.lr,
        )
    free = {"out", "checkpoint_minutes"}
    assert ours.config.model_dump(exclude=free) == theirs.config.model_dump(exclude=free)

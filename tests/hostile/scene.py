"""A tiny network, small photos, and the proof that a failure wrote nothing."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer.testing
from PIL import Image

from regraft.progress import Progress

TINY_NET = """
import torch
from torch import nn


class TinyNet(nn.Module):
    preprocessing = dict(size=32, resize=36)

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def vector(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def number(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets).item()


def nan(outputs, targets):
    return outputs.sum() * float("nan")
"""


class Recorder(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def write_photo(path: Path, brightness: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(brightness).integers(0, 100, (36, 40, 3)) + brightness
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def write_folder(folder: Path, classes: tuple[str, ...] = ("cats", "dogs"), count: int = 6) -> Path:
    for index, name in enumerate(classes):
        for number in range(count):
            write_photo(folder / name / f"{number}.png", 100 * (index % 2) + number)
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file below a folder, and None for every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"), key=str)
    }


@contextlib.contextmanager
def nothing_written(folder: Path | None = None) -> Iterator[None]:
    """Check that the files below a folder (the current one) are the same after the block."""
    before = listing(folder or Path.cwd())
    yield
    assert listing(folder or Path.cwd()) == before


def assert_refused(result: typer.testing.Result, *parts: str, code: int = 2) -> None:
    """Check that a command failed with one clean message, with these parts in order, and printed nothing else."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    position = 0
    for part in parts:
        found = message.find(part, position)
        assert found >= 0, (part, message)
        position = found + len(part)


def only_json(text: str) -> Any:
    """Read one JSON value with nothing around it, not even a constant that JSON does not have."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)

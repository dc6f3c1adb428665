"""A place of its own for a test: a tiny network in a file, a folder of small photos, and proof of what was written.

The fixtures are those of the folders whose `conftest.py` imports them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
from PIL import Image

import regraft
from regraft.cli.app import app
from regraft.progress import Progress

Cli = Callable[..., typer.testing.Result]
Fit = Callable[..., regraft.FitResult]

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

    def detail(self, line: str) -> None:
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


def results() -> set[str]:
    """List what is in the folder of the run, without the states to go on from, of which there must be one."""
    found = {*listing(Path("run"))}
    states = {name for name in found if name.startswith("last/state-")}
    assert states
    return found - states - {"last"}


def interrupting(step: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a loss that stops the run at a step, counted from 1 over all epochs."""
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1 + step:  # the first call tries a batch
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(outputs, targets)

    return loss


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


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in a folder of its own, so that whatever is written can be found."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def net_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "tiny_net.py"
    path.write_text(TINY_NET)
    return path


@pytest.fixture
def tiny_net(net_file: Path) -> str:
    return f"py:{net_file}:TinyNet"


@pytest.fixture
def photos(workplace: Path) -> Path:
    return write_folder(workplace / "photos")


@pytest.fixture
def fit(tiny_net: str, photos: Path) -> Fit:
    """Return `regraft.fit` on the photos, with a tiny network and one epoch where nothing else is said."""

    def run(data: Any = photos, *, model: Any = tiny_net, **options: Any) -> regraft.FitResult:
        defaults = {"weights": "none", "trust_code": True, "epochs": 1, "batch_size": 4}
        return regraft.fit(model, data, **{**defaults, **options})

    return run


@pytest.fixture
def cli() -> Cli:
    """Return a function that runs a command line in this process."""

    def run(*words: object) -> typer.testing.Result:
        return typer.testing.CliRunner().invoke(app, [str(word) for word in words])

    return run


@pytest.fixture
def train_words(tiny_net: str, photos: Path) -> list[object]:
    return ["train", photos, "--model", tiny_net, "--weights", "none", "--trust-code", "--epochs", 1, "--batch-size", 4]


@pytest.fixture(scope="session")
def saved(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a trained network; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("saved")
    data = write_folder(folder / "photos")
    out = folder / "run"
    regraft.fit(f"py:{net_file}:TinyNet", data, weights="none", trust_code=True, epochs=1, batch_size=4, out=str(out))
    return out / "model.safetensors"

"""What a run says: data and model before photos are read, few lines by default, details for those who ask."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Lines
from torch import nn
from torch.utils.data import TensorDataset

import regraft
import tiny
from regraft.console import ConsoleProgress
from regraft.progress import Progress
from scene import write_folder


class Events(Progress):
    """Keeps what happens, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def say(self, line: str) -> None:
        self.events.append(line)

    @contextlib.contextmanager
    def status(self, description: str) -> Iterator[None]:
        self.events.append(f"[{description}]")
        yield

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        self.events.append(f"[{description}]")
        yield from items


def test_fit_says_data_and_model_before_it_reads_photos(tmp_path: Path) -> None:
    events = Events()
    model = tiny.PlainCnn(num_classes=3)
    regraft.freeze(model, "conv*")
    photos = write_folder(tmp_path, ("ants", "bees", "wasps"))
    regraft.fit(model, photos, epochs=1, batch_size=4, image_size=tiny.SIDE, progress=events)
    labels = [event.split()[0] for event in events.events[: events.events.index("[reading photos]")]]
    assert labels[0] == "[looking"
    assert [label for label in labels if label in ("photos", "model", "training")] == ["photos", "model", "training"]
    assert "photos     18 in 3 classes: ants 6, bees 6, wasps 6" in events.events


@pytest.mark.parametrize(("count", "named"), [(10, "class8 2, class9 2"), (11, "class8 2 and 1 more")])
def test_fit_names_few_classes(count: int, named: str, tmp_path: Path) -> None:
    lines = Lines()
    photos = write_folder(tmp_path, tuple(f"class{number}" for number in range(count)), count=2)
    with contextlib.suppress(regraft.RegraftError):  # too few photos, or none: the lines come first
        regraft.fit(tiny.PlainCnn(num_classes=2), photos, epochs=1, image_size=tiny.SIDE, progress=lines)
    (line,) = [line for line in lines.lines if line.startswith("photos")]
    assert line.endswith(named)


@pytest.mark.parametrize(
    ("epochs", "shown"), [(1, [1]), (5, [1, 2, 3, 4, 5]), (6, [1, 2, 4, 6]), (25, [1, 5, 10, 15, 20, 25])]
)
def test_fit_says_a_few_of_many_fast_epochs(epochs: int, shown: list[int], data: Any) -> None:
    told, everything = Events(), Lines()
    for progress in (told, everything):
        regraft.fit(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), data, epochs=epochs, lr=0.1, progress=progress)
    lines = [line for line in told.events if line.startswith("epoch")]
    assert [int(line.split("/")[0].removeprefix("epoch")) for line in lines] == shown
    assert sum(line.startswith("epoch") for line in everything.lines) == epochs


@pytest.fixture
def data() -> tuple[TensorDataset, TensorDataset]:
    inputs, targets = torch.randn(8, 3), torch.arange(8) % 2
    return TensorDataset(inputs, targets), TensorDataset(inputs, targets)


def test_console_progress_prints_details_only_where_they_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        ConsoleProgress(verbose=verbose).detail(f"detail {verbose}")
    assert capsys.readouterr().err == "detail True\n"

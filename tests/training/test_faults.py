"""What goes wrong while a run trains: no memory, numbers that are none, workers that die, photos that vanish."""

import copy
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info

import regraft
import tiny
from oracles import identical, same, snapshot
from regraft.errors import DataError, LossError, RunError
from regraft.training.loop import score, train_epoch
from regraft.training.steps.compute import ComputeContext
from regraft.training.steps.tally import Tally
from training.factories import Lines, dataset, three_classes, write_photos

CPU = ComputeContext(torch.device("cpu"))
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.02}


class Small(nn.Module):
    """A network for which there is no memory for more than a few photos at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, []
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.SIDE**2, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if self.training and len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nAnd more")
        return self.net(x)


@pytest.mark.parametrize("mixup", [0.0, 0.3])
@pytest.mark.parametrize("most", [1, 3, 4, 5])
def test_fit_learns_from_a_batch_that_does_not_fit_in_parts(most: int, mixup: float) -> None:
    torch.manual_seed(0)
    short = Small(most)
    roomy = copy.deepcopy(short)
    roomy.most = 100
    lines = Lines()
    data = dataset(20), dataset(9, 1)
    ours = regraft.fit(short, data, mixup=mixup, progress=lines, **OPTIONS)
    theirs = regraft.fit(roomy, data, mixup=mixup, **OPTIONS)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.allclose(ours.model.state_dict()[name], tensor, atol=1e-5), name
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-6)
    said = [line for line in lines.lines if line.startswith("memory")]
    halvings = {5: 1, 4: 1, 3: 2, 1: 3}[most]
    assert len(said) == halvings  # and none in the second epoch
    assert said[0].startswith("memory     cpu has none for 8 photos at a time: 4 from here on, in steps of 8 photos")
    training = [count for count in short.seen[1:] if count <= most]
    assert max(training) <= most


def test_fit_refuses_to_run_without_memory_for_a_single_photo() -> None:
    with pytest.raises(RunError, match=r"cpu has no memory for a single photo \(CUDA out of memory.*image_size"):
        regraft.fit(Small(0), (dataset(20), dataset(9, 1)), **OPTIONS)


@pytest.mark.parametrize("most", [1, 3, 4])
def test_score_measures_a_batch_that_does_not_fit_in_parts(most: int) -> None:
    class Wide(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self.net(x)

    model = Wide(most)
    data = [(tiny.batch("plain", count, count), torch.arange(count)) for count in (5, 9, 2)]
    outputs, targets = score(model, data, CPU)
    with torch.no_grad():
        expected = torch.cat([model.net(inputs) for inputs, _ in data])
    assert torch.allclose(outputs, expected, atol=1e-6)
    assert targets.tolist() == [*range(5), *range(9), *range(2)]
    model.most = 0
    with pytest.raises(RunError, match="no memory for a single photo"):
        score(model, data, CPU)


def step(model: nn.Module, loss: Any = F.cross_entropy, on_nan: Any = "stop", count: int = 3) -> Tally:
    data = [(tiny.batch("plain", 5, seed), torch.arange(5) % tiny.CLASSES) for seed in range(count)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    tally = Tally()
    train_epoch(model, data, loss, optimizer, schedule, CPU.scaler(), CPU, on_nan=on_nan, tally=tally)
    return tally


@pytest.mark.parametrize("layer", ["conv1", "bn1", "conv2", "fc"])
def test_train_epoch_names_the_first_layer_at_fault_and_nothing_else_changes(layer: str) -> None:
    model = tiny.build("plain")
    with torch.no_grad():
        model.get_submodule(layer).weight.view(-1)[0] = math.inf
    before = snapshot(model.train())
    kind = type(model.get_submodule(layer)).__name__
    with pytest.raises(LossError, match=rf"at step 1 .*first layer whose output is not finite is '{layer}' \({kind}\)"):
        step(model)
    after = snapshot(model)
    names = {name for name, _ in model.named_parameters()}
    assert all(identical(before["bytes"][name], after["bytes"][name]) for name in names)
    assert before["hooks"] == after["hooks"]


def test_train_epoch_tells_a_loss_at_fault_from_a_layer() -> None:
    with pytest.raises(LossError, match=r"Every layer's output is finite, so it is the loss itself.*on_nan='skip'"):
        step(tiny.build("plain"), lambda outputs, targets: outputs.sum() * math.nan)


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 2}])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_train_epoch_can_leave_a_step_out_that_is_not_finite(what: str, bad: set[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.SIDE**2, tiny.CLASSES))
    by_hand, calls = copy.deepcopy(model), [0]

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        value = F.cross_entropy(outputs, targets)
        if calls[0] - 1 not in bad:
            return value
        return value * math.nan if what == "loss" else value + (0 * outputs).sum().sqrt()  # 0 with slope inf * 0

    tally = step(model, loss, "skip")
    assert (tally.steps, tally.skipped, tally.count) == (3, len(bad), 5 * (3 - len(bad)))
    for number in {0, 1, 2} - bad:
        inputs, targets = tiny.batch("plain", 5, number), torch.arange(5) % tiny.CLASSES
        gradients = torch.autograd.grad(F.cross_entropy(by_hand(inputs), targets), list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1 / (1 + number))
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_train_epoch_refuses_an_epoch_of_nothing_but_steps_left_out() -> None:
    with pytest.raises(LossError, match="no step of this epoch had a finite loss and gradient"):
        step(tiny.build("plain"), lambda outputs, targets: outputs.sum() * math.nan, "skip")


def test_fit_counts_steps_left_out_in_the_line_of_the_epoch() -> None:
    calls, lines = [0], Lines()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return F.cross_entropy(outputs, targets) * (math.nan if calls[0] == 3 else 1)

    regraft.fit(three_classes(), (dataset(), dataset(9, 1)), loss=loss, on_nan="skip", progress=lines, **OPTIONS)
    epochs = [line for line in lines.lines if line.startswith("epoch")]
    assert ["1 steps without a finite loss left out" in line for line in epochs] == [True, False]


class Deadly(Dataset):
    """Kills the worker that asks for one of its items, as soon as a file is there."""

    def __init__(self, file: Path) -> None:
        self.file, (self.images, self.targets) = file, dataset(24).tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 7 and get_worker_info() is not None and self.file.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index], self.targets[index]


class Arms(Lines):
    """Makes a file when the second epoch begins."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def track(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
        if description.startswith("epoch 2/"):
            self._file.touch()
        yield from items


def test_fit_does_without_a_worker_that_dies(tmp_path: Path) -> None:
    lines, data = Arms(tmp_path / "armed"), (Deadly(tmp_path / "armed"), dataset(9, 1))
    options = OPTIONS | {"batch_size": 4, "epochs": 3}
    found = regraft.fit(three_classes(), data, workers=1, progress=lines, **options)
    alone = regraft.fit(three_classes(), data, workers=0, **options)
    for name, tensor in alone.model.state_dict().items():
        assert identical(tensor, found.model.state_dict()[name]), name
    assert [record.train_loss for record in found.history] == [record.train_loss for record in alone.history]
    assert sum("the main process goes on alone, from the same batch" in line for line in lines.lines) == 1


class Deletes(Lines):
    """Deletes photos when the second epoch begins."""

    def __init__(self, *photos: Path) -> None:
        super().__init__()
        self._photos = photos

    def track(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
        if description.startswith("epoch 2/"):
            for photo in self._photos:
                photo.unlink()
        yield from items


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("regraft.data.photos.free_memory_bytes", lambda: 0)  # so that they are decoded when needed
    return write_photos(tmp_path / "photos", 12)


@pytest.mark.parametrize("workers", [0, 1])
def test_fit_leaves_a_photo_that_vanishes_out_of_its_batch(photos: Path, workers: int) -> None:
    options = {"epochs": 3, "batch_size": 5, "image_size": tiny.SIDE, "cache": False, "workers": workers, "lr": 0.01}
    gone = photos / "train/dark/1.png", photos / "val/light/2.png"
    lines = Deletes(*gone)
    model = tiny.PlainCnn(num_classes=2)
    result = regraft.fit(model, photos, progress=lines, max_unreadable=0.1, **options)
    assert [record.validation.count for record in result.history] == [12, 11, 11]
    assert len(result.paths) == len(result.outputs) == result.validation.count
    assert (gone[1] in result.paths) == (result.best_epoch == 1)
    for photo in gone:
        assert sum(line.startswith(f"skipped    '{photo}': ") for line in lines.lines) == 1


def test_fit_stops_at_too_many_photos_that_vanish(photos: Path) -> None:
    lines = Deletes(*sorted((photos / "train/dark").iterdir())[:4])
    options = {"epochs": 3, "batch_size": 5, "image_size": tiny.SIDE, "cache": False, "workers": 0}
    with pytest.raises(DataError, match=r"3 of 24 photos cannot be read any more \('.*png': no such file\).*max_unr"):
        regraft.fit(tiny.PlainCnn(num_classes=2), photos, progress=lines, **options)


def test_train_epoch_leaves_a_module_as_before_where_nothing_goes_wrong() -> None:
    model = tiny.build("plain")
    regraft.freeze(model, "conv1", "bn1")
    frozen = snapshot(model.conv1), snapshot(model.bn1)
    step(model, on_nan="skip")
    assert same(frozen[0], snapshot(model.conv1))
    assert same(frozen[1], snapshot(model.bn1))

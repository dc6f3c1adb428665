"""Photos that stay on a device, which is the CPU here: the same views as photo by photo, and the same training."""

from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from regraft.card import Preprocessing
from regraft.data.folders import Sample
from regraft.data.photos import SeededShuffle, loader, read_photos
from regraft.data.transforms import augmentation
from regraft.training import train_data
from regraft.training.features.photo_batches import PhotoBatches, fit_device
from training.by_hand import cnn, write_photos
from training.factories import assert_same

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(size=32, resize=36)


def whole_cnn() -> torch.nn.Module:
    torch.manual_seed(1)
    return cnn()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 11, measured=6)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep photos on the device, as on a GPU with room for them."""
    monkeypatch.setattr(train_data, "fit_device", lambda parts, device: True)


@pytest.mark.parametrize("kind", ["none", "flip"])
@pytest.mark.parametrize("shuffled", [True, False])
def test_photo_batches_are_those_of_the_loader(kind: Any, shuffled: bool, photos: Path) -> None:
    samples = [Sample(path, number % 2) for number, path in enumerate(sorted(photos.glob("train/*/*")))]
    read, _ = read_photos(samples, PREPROCESSING, classes=("a", "b"))
    read = read.augmented(augmentation(kind, PREPROCESSING))
    batches = PhotoBatches(read, 4, CPU, SeededShuffle(len(read), 3) if shuffled else None)
    others = loader(read, 4, shuffle_seed=3 if shuffled else None)
    for epoch in range(2):
        if shuffled:
            batches.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            others.sampler.set_epoch(epoch)
        pairs = list(zip(batches, others, strict=True))
        assert len(pairs) == len(batches)
        for (inputs, targets), (expected, labels) in pairs:
            assert torch.equal(inputs, expected)
            assert torch.equal(targets, labels)


@pytest.mark.parametrize(("kind", "views"), [("standard", None), ("standard", 3), ("trivial", None)])
def test_photo_batches_are_random_and_follow_from_the_seed(kind: Any, views: int | None, photos: Path) -> None:
    samples = [Sample(path, 0) for path in sorted(photos.glob("train/*/*"))]
    read, _ = read_photos(samples, PREPROCESSING, classes=("a",))
    read = read.augmented(augmentation(kind, PREPROCESSING, views))

    def run(epoch: int, seed: int = 0) -> torch.Tensor:
        batches = PhotoBatches(read, 5, CPU, sampler := SeededShuffle(len(read), seed))
        sampler.set_epoch(epoch)
        order, _ = sampler.draw()
        return torch.cat([inputs for inputs, _ in batches])[order.argsort()]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(1, seed=4))
    assert run(1).shape == (len(read), 3, 32, 32)
    if views is not None:  # so many versions of a photo, and no more
        versions = {run(epoch)[0].sum().item() for epoch in range(20)}
        assert len(versions) == views


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("augment", ["flip", "standard"])
def test_fit_learns_from_photos_on_the_device(augment: str, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 6, "lr": 0.01, "device": "cpu", "augment": augment}
    result = regraft.fit(whole_cnn(), photos, **options)
    again = regraft.fit(whole_cnn(), photos, **options)
    assert_same(result, again)
    assert len(result.history) == 3


def test_fit_on_the_device_is_that_from_loaders(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 6, "lr": 0.01, "device": "cpu"}
    expected = regraft.fit(whole_cnn(), photos, **options)
    monkeypatch.setattr(train_data, "fit_device", lambda parts, device: True)
    found = regraft.fit(whole_cnn(), photos, **options)
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert ours.validation.loss == pytest.approx(theirs.validation.loss, rel=1e-3)


def test_fit_device_takes_no_cpu_and_no_photos_that_are_read_anew(photos: Path) -> None:
    samples = [Sample(path, 0) for path in sorted(photos.glob("train/*/*"))]
    read, _ = read_photos(samples, PREPROCESSING, classes=("a",))
    assert not fit_device((read,), CPU)

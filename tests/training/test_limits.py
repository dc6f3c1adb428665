"""Each limit of what is done for a head, from both sides; what holds for the folds of the photos holds for all."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.card import Preprocessing
from regraft.data.photos import Photos
from regraft.data.samples import Sample
from regraft.data.transforms import augmentation
from regraft.errors import ConfigError, DataError, ModelError
from regraft.frontier.cache.precision import packed
from regraft.training.features import extract
from regraft.training.features.batches import FeatureBatches, Features
from regraft.training.heads import ridge as ridge_module
from regraft.training.heads import sweep
from regraft.training.heads.ridge import is_solvable, ridge
from regraft.training.heads.sweep import ridge_obstacle, ridge_start, sweep_heads
from regraft.training.losses import build_loss
from training.by_hand import built, write_photos
from training.factories import Lines

WIDTH = 6


def batches(targets: torch.Tensor, rows: torch.Tensor | None = None, precision: Any = "full") -> FeatureBatches:
    """Put features (N, 6), by default drawn around a direction for each class, beside N targets."""
    if rows is None:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(int(targets.max()) + 1, WIDTH, generator=generator)
        rows = torch.randn(len(targets), WIDTH, generator=generator) / 2 + directions[targets.long()]
    preprocessing = Preprocessing(size=8, resize=8)
    samples = tuple(Sample(Path(f"{index}.png"), target) for index, target in enumerate(targets.tolist()))
    photos = Photos(samples, preprocessing, augmentation("none", preprocessing))
    kept = tuple(packed([rows], precision))
    return FeatureBatches(Features(kept, (rows.dtype,), precision, 0.0, 1, 0.0, 0.0, False, "memory"), photos, 16)


def swept(data: FeatureBatches, outputs: int, loss: Any = F.cross_entropy) -> sweep.Sweep | None:
    head = nn.Linear(WIDTH, outputs)
    return sweep_heads(head, data, loss, epochs=2, decays=(0.05,), may_start_from_ridge=True, seed=0)


def has_ridge(found: sweep.Sweep | None) -> bool:
    assert found is not None
    assert all(math.isfinite(loss) for loss in found.losses)
    return any(choice.starts_from_ridge for choice in found.tried)


# Where all photos are more than the closed form takes, and four fifths of them are not


@pytest.mark.parametrize("count", [79, 80, 81, 100, 101])
def test_fit_with_photos_around_what_the_closed_form_takes(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge_module, "MAX_DIRECTIONS", 80)  # of 128 features; folds learn from 4/5 of the photos
    photos = write_photos(tmp_path / "photos", (count + 1) // 2, measured=4)
    if count % 2:
        next((photos / "train" / "class000").iterdir()).unlink()
    lines, options = Lines(), {"epochs": 1, "augment": "none", "device": "cpu"}
    result = regraft.fit(built("cnn, head"), photos, progress=lines, head="steps", **options)
    heads = 120 if count <= 80 else 60  # with a start from ridge regression, and without
    assert f"of {heads} heads trained together" in lines
    assert result.validation.accuracy is not None
    if count <= 80:
        assert regraft.fit(built("cnn, head"), photos, head="ridge", **options).config.head == "ridge"
        return
    assert result.config.head == "given"
    reason = f"{count} photos × 1 with 128 features and 2 outputs are too many"
    with pytest.raises(ConfigError, match=f"head='ridge' needs a linear head .* few enough of them: {reason}"):
        regraft.fit(built("cnn, head"), photos, head="ridge", out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("photos", "width", "outputs", "views", "expected"),
    [
        (512, 2048, 2, 2, True),  # 1,024 rows
        (513, 2048, 2, 2, False),
        (640, 1024, 2, 2, True),  # 1,024 features
        (640, 1025, 2, 2, False),
        (1024, 1280, 2, 1, True),
        (1025, 1280, 2, 1, False),
        (10_000, 1000, 2, 2, True),  # 20 million numbers
        (10_001, 1000, 2, 2, False),
        (10_000, 8, 1000, 2, True),  # of targets
        (10_001, 8, 1000, 2, False),
        (20, 8, 2, 1000, True),  # of versions on each other
        (21, 8, 2, 1000, False),
        (1, 8, 2, 5, False),
        (2, 8, 2, 5, True),
        (0, 8, 2, 1, False),
    ],
)
def test_is_solvable_on_both_sides(photos: int, width: int, outputs: int, views: int, expected: bool) -> None:
    assert is_solvable(photos, width, outputs, views=views) == expected
    if not expected and photos * views * width < 10**6 and photos:
        rows = torch.zeros(photos * views, width)
        assert ridge(rows, torch.zeros(photos * views).long(), outputs, views=views) is None


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("MAX_PARAMETERS", 2 * 3 * (WIDTH + 1) * len(sweep.RATES) * sweep.FOLDS),
        ("MAX_BYTES", 60 * WIDTH * 4),
        ("MIN_PHOTOS", 60),
    ],
)
def test_sweep_heads_on_both_sides(limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    beyond = 1 if limit == "MIN_PHOTOS" else -1
    for precision in ("full", "int8"):  # what counts is what is handed out
        data = batches(torch.arange(60) % 3, precision=precision)
        for shift, expected in ((-beyond, True), (0, True), (beyond, False)):
            monkeypatch.setattr(sweep, limit, value + shift)
            assert (swept(data, 3) is not None) == expected, (precision, shift)


@pytest.mark.parametrize("most", [44, 45, 46, 60, 61])
def test_sweep_heads_learns_from_as_many_photos_as_it_may(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MAX_PHOTOS", most)
    assert has_ridge(swept(batches(torch.arange(60) % 3), 3))


@pytest.mark.parametrize("count", [2, 4, 5, 39, 40, 41])
def test_fit_with_few_photos(count: int, tmp_path: Path) -> None:
    photos = write_photos(tmp_path, (count + 1) // 2, measured=2)
    if count % 2:
        (photos / "train" / "class000" / "000.png").unlink()
    lines = Lines()
    result = regraft.fit(built("cnn, head"), photos, progress=lines, head="steps", epochs=1, device="cpu")
    assert ("chosen     " in lines) == (count >= sweep.MIN_PHOTOS)
    assert math.isfinite(result.validation.loss)
    solved = regraft.fit(built("cnn, head"), photos, progress=lines, device="cpu")
    assert "head       solved" in lines
    assert math.isfinite(solved.validation.loss)


# Which classes and targets there are


@pytest.mark.parametrize(
    ("targets", "outputs"),
    [
        (torch.arange(60), 60),  # one photo of each class: each fold has classes that the others lack
        (torch.arange(60) % 29, 29),
        (torch.tensor([0] * 59 + [1]), 2),
        (torch.zeros(60, dtype=torch.int64), 1),
        (torch.zeros(60, dtype=torch.int64), 3),
        (torch.arange(60) % 3, 1000),  # outputs that no photo has
    ],
    ids=["one of each", "two of each", "one of 60", "one class", "one of three classes", "1000 outputs"],
)
def test_sweep_heads_with_rare_classes(targets: torch.Tensor, outputs: int) -> None:
    assert has_ridge(swept(batches(targets), outputs))


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("is_constant", [False, True])
def test_sweep_heads_on_numbers(loss: str, is_constant: bool) -> None:
    rows = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(0))
    targets = torch.full((60,), 3.0) if is_constant else rows @ torch.arange(6.0) + 1000
    found = swept(batches(targets, rows), 1, build_loss(loss, "regression"))
    assert has_ridge(found)
    assert found is not None
    assert found.best.starts_from_ridge
    assert min(found.losses) < 0.1


def test_ridge_start_takes_features_that_never_change_or_are_not_finite() -> None:
    targets = torch.arange(60) % 3
    start = ridge_start(nn.Linear(WIDTH, 3), batches(targets, torch.ones(60, WIDTH)), torch.arange(60))
    assert start is not None
    assert torch.equal(start["weight"], torch.zeros(3, WIDTH))
    assert torch.allclose(start["bias"].softmax(0), torch.full((3,), 1 / 3))
    rows = torch.randn(60, WIDTH)
    rows[7, 2] = math.nan
    assert ridge_start(nn.Linear(WIDTH, 3), batches(targets, rows), torch.arange(60)) is None


@pytest.mark.parametrize(
    ("live", "targets", "reason"),
    [
        (nn.Linear(WIDTH, 3, bias=False), torch.arange(60) % 3, "not one linear layer with a bias"),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 3)), torch.arange(60) % 3, "not one linear layer"),
        (nn.Linear(WIDTH, 3).double(), torch.arange(60) % 3, "not one linear layer"),
        (nn.Linear(WIDTH, 2), torch.rand(60), "the head gives 2 values for one number"),
    ],
)
def test_ridge_obstacle_says_why(live: nn.Module, targets: torch.Tensor, reason: str) -> None:
    data = batches(targets, torch.randn(60, WIDTH))
    assert reason in str(ridge_obstacle(live, data, torch.arange(60)))
    assert ridge_start(live, data, torch.arange(60)) is None


# Losses of one's own


class Counting(nn.Module):
    """A loss that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets)


def branching(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets) * (2 if float(outputs.sum()) > 1e9 else 1)


def outside_of_torch(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    sizes = {int(target) for target in targets.numpy()}
    return F.cross_entropy(outputs, targets) + 0 * len(sizes)


@pytest.mark.parametrize(
    ("loss", "is_swept"),
    [
        (Counting(), True),
        (branching, False),
        (outside_of_torch, False),
        (lambda outputs, targets: F.mse_loss(outputs, F.one_hot(targets, 3).float()), True),
    ],
    ids=["counting", "branching", "outside of torch", "mse"],
)
def test_sweep_heads_with_a_loss_of_ones_own(loss: Any, is_swept: bool) -> None:
    found = swept(batches(torch.arange(60) % 3), 3, loss)
    assert (found is not None) == is_swept
    if isinstance(loss, Counting):
        assert loss.calls == 0  # a copy of it was used


# What does not fit is refused in words, before anything is written


@pytest.mark.parametrize(
    ("name", "classes", "options", "error", "message"),
    [
        ("cnn, head", 3, {}, ModelError, "PlainCnn gives 2 scores, the data has 3 classes"),
        ("cnn, half", 2, {"head": "ridge"}, ConfigError, "what is trained is not one linear layer with a bias"),
        ("cnn, head", 2, {"head": "ridge", "cache": False}, ConfigError, "nothing is computed once"),
        ("cnn, head", 2, {"head": "ridge", "augment": "standard"}, ConfigError, "draws each photo anew"),
    ],
)
def test_fit_refuses_what_does_not_fit(
    name: str, classes: int, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", 20, classes=classes, measured=2)
    with pytest.raises(error, match=message):
        regraft.fit(built(name), photos, device="cpu", epochs=1, out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


def test_fit_refuses_several_outputs_for_a_number(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 25, measured=2)
    files = sorted((photos / "train").rglob("*.png"))
    rows = [f"{file.relative_to(tmp_path)},{number}" for number, file in enumerate(files)]
    (tmp_path / "table.csv").write_text("\n".join(["path,target", *rows]))
    for options in ({}, {"head": "ridge"}):
        with pytest.raises(DataError, match=r"outputs have the shape \(32, 2\) .* regraft.replace_head\(model, 1\)"):
            regraft.fit(built("cnn, head"), tmp_path / "table.csv", out=str(tmp_path / "run"), device="cpu", **options)
    assert not (tmp_path / "run").exists()


# Where features are kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_fit_keeps_features_around_what_memory_takes(
    precision: str, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path, 10, measured=4)
    monkeypatch.setattr(extract, "MEMORY_BYTES", 2 * 20 * 128 * 4 + shift)  # of the 20 photos, mirrored too
    lines = Lines()
    result = regraft.fit(built("cnn, head"), photos, progress=lines, precision=precision, device="cpu", epochs=1)
    assert f"kept {'in memory' if shift > 0 else 'on disk'}" in lines
    again = regraft.fit(built("cnn, head"), photos, precision=precision, device="cpu", epochs=1)
    assert again.history[-1].train_loss == result.history[-1].train_loss

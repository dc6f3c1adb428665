"""Training on what was computed once is training the whole network; and what can go wrong with a cache."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import regraft
import tiny
from families import IS_COMPLETE
from frontier.architectures import NETS, PATTERNS, Scaled, make
from oracles import identical
from regraft.frontier.cache.store import EntryWriter, Store
from regraft.training.features import extract
from training.factories import EXACT, Lines, half_frozen, run, write_photos

CLOSE = 1e-5
FAST = ("resnet18", "shufflenet_v2_x0_5")
CASES = [  # every network, and every pattern; in CI, half of their pairs
    pytest.param(name, pattern, marks=[] if name in FAST else pytest.mark.slow)
    for row, name in enumerate(NETS)
    for column, pattern in enumerate(PATTERNS)
    if IS_COMPLETE or name in FAST or (row + column) % 2 == 0
]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("noise"))


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.mark.parametrize(("name", "pattern"), CASES)
@pytest.mark.filterwarnings("ignore")  # of constructors
def test_fit_on_cached_features_equals_fit_without(name: str, pattern: str, noise: Path) -> None:
    found = []
    for cache in (True, False):
        model = regraft.replace_head(make(name), 2)
        PATTERNS[pattern](model)
        result, lines = run(noise, model, image_size=NETS[name], cache=cache)
        assert ("computed once" in lines) == cache
        found.append(result)
    cached, uncached = found
    for ours, theirs in zip(cached.history, uncached.history, strict=True):
        assert abs(ours.train_loss - theirs.train_loss) <= CLOSE
        assert abs(ours.validation.loss - theirs.validation.loss) <= CLOSE
    for (path, ours), theirs in zip(
        cached.model.state_dict().items(), uncached.model.state_dict().values(), strict=True
    ):
        distance = (ours.float() - theirs.float()).abs().max().item() if ours.numel() else 0.0
        assert distance <= CLOSE * max(1.0, theirs.float().abs().max().item()), path


def test_fit_trains_on_what_was_recorded_where_a_network_cannot_be_traced(noise: Path) -> None:
    found = []
    for cache in (True, False):
        torch.manual_seed(0)
        model = Scaled()
        regraft.freeze(model, "first", "second")
        result, lines = run(noise, model, cache=cache)
        assert ("is recorded, as the forward cannot be traced" in lines) == cache
        found.append(result)
    for ours, theirs in zip(*(result.history for result in found), strict=True):
        assert abs(ours.train_loss - theirs.train_loss) <= CLOSE
        assert abs(ours.validation.loss - theirs.validation.loss) <= CLOSE


def test_fit_runs_the_frozen_part_once_for_each_photo(noise: Path) -> None:
    model, seen = half_frozen(), [0]
    model.conv1.register_forward_hook(lambda *given: seen.__setitem__(0, seen[0] + len(given[1][0])))
    run(noise, model, epochs=1)
    once = seen[0]
    assert 24 <= once < 24 + 24  # each photo, a few to check that they come out alike, and shapes
    seen[0] = 0
    run(noise, model, epochs=5)
    assert seen[0] < once  # found, and only checked


def test_fit_finds_in_a_second_run_what_the_first_computed(noise: Path) -> None:
    first, _ = run(noise)
    again, lines = run(noise)
    assert "found in the cache" in lines
    assert all(
        identical(a, b)
        for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    _, other = run(noise, lr=0.1, epochs=1)
    assert "found in the cache" in other
    _, wider = run(noise, augment="flip")
    assert "found in the cache" not in wider


def test_fit_computes_photos_anew_that_changed(own_photos: Path) -> None:
    run(own_photos)
    photo = own_photos / "train/dark/0.png"
    before = photo.stat()
    Image.fromarray(np.full((70, 80, 3), 9, np.uint8)).save(photo)
    os.utime(photo, (before.st_atime, before.st_mtime))  # contents count, not dates
    changed, lines = run(own_photos)
    assert "computed once" in lines
    fresh, _ = run(own_photos, cache=False)
    assert abs(changed.history[-1].train_loss - fresh.history[-1].train_loss) <= CLOSE


def test_fit_knows_renamed_photos(own_photos: Path, tmp_path: Path) -> None:
    run(own_photos)
    shutil.copytree(own_photos, tmp_path / "elsewhere")
    _, lines = run(tmp_path / "elsewhere")
    assert "found in the cache" in lines


def test_fit_computes_an_entry_anew_that_was_damaged(noise: Path) -> None:
    first, _ = run(noise)
    for file in Store().folder.glob("*/0.bin"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    again, lines = run(noise)
    assert "computed once" in lines
    assert again.history[-1].train_loss == first.history[-1].train_loss


@pytest.mark.parametrize("after", [0, 1])
def test_fit_loses_the_cache_alone_to_a_full_disk(noise: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls = [0]
    append = EntryWriter.append

    def fail(self: EntryWriter, tensors: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, tensors)

    monkeypatch.setattr(EntryWriter, "append", fail)
    monkeypatch.setattr(extract, "BATCH", {"cpu": 4})
    result, lines = run(noise)
    assert "computed once" in lines
    assert "No space left" in lines
    assert not list(Store().folder.iterdir())
    monkeypatch.undo()
    plain, _ = run(noise, cache=False)
    assert abs(result.history[-1].train_loss - plain.history[-1].train_loss) <= CLOSE


def test_fit_says_that_a_cache_cannot_be_written_and_does_without(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = run(noise)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "file"))
    result, lines = run(noise)
    assert "cache      what is computed once is not written" in lines
    assert "computed once" in lines
    assert result.history[-1].train_loss == before.history[-1].train_loss
    assert (tmp_path / "file").read_text() == "no folder"


def test_fit_interrupted_while_it_computes_features_leaves_nothing_behind(
    noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BATCH", {"cpu": 4})
    appended = EntryWriter.append

    def interrupt(self: EntryWriter, tensors: Any) -> None:
        appended(self, tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(EntryWriter, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(noise)
    assert not list(Store().folder.iterdir())


def test_fit_falls_back_to_plain_training_with_a_full_disk_and_too_little_memory(
    noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "MEMORY_BYTES", 0)
    monkeypatch.setattr(EntryWriter, "append", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    result, lines = run(noise)
    assert "every epoch runs the full network" in lines
    assert "No space left" in lines
    assert len(result.history) == 2
    assert not list(Store().folder.iterdir())


def test_fit_learns_from_features_on_the_disk_as_from_those_in_memory(
    noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, _ = run(noise)
    monkeypatch.setattr(extract, "MEMORY_BYTES", 0)
    on_disk, lines = run(noise)
    assert "kept on disk" in lines
    assert on_disk.history[-1].train_loss == in_memory.history[-1].train_loss


class DrawsWithNumpy(nn.Module):
    """Multiplies by a number that torch knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(self.generator.random())


@pytest.mark.parametrize("kind", ["a number that is drawn", "a hook that draws"])
def test_fit_does_not_keep_a_part_that_gives_other_values_each_time(noise: Path, kind: str) -> None:
    secret = DrawsWithNumpy() if kind == "a number that is drawn" else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), secret, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    if kind == "a hook that draws":
        model[0].register_forward_hook(lambda *given: given[2] * torch.rand(1))
    regraft.freeze(model, "0", "1")
    result, lines = run(noise, model)
    assert "every epoch runs the full network: the network does not give the same values" in lines
    assert len(result.history) == 2


@pytest.mark.parametrize("by", ["an operation", "its memory"])
def test_fit_notices_weights_changed_by_hand_between_epochs(noise: Path, by: str) -> None:
    class Meddling(Lines):
        def say(self, line: str) -> None:
            super().say(line)
            if line.startswith("epoch 1/"):
                weight = models[-1].get_parameter("conv1.weight")
                (weight.data if by == "its memory" else weight.detach()).mul_(1.5)

    models, found = [], []
    for cache in (True, False):
        torch.manual_seed(0)
        models.append(half_frozen())
        lines = Meddling()
        options = {**EXACT, "epochs": 3, "image_size": tiny.SIDE, "cache": cache}
        found.append(regraft.fit(models[-1], noise, progress=lines, **options))
        assert ("frozen weights were changed from outside" in lines) == cache
    for ours, theirs in zip(*(result.history for result in found), strict=True):
        assert abs(ours.train_loss - theirs.train_loss) <= CLOSE


def test_fit_makes_batches_smaller_where_memory_is_short(noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = run(noise, cache=False)
    sizes: list[int] = []
    original = extract.Extractor.run

    def limited(self: extract.Extractor, pixels: Any) -> list[torch.Tensor]:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("not that many")
        return original(self, pixels)

    monkeypatch.setattr(extract.Extractor, "run", limited)
    found, lines = run(noise)
    assert "computed once" in lines
    assert {size for size in sizes if size <= 3} <= {1, 2, 3}
    assert max(sizes) > 3
    assert abs(found.history[-1].train_loss - before.history[-1].train_loss) <= CLOSE


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_fit_may_keep_features_in_fewer_bits(noise: Path, precision: str) -> None:
    exact, _ = run(noise)
    found, lines = run(noise, cache_precision=precision)
    assert f"as {precision} (wrong by" in lines
    assert abs(found.history[-1].train_loss - exact.history[-1].train_loss) < 0.02
    again, lines = run(noise, cache_precision=precision)
    assert "found in the cache" in lines
    assert again.history[-1].train_loss == found.history[-1].train_loss


def test_fit_that_unfreezes_splits_the_network_anew_and_trains_as_without(noise: Path) -> None:
    found = []
    for cache in (True, False):
        torch.manual_seed(0)
        model = tiny.PlainCnn(num_classes=2)
        result, lines = run(noise, model, unfreeze="head:2,conv2:1,all:1", cache=cache)
        assert sum("unfreezing" in line for line in lines.lines) >= 3
        found.append(result)
    for ours, theirs in zip(*(result.history for result in found), strict=True):
        assert abs(ours.train_loss - theirs.train_loss) <= CLOSE
        assert abs(ours.validation.loss - theirs.validation.loss) <= CLOSE


def test_fit_notices_weights_changed_by_hand(noise: Path) -> None:
    model = half_frozen()
    run(noise, model)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    _, lines = run(noise, model)
    assert "computed once" in lines

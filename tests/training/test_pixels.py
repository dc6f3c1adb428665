"""Photos that are kept as pixels in a file, where every epoch draws them anew."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
import tiny
from regraft.frontier.cache.store import EntryWriter, Store
from training.factories import Lines, write_photos

RANDOM: dict[str, Any] = {"augment": "standard", "epochs": 3, "batch_size": 6, "lr": 0.01, "image_size": tiny.SIDE}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = write_photos(tmp_path / "photos")
    (root / "train/dark/9.png").write_text("no photo")
    return root


def run(photos: Path, **options: Any) -> tuple[regraft.FitResult, Lines]:
    torch.manual_seed(0)
    lines = Lines()
    return regraft.fit(tiny.PlainCnn(num_classes=2), photos, progress=lines, **{**RANDOM, **options}), lines


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.data.photos.free_memory_bytes", lambda: 0)


def losses(result: regraft.FitResult) -> list[float]:
    return [record.train_loss for record in result.history]


def test_fit_learns_from_photos_in_a_file_as_from_those_in_memory(
    photos: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[Path]
) -> None:
    in_memory, _ = run(photos)
    assert not list(Store().folder.glob("*"))
    monkeypatch.setattr("regraft.data.photos.free_memory_bytes", lambda: 0)
    decoded.clear()
    in_file, lines = run(photos)
    assert losses(in_file) == losses(in_memory)
    assert len(decoded) == 25  # each once, in three epochs
    assert "9.png" in lines
    decoded.clear()
    again, lines = run(photos)
    assert losses(again) == losses(in_memory)
    assert not decoded
    assert "9.png" in lines


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    from regraft.data.decoding import files as module

    original = module.decode

    def noting(source: Any, preprocessing: Any) -> torch.Tensor:
        found.append(source)
        return original(source, preprocessing)

    monkeypatch.setattr(module, "decode", noting)
    monkeypatch.setattr("regraft.data.photos.decode", noting)
    return found


@pytest.mark.usefixtures("little_memory")
def test_fit_loses_the_file_of_photos_alone_to_a_full_disk(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]
    append = EntryWriter.append

    def fail(self: EntryWriter, tensors: Any) -> None:
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, tensors)

    monkeypatch.setattr(EntryWriter, "append", fail)
    result, lines = run(photos, workers=0)
    assert "is not written: [Errno 28] No space left" in lines
    assert not list(Store().folder.glob("*"))
    monkeypatch.undo()
    assert losses(result) == losses(run(photos)[0])


@pytest.mark.usefixtures("little_memory")
def test_fit_writes_nothing_without_the_cache(photos: Path) -> None:
    run(photos, cache=False, workers=0)
    assert not list(Store().folder.glob("*"))

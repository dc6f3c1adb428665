"""A tiny network with weights, and photos that it can tell apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from scene import net_file as net_file
from scene import write_folder

Compare = Callable[..., regraft.Comparison]


@pytest.fixture(scope="session")
def learned(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Return the name of a network, a file of weights for it, and a folder of photos: 6 of each class, 4 to learn."""
    folder = tmp_path_factory.mktemp("learned")
    for part, count in (("train", 4), ("val", 3)):
        write_folder(folder / "photos" / part, count=count)
    name, weights = f"py:{net_file}:TinyNet", folder / "weights.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(regraft.create_model(name, weights="none", num_classes=10, trust_code=True).state_dict(), weights)
    return name, weights, folder / "photos"


@pytest.fixture
def compare(learned: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Return `regraft.compare` on these photos, with two ways and a few epochs where nothing else is said."""
    monkeypatch.setattr("regraft.trials.ways.MIN_STEPS", 1)
    name, weights, photos = learned

    def run(data: Any = photos, **options: Any) -> regraft.Comparison:
        defaults = {"ways": ["scratch", "probe"], "images": [2, "all"], "seeds": 1, "epochs": 3, "batch_size": 4}
        defaults |= {"weights": weights, "trust_code": True, "progress": False}
        return regraft.compare(name, data, **{**defaults, **options})

    return run

"""A place of its own for each test, with a tiny network in a file and a folder of small photos."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from scene import TINY_NET, write_folder

import regraft
from regraft.cli.app import app


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
def fit(tiny_net: str, photos: Path) -> Callable[..., regraft.FitResult]:
    """Return `regraft.fit` on the photos, with a tiny network and one epoch where nothing else is said."""

    def run(data: Any = photos, *, model: Any = tiny_net, **options: Any) -> regraft.FitResult:
        defaults = {"weights": "none", "trust_code": True, "epochs": 1, "batch_size": 4}
        return regraft.fit(model, data, **{**defaults, **options})

    return run


@pytest.fixture
def cli() -> Callable[..., typer.testing.Result]:
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

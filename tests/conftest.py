"""What all tests share."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: tests run side by side, and their tensors are tiny
    os.environ.setdefault(name, "1")

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Let Ctrl-C be heard also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is computed once out of the user's cache, and apart from other tests."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real photos and checkpoints beside the checkout."""
    folder = Path(__file__).parents[1] / ".." / "shared"
    if not (folder / "data").is_dir() or not (folder / "weights").is_dir():
        pytest.skip(f"no real photos and checkpoints in {folder.resolve()}")
    return folder.resolve()


@pytest.fixture
def random_state() -> Callable[[], tuple[object, ...]]:
    """Return a function that returns the state of every global random generator as comparable values."""
    return lambda: (
        tuple(torch.get_rng_state().tolist()),
        random.getstate(),
        tuple(np.random.get_state()[1].tolist()),
        np.random.get_state()[2],
    )

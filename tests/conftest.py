"""What all tests share."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: tests run side by side, and their tensors are tiny
    os.environ.setdefault(name, "1")

import contextlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Files of users, which would be imported under their own names; and fixtures, which hold no doctests.
collect_ignore = ["earlier/v0_1", "conftest.py"]

OWN_CLASS = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.twin = nn.Linear(12, 12)
        self.twin.weight = self.body.weight
        self.register_buffer("scale", torch.rand(12))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.twin(self.norm(self.body(x))) * self.scale)
"""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no server be asked before a download, which the test replaces."""
    monkeypatch.setattr("regraft.downloads._failure", lambda ask: None)


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


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Return the name of a class in a file of the user's, with tied weights and buffers of several kinds."""
    file = tmp_path / "own.py"
    file.write_text(OWN_CLASS)
    return f"py:{file}:Own"


def in_use() -> set[str]:
    """Return the files that this process has open or mapped."""
    files = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            files.add(str(descriptor.readlink()))
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return files | {line[line.index("/") :] for line in mapped if "/" in line}


@pytest.fixture
def files_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse to delete, rename and replace files that are open or mapped, and folders of them, as Windows does.

    Returns:
        What was refused so far.
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("what is in use is looked up in /proc")
    refused: list[str] = []

    def guarded(name: str) -> None:
        call = getattr(os, name)

        def checked(*paths: Any, **options: Any) -> Any:
            for path in paths:
                absolute = os.path.realpath(path)
                if any(file == absolute or file.startswith(f"{absolute}/") for file in in_use() if name != "rmdir"):
                    refused.append(f"{name} {absolute}")
                    raise PermissionError(13, "The process cannot access the file because it is being used", absolute)
            return call(*paths, **options)

        monkeypatch.setattr(os, name, checked)

    for name in ("rename", "replace", "unlink", "rmdir"):
        guarded(name)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # so that folders are deleted by the paths in them
    return refused

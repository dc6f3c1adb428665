"""Photos that tests of training only read."""

from pathlib import Path

import pytest

from training.by_hand import write_photos


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("few"), 12)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("many"), 48, measured=25)

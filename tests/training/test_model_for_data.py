"""The network that a checkpoint stands for, with a head for the classes of the data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import regraft
from regraft.card import attach
from regraft.data.folders import list_data
from regraft.training.config import TrainConfig
from regraft.training.heads.model_for_data import create_for_data


@pytest.fixture
def layers() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
    )
    regraft.freeze(model, "0")
    return model


@pytest.mark.parametrize(
    ("trained_for", "width", "is_kept"),
    [(None, 2, True), (("bicycle", "car"), 2, True), (("ants", "bees"), 2, False), (None, 5, False)],
)
def test_create_for_data_keeps_a_head_that_fits(
    trained_for: tuple[str, ...] | None, width: int, is_kept: bool, layers: nn.Sequential, shared: Path, tmp_path: Path
) -> None:
    layers[5] = nn.Linear(3, width)
    file = regraft.save(attach(layers, classes=trained_for), tmp_path / "net.safetensors")
    listing = list_data(shared / "data" / "car_vs_bicycle_mini")
    model = create_for_data(str(file), listing, TrainConfig(), trust_code=False)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 2)
    assert torch.equal(model.get_parameter("3.weight"), layers.get_parameter("3.weight"))
    assert not model.get_parameter("0.weight").requires_grad
    head = model.get_parameter("5.weight")
    assert head.requires_grad
    assert (
        head.shape == layers.get_parameter("5.weight").shape and torch.equal(head, layers.get_parameter("5.weight"))
    ) == is_kept


def test_create_for_data_gives_a_regression_one_output(layers: nn.Sequential, shared: Path, tmp_path: Path) -> None:
    listing = replace(list_data(shared / "data" / "car_vs_bicycle_mini"), classes=None)
    file = regraft.save(layers, tmp_path / "net.safetensors")
    assert create_for_data(str(file), listing, TrainConfig(), trust_code=False)(torch.zeros(2, 3, 8, 8)).shape == (2, 1)

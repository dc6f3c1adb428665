"""`fit` with gradual unfreezing, layer-wise rates and the audit before its first step."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import regraft
import tiny
from regraft.errors import ConfigError, ModelError
from regraft.progress import Progress


@pytest.fixture
def data() -> tuple[TensorDataset, TensorDataset]:
    inputs, targets = torch.randn(24, *tiny.batch("plain").shape[1:]), torch.arange(24) % 5
    return TensorDataset(inputs, targets), TensorDataset(inputs, targets)


def test_fit_lets_layers_join_stage_by_stage(data: tuple[TensorDataset, TensorDataset]) -> None:
    model = tiny.build("plain")
    seen: list[set[str]] = []

    class Lines(Progress):
        def say(self, line: str) -> None:
            if line.startswith("epoch"):
                seen.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

    result = regraft.fit(model, data, unfreeze="head:2,all:1", progress=Lines())
    assert len(result.history) == 3
    assert seen[0] == seen[1] == {"fc.weight", "fc.bias"}
    assert seen[2] == {name for name, _ in model.named_parameters()}


def test_fit_keeps_the_weights_of_the_best_epoch_also_when_layers_joined_later(
    data: tuple[TensorDataset, TensorDataset],
) -> None:
    model = tiny.build("plain")
    result = regraft.fit(model, data, unfreeze="head:2,all:2", lr=0.05)
    assert regraft.evaluate(result.model, data[1]).accuracy == result.validation.accuracy


def test_fit_with_a_schedule_excludes_other_ways_to_freeze(data: tuple[TensorDataset, TensorDataset]) -> None:
    with pytest.raises(ConfigError, match="excludes freeze, freeze_until and unfreeze_all"):
        regraft.fit(tiny.build("plain"), data, unfreeze="head:1", freeze=("fc",))


def test_fit_pins_flags_set_by_hand_before_the_first_step(data: tuple[TensorDataset, TensorDataset]) -> None:
    model = tiny.build("plain")
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.bn1.state_dict().items()}
    regraft.fit(model, data, epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.bn1.state_dict().items())


def test_fit_stops_at_broken_statistics_in_a_frozen_layer(data: tuple[TensorDataset, TensorDataset]) -> None:
    model = tiny.build("plain")
    nn.init.constant_(model.bn1.running_mean, float("nan"))
    regraft.freeze(model, "conv1", "bn1")
    with pytest.raises(ModelError, match=r"bn1\.running_mean: is frozen and holds NaN"):
        regraft.fit(model, data, epochs=1)

"""Flags of `requires_grad` that are set by hand after `freeze`."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tiny
from regraft import audit, freeze


def thaw_all(model: nn.Module) -> None:
    model.requires_grad_(True)


def thaw_one_by_one(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = True


def thaw_by_children(model: nn.Module) -> None:
    for child in model.children():
        child.requires_grad_(True)


@pytest.mark.parametrize("thaw", [thaw_all, thaw_one_by_one, thaw_by_children])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy], ids=["same", "copy"])
def test_freeze_pins_follow_flags_that_are_set_by_hand(
    thaw: Callable[[nn.Module], None], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)
    )
    freeze(model)
    model = copied(model)
    thaw(model)
    assert [finding.path for finding in audit(model)] == ["1", "2", "3"]
    model.train()
    assert audit(model) == []
    assert all(layer.training for layer in model)
    before = [model[1].running_mean.clone(), model[3].running_mean.clone()]
    model(torch.randn(4, 3, 6, 6))
    assert not torch.equal(before[0], model[1].running_mean)
    assert not torch.equal(before[1], model[3].running_mean)


def test_freeze_pins_layers_frozen_by_hand_at_the_next_change_of_mode() -> None:
    model = tiny.build("plain")
    freeze(model, "conv1", "bn1")
    model.conv2.requires_grad_(False)
    model.bn2.requires_grad_(False)
    assert [(finding.kind, finding.path) for finding in audit(model)] == [("unpinned", "bn2")]
    model.train()
    before = model.bn2.running_mean.clone()
    model(tiny.batch("plain"))
    assert torch.equal(before, model.bn2.running_mean)
    assert model.dropout.training

"""Other channels, the same filters."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torchvision import models

import regraft
from oracles import identical, same, snapshot
from regraft.errors import EditError
from regraft.zoo import preprocessing_of

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": models.resnet18,
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "vit_b_32": models.vit_b_32,
    "convnext_atto": lambda: timm.create_model("convnext_atto"),
    "levit_128s": lambda: timm.create_model("levit_128s"),
}


@pytest.mark.parametrize("name", NETS)
def test_a_gray_image_gives_what_three_equal_channels_gave(name: str) -> None:
    model = NETS[name]().eval()
    before = snapshot(model)
    gray = torch.randn(2, 1, 224, 224)
    edited = regraft.replace_stem(model, 1)
    with torch.no_grad():
        assert torch.allclose(edited(gray), model(gray.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    assert same(before, snapshot(model))
    assert preprocessing_of(edited).channels == 1


@pytest.mark.parametrize("channels", [4, 7])
def test_new_channels_change_nothing_until_they_have_learned(channels: int) -> None:
    model = models.resnet18().eval()
    edited = regraft.replace_stem(model, channels)
    inputs = torch.randn(2, channels, 64, 64)
    assert identical(edited.conv1.weight[:, :3], model.conv1.weight)
    with torch.no_grad():
        assert torch.allclose(edited(inputs), model(inputs[:, :3]), atol=1e-5)
    edited.train()(inputs).square().sum().backward()
    assert edited.conv1.weight.grad[:, 3:].abs().sum() > 0


def test_fewer_channels_keep_the_first() -> None:
    model = models.resnet18()
    edited = regraft.replace_stem(model, 2)
    assert torch.allclose(edited.conv1.weight, model.conv1.weight[:, :2] * 1.5)


def test_what_was_frozen_stays_frozen_and_the_rest_is_shared() -> None:
    model = models.resnet18()
    regraft.freeze(model, until="layer1")
    edited = regraft.replace_stem(model, 1)
    assert not edited.conv1.weight.requires_grad
    assert edited.bn1.weight is model.bn1.weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), r"begins with '0' \(Linear\), expected a convolution"),
        (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "has 2 groups"),
        (nn.Sequential(nn.ReLU()), "no layer with a width"),
    ],
)
def test_a_network_without_channels_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(EditError, match=message):
        regraft.replace_stem(model, 1)

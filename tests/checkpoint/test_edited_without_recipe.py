"""Networks that were edited before they had a recipe load as well: it is derived for what they were made from."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import regraft
from regraft.card import card_of
from regraft.checkpoint.recipes.derivation import derive_recipe


def squeezenet() -> nn.Module:
    return torchvision.models.squeezenet1_1(num_classes=7)


def with_new_end() -> nn.Module:
    model = regraft.truncate(squeezenet(), after="features")
    return regraft.append(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 3))


def stitched() -> nn.Module:
    back = timm.create_model("mobilenetv3_small_050", num_classes=4)
    return regraft.replace_head(regraft.stitch(squeezenet(), back, cut=("features.5", "blocks.2")), 5)


def copied() -> nn.Module:
    return regraft.remove(copy.deepcopy(with_new_end()), "features.7")


@pytest.mark.parametrize("make", [with_new_end, stitched, copied], ids=lambda make: make.__name__)
def test_save_of_an_edited_network_of_a_library_loads(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make().eval()
    images = torch.randn(2, 3, 64, 64)
    regraft.save(model, tmp_path / "net.safetensors")  # a warning would be an error
    loaded = regraft.load(tmp_path / "net.safetensors")
    assert torch.equal(loaded(images), model(images))
    assert card_of(loaded).recipe == derive_recipe(model).recipe


def test_derive_recipe_notices_what_changed_after_an_edit() -> None:
    model = with_new_end()
    model.get_submodule("features")[1] = nn.Tanh()
    recipe, reason = derive_recipe(model).recipe, derive_recipe(model).reason
    assert recipe is None
    assert reason is not None
    assert "features.1" in reason


def test_truncate_does_not_keep_what_was_cut_off_in_a_pickle() -> None:
    whole, cut = squeezenet(), regraft.truncate(squeezenet(), after="features.3")
    sizes = []
    for model in (whole, cut):
        torch.save(model, buffer := io.BytesIO())
        sizes.append(len(buffer.getvalue()))
    assert sizes[1] < sizes[0] / 10

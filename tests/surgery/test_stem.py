"""Other channels, the same filters: the answer is held against the original's on images that say the same."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.std_conv import StdConv2d
from torch import nn
from torchvision import models

import regraft
import tiny
from oracles import identical, same, snapshot
from regraft.card import Preprocessing, attach, card_of
from regraft.errors import EditError
from regraft.zoo import preprocessing_of
from surgery.models import without_init

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": models.resnet18,
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "vit_b_32": lambda: without_init(models.vit_b_32),
    "convnext_atto": lambda: timm.create_model("convnext_atto"),
    "levit_128s": lambda: timm.create_model("levit_128s"),
    "crossvit_tiny_240": lambda: timm.create_model("crossvit_tiny_240"),  # two stems
    "test_byobnet": lambda: timm.create_model("test_byobnet"),
}
TINY = ("plain", "residual", "root-token", "aux-head", "sequential")


@pytest.mark.parametrize("name", NETS)
def test_replace_stem_gives_for_a_gray_image_what_three_equal_channels_gave(name: str) -> None:
    model = NETS[name]().eval()
    before = snapshot(model)
    side = preprocessing_of(model).size
    gray = torch.randn(2, 1, side, side)
    edited = regraft.replace_stem(model, 1)
    with torch.no_grad():
        assert torch.allclose(edited(gray), model(gray.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    assert same(before, snapshot(model))
    assert preprocessing_of(edited).channels == 1


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", TINY)
def test_replace_stem_of_tiny_networks_in_double_precision_answers_as_before_up_to_rounding(
    name: str, channels: int
) -> None:
    model = tiny.build(name).eval().double()
    before = snapshot(model)
    edited = regraft.replace_stem(model, channels)
    assert same(before, snapshot(model))
    images = torch.randn(4, channels, tiny.SIDE, tiny.SIDE, dtype=torch.float64)
    alike = images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]
    if channels == 2:
        alike = torch.cat([1.5 * images, torch.zeros(4, 1, tiny.SIDE, tiny.SIDE)], 1)
    assert torch.allclose(edited(images), model(alike), rtol=1e-12, atol=1e-12)
    ours, theirs = edited.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert [key for key in ours if ours[key] is not theirs[key]] == [
        next(f"{path}.weight" for path, layer in edited.named_modules() if getattr(layer, "in_channels", 0) == channels)
    ]


@pytest.mark.parametrize("channels", [4, 7, 20])
def test_replace_stem_adds_channels_that_change_nothing_until_they_have_learned(channels: int) -> None:
    model = models.resnet18().eval()
    edited = regraft.replace_stem(model, channels)
    inputs = torch.randn(2, channels, 64, 64)
    assert identical(edited.conv1.weight[:, :3], model.conv1.weight)
    with torch.no_grad():
        assert torch.allclose(edited(inputs), model(inputs[:, :3]), atol=1e-5)
    edited.train()(inputs).square().sum().backward()
    assert edited.conv1.weight.grad[:, 3:].abs().sum() > 0


def test_replace_stem_with_as_many_channels_as_before_changes_nothing() -> None:
    model = tiny.build("plain")
    assert regraft.replace_stem(model, 3).conv1.weight is model.conv1.weight


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_replace_stem_keeps_all_settings_of_convolutions_of_every_dimension(dimensions: int, channels: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    settings: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "circular"}
    model = nn.Sequential(kind(3, 6, 3, **settings), nn.ReLU())
    inputs = torch.randn(2, channels, *[9] * dimensions)
    edited = regraft.replace_stem(model, channels, inputs=inputs)
    assert edited(inputs).shape == model(torch.randn(2, 3, *[9] * dimensions)).shape
    assert all(getattr(edited[0], key) == getattr(model[0], key) for key in settings)
    assert edited[0].bias is model[0].bias
    if channels == 1:
        assert torch.allclose(edited(inputs), model(inputs.expand(-1, 3, *[-1] * dimensions)), atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_replace_stem_gives_groups_a_gray_image(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU())
    edited = regraft.replace_stem(model, 1)
    gray = torch.randn(2, 1, 9, 9)
    assert edited[0].groups == 1
    assert torch.allclose(edited(gray), model(gray.expand(-1, 4, -1, -1)), atol=1e-5)


def test_replace_stem_leaves_what_was_frozen_frozen_and_pinned_and_shares_the_rest() -> None:
    class Stem(nn.Conv2d):  # of a class of one's own, which a freeze pins
        pass

    model = models.resnet18()
    model.conv1 = Stem(3, 64, 7, 2, 3, bias=False)
    regraft.freeze(model, until="layer1")
    pinned = [path for path, layer in model.named_modules() if regraft.anatomy.mode_dependence.is_pinned(layer)]
    assert "conv1" in pinned
    edited = regraft.replace_stem(model, 1)
    assert not edited.conv1.weight.requires_grad
    assert [
        path for path, layer in edited.named_modules() if regraft.anatomy.mode_dependence.is_pinned(layer)
    ] == pinned
    assert edited.bn1.weight is model.bn1.weight
    regraft.unfreeze(edited)
    edited.train()
    assert edited.conv1.training
    assert not model.conv1.training
    assert [path for path, layer in model.named_modules() if regraft.anatomy.mode_dependence.is_pinned(layer)] == pinned


@pytest.mark.parametrize(
    ("known", "channels", "expected"),
    [
        (Preprocessing(), 1, Preprocessing(mean=(0.449,), std=(0.226,))),
        (Preprocessing(size=96, resize=96), 3, Preprocessing(size=96, resize=96)),
        (Preprocessing(), 4, None),
        (Preprocessing(), 2, None),
    ],
)
def test_replace_stem_changes_the_preprocessing(
    known: Preprocessing, channels: int, expected: Preprocessing | None
) -> None:
    found = card_of(regraft.replace_stem(attach(models.resnet18(), preprocessing=known), channels)).preprocessing
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.mean == pytest.approx(expected.mean)
        assert found.std == pytest.approx(expected.std)
        assert (found.size, found.resize) == (expected.size, expected.resize)


def test_replace_stem_gives_a_gray_network_colours() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    found = card_of(regraft.replace_stem(model, 3)).preprocessing
    assert found is not None
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_replace_stem_changes_what_timm_says_of_a_network(channels: int) -> None:
    model = timm.create_model("test_vit")
    size = model.pretrained_cfg["input_size"]
    edited = regraft.replace_stem(model, channels)
    if hasattr(model, "in_chans"):  # not before timm 1.0.22
        assert (edited.in_chans, model.in_chans) == (channels, 3)
    assert edited.pretrained_cfg["input_size"] == edited.default_cfg["input_size"] == (channels, *size[1:])
    assert edited.get_submodule(edited.pretrained_cfg["first_conv"]).in_channels == channels
    assert model.pretrained_cfg["input_size"] == size
    assert edited.eval()(torch.randn(1, channels, *size[1:])).shape == (1, 1000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers' own modules
@pytest.mark.parametrize("channels", [1, 4])
def test_replace_stem_of_a_network_of_hugging_face_accepts_the_new_channels(channels: int) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**options, image_size=16, patch_size=8)
    model = transformers.ViTForImageClassification(config).eval()
    edited = regraft.replace_stem(model, channels)
    images = torch.randn(2, channels, 16, 16)
    alike = images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]
    assert torch.allclose(edited(images).logits, model(alike).logits, atol=1e-5)
    assert (edited.config.num_channels, model.config.num_channels) == (channels, 3)


def test_replace_stem_is_rebuilt_by_the_recipe(tmp_path: Any) -> None:
    model = regraft.create_model("mobilenet_v3_small", weights="none", num_classes=3)
    edited = regraft.replace_stem(model, 1).eval()
    recipe = card_of(edited).recipe
    assert recipe is not None
    assert (recipe.steps[-1].operation, recipe.steps[-1].arguments) == ("replace_stem", {"channels": 1})
    again = regraft.load(regraft.save(edited, tmp_path / "gray.safetensors")).eval()
    gray = torch.randn(2, 1, 64, 64)
    assert identical(again(gray), edited(gray))
    assert preprocessing_of(again) == preprocessing_of(edited)


class Standardized(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(StdConv2d(3, 8, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "channels", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 1, "begins with '0' (Linear), expected a convolution of the image"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 1)), 1, "begins with '0' (ConvTranspose2d)"),
        (nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 4, 1)), 1, "takes 48 channels that are made of the image"),
        (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), 8, "has 2 groups, each with channels of its own"),
        (nn.Sequential(nn.ReLU()), 1, "no layer with a width"),
        (Standardized(), 1, "(StdConv2d) computes its filters from other weights, as with weight standardization"),
        (Standardized(), 4, "Use replace(model, '0', …) with a layer of your own. Nothing was changed."),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), 1, "which has to be removed before"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), 1, "'0' (BatchNorm2d) would be given (1, 1, 224, 224)"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), 0, "a network takes at least 1 channel, not 0."),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_replace_stem_refuses_a_network_without_channels_to_change(
    model: nn.Module, channels: Any, message: str
) -> None:
    before = snapshot(model)
    with pytest.raises(EditError) as caught:
        regraft.replace_stem(model, channels)
    assert message in str(caught.value)
    assert "Nothing was changed." in str(caught.value)
    assert same(before, snapshot(model))


def test_replace_stem_names_what_needs_three_channels_later_on() -> None:
    model = models.googlenet(init_weights=False, aux_logits=False, transform_input=True)
    with pytest.raises(EditError, match=r"cannot give 'conv1.conv' 1 channels: "):
        regraft.replace_stem(model, 1)
    wrong = torch.randn(1, 3, 64, 64)
    with pytest.raises(EditError, match=r"'conv1' \(Conv2d\) would be given \(1, 3, 64, 64\)"):
        regraft.replace_stem(models.resnet18(), 1, inputs=wrong)

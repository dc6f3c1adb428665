"""Both ends of a small member of every family: its head and its stem, held against what the library itself builds."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from families import SOME_NAMES, images
from oracles import same, snapshot
from regraft import replace_head, replace_stem
from regraft.errors import EditError
from regraft.zoo import build

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of constructors

CLASSES = 7
TOLERANCE = 1e-3  # of the largest score, after random weights made of rounding what they like
STANDARDIZED = "computes its filters from other weights, as with weight standardization"
MADE_OF_THE_IMAGE = "channels that are made of the image"
WITHOUT_STEM = {  # what is refused, and why
    "timm/csatv2": MADE_OF_THE_IMAGE,
    "timm/gemma4_vit_167m": r"\(Linear\), expected a convolution",
    "timm/naflexvit_base_patch16_siglip": r"\(Linear\), expected a convolution",
    "timm/test_nfnet": STANDARDIZED,
    "timm/tresnet_m": MADE_OF_THE_IMAGE,
    "timm/vit_tiny_r_s16_p8_224": STANDARDIZED,
}


@pytest.mark.parametrize("name", SOME_NAMES)
def test_replace_head_gives_the_head_of_the_library_and_nothing_else_changes(name: str) -> None:
    model = build(name)
    inputs = images(model)
    model.eval()
    before = snapshot(model)
    edited = replace_head(model, CLASSES)
    assert same(before, snapshot(model))

    shapes = {key: tensor.shape for key, tensor in edited.state_dict().items()}
    theirs = without_memory(name)
    expected = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert list(shapes.items()) == list(expected.items())
    own = model.state_dict(keep_vars=True)
    changed = {
        key.rpartition(".")[0]
        for key, tensor in edited.state_dict(keep_vars=True).items()
        if tensor is not own.get(key)
    }
    heads = {key.rpartition(".")[0] for key in expected if key not in own or own[key].shape != expected[key]}
    assert changed == heads
    described = {path: layer.extra_repr() for path, layer in model.named_modules() if path not in heads}
    assert {path: layer.extra_repr() for path, layer in edited.named_modules() if path not in heads} == described
    kinds = {path: type(layer) for path, layer in model.named_modules() if path not in heads}
    assert {path: type(layer) for path, layer in edited.named_modules() if path not in heads} == kinds
    assert getattr(edited, "num_classes", CLASSES) == getattr(theirs, "num_classes", CLASSES) == CLASSES
    with torch.no_grad():
        assert main(edited(inputs)).shape == (len(inputs), CLASSES)
        scores = [
            x for x in tree_leaves(edited.train()(inputs)) if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]
    assert {score.shape[-1] for score in scores} == {CLASSES}


@pytest.mark.parametrize("name", sorted({*SOME_NAMES, *WITHOUT_STEM}))
def test_replace_stem_answers_as_the_old_one_did(name: str) -> None:
    model = build(name)
    inputs = images(model)
    model.eval()
    before = snapshot(model)
    if name in WITHOUT_STEM:
        for channels in (1, 4):
            with pytest.raises(EditError, match=WITHOUT_STEM[name]):
                replace_stem(model, channels)
        assert same(before, snapshot(model))
        return
    gray = inputs[:, :1]
    more = torch.cat([inputs, torch.randn_like(gray)], 1)
    for images_now, images_then in ((gray, gray.expand(-1, 3, -1, -1)), (more, inputs)):
        edited = replace_stem(model, images_now.shape[1])
        with torch.no_grad():
            ours, theirs = main(edited(images_now)), main(model(images_then))
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
        assert getattr(edited, "in_chans", images_now.shape[1]) == images_now.shape[1]
    assert same(before, snapshot(model))


def without_memory(name: str) -> nn.Module:
    """Build the network with as many classes as its own library does."""

    def make() -> nn.Module:
        if name.startswith("timm/"):
            return timm.create_model(name.removeprefix("timm/"), num_classes=CLASSES)
        settled = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        return torchvision.models.get_model(name, num_classes=CLASSES, **settled)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, NotImplementedError):  # a constructor that looks at the values of its tensors
            return make()


def main(output: object) -> torch.Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))

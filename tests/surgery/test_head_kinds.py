"""Networks with several heads, and heads of other kinds than a plain linear layer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from oracles import identical, same, snapshot
from regraft import create_model, load, replace_head, save
from regraft.card import card_of
from regraft.errors import EditError, InputError

NEW = 4


class Heads(nn.Module):
    """A trunk with several heads; `give` makes the output of the scores."""

    def __init__(self, widths: dict[str, int], give: Callable[[dict[str, torch.Tensor]], Any], **counts: int) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3)
        self.heads = nn.ModuleDict({name: nn.Conv2d(8, width, 1) for name, width in widths.items()})
        self.give = give
        vars(self).update(counts)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.trunk(x).relu()
        return self.give({name: head(x) for name, head in self.heads.items()})


class Detector(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.trunk = nn.Conv2d(3, 8, 3)
        self.scores, self.places = nn.Conv2d(8, 5 * num_classes, 1), nn.Conv2d(8, 20, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.trunk(x)
        scores = self.scores(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.num_classes)
        return scores, self.places(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)


IMAGES = torch.randn(2, 3, 8, 8)
REPLACED: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "deep supervision": (
        lambda: Heads(dict.fromkeys(("a", "b", "c"), 7), lambda maps: list(maps.values())),
        [(2, NEW, 6, 6)] * 3,
    ),
    "out and aux": (
        lambda: Heads({"aux": 7, "out": 7}, lambda maps: {"out": maps["out"], "aux": maps["aux"]}),
        [(2, NEW, 6, 6)] * 2,
    ),
    "sum of two": (lambda: Heads({"low": 7, "high": 7}, lambda maps: maps["low"] + maps["high"]), [(2, NEW, 6, 6)]),
    "classes and others": (
        lambda: Heads({"classes": 7, "angle": 2}, lambda maps: tuple(maps.values()), num_classes=7),
        [(2, NEW, 6, 6), (2, 2, 6, 6)],
    ),
    "detector": (lambda: Detector(3), [(2, 180, NEW), (2, 180, 4)]),
    "detector of 2": (lambda: Detector(2), [(2, 180, NEW), (2, 180, 4)]),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replace_head_replaces_every_head_of_the_classes_and_no_other(name: str) -> None:
    make, shapes = REPLACED[name]
    model = make().eval()
    before = snapshot(model)
    edited = replace_head(model, NEW, inputs=IMAGES)
    output = edited(IMAGES)
    leaves = (
        list(output.values()) if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else [output]
    )
    assert [tuple(leaf.shape) for leaf in leaves] == shapes
    assert same(before, snapshot(model))


ASKED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "two tasks": (
        lambda: Heads({"colour": 3, "shape": 5}, dict),
        ["'heads.colour' (3 outputs)", "'heads.shape' (5 outputs)"],
    ),
    "boxes as wide as classes": (
        lambda: Heads({"scores": 4, "boxes": 4}, dict, num_classes=4),
        ["'heads.scores'", "'heads.boxes'"],
    ),
    "classes and a background": (
        lambda: Heads({"x": 5, "y": 4}, dict, num_classes=4),
        ["'heads.x' (5 outputs)", "'heads.y'"],
    ),
    "a detector of 4": (lambda: Detector(4), ["'scores' (20 outputs)", "'places' (20 outputs)"]),
    "side by side": (
        lambda: Heads({"a": 3, "b": 5}, lambda maps: torch.cat(list(maps.values()), 1)),
        ["'heads.a' (3 outputs)", "'heads.b' (5 outputs)"],
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_replace_head_asks_which_where_it_is_unclear(name: str) -> None:
    make, parts = ASKED[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(EditError) as caught:
        replace_head(model, NEW, inputs=IMAGES)
    message = str(caught.value)
    assert "has several heads, and which of them give the classes is unclear" in message
    assert all(part in message for part in [*parts, "path='", "replace_head(model, {"])
    assert message.endswith("Nothing was changed.")
    assert same(before, snapshot(model))


def test_replace_head_does_what_its_question_says() -> None:
    model = Heads({"colour": 3, "shape": 5}, dict)

    def widths(edited: nn.Module) -> dict[str, int]:
        return {name: scores.shape[1] for name, scores in edited(IMAGES).items()}

    assert widths(replace_head(model, NEW, path="heads.shape", inputs=IMAGES)) == {"colour": 3, "shape": NEW}
    assert widths(replace_head(model, NEW, path=["heads.shape", "heads.colour"], inputs=IMAGES)) == {
        "colour": NEW,
        "shape": NEW,
    }
    assert widths(replace_head(model, {"heads.colour": 2, "heads.shape": 6}, inputs=IMAGES)) == {
        "colour": 2,
        "shape": 6,
    }
    layer = nn.Conv2d(8, 9, 1)
    edited = replace_head(model, {"heads.colour": layer}, inputs=IMAGES)
    assert edited.heads["colour"] is layer


def test_replace_head_with_heads_by_path_is_a_step_of_the_recipe(tmp_path: Path) -> None:
    model = create_model("squeezenet1_1", weights="none", num_classes=4)
    for new, path in [({"classifier.1": 6}, None), (6, ["classifier.1"])]:
        edited = replace_head(model, new, path=path)
        recipe = card_of(edited).recipe
        assert recipe is not None
        again = load(save(edited, tmp_path / "edited.safetensors"))
        assert again.classifier[1].out_channels == 6
        assert identical(again.classifier[1].weight, edited.classifier[1].weight)


@pytest.mark.parametrize(
    ("new", "path", "message"),
    [
        ({}, None, "heads by path are a dict such as {'classifier': 10}"),
        ({"a": 3}, "a", "and exclude path="),
        ({1: 3}, None, "a key of new is 1, expected a string"),
        ({"a": 0}, None, "a head needs at least 1 output, not 0"),
        ({"a": "x"}, None, "new['a'] is 'x', expected a whole number"),
        (3, [], "path is the path of a layer or a list of such, not []"),
        (3, 5, "path is 5, expected a string or a list or None"),
    ],
)
def test_replace_head_refuses_what_is_no_head_or_path(new: Any, path: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        replace_head(nn.Sequential(nn.Linear(2, 2)), new, path=path)
    assert message in str(caught.value)


SEGMENTATION = [
    ("fcn_resnet50", {"aux_loss": True}),
    ("deeplabv3_mobilenet_v3_large", {"aux_loss": False}),
    ("lraspp_mobilenet_v3_large", {}),
]


@pytest.mark.parametrize(("name", "options"), SEGMENTATION)
def test_replace_head_of_torchvisions_segmentation_gives_every_output_the_new_width(name: str, options: Any) -> None:
    with torch.device("meta"):
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=7, **options)
        edited = replace_head(model, NEW).eval()
        outputs = edited(torch.empty(1, 3, 64, 64))
    assert {key: value.shape[1] for key, value in outputs.items()} == dict.fromkeys(outputs, NEW)
    assert ("aux" in outputs) == options.get("aux_loss", False)


def test_replace_head_asks_for_the_heads_of_a_faster_rcnn_and_replaces_both() -> None:
    options: Any = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    model = models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=7, **options).eval()
    with pytest.raises(
        EditError, match=r"'roi_heads.box_predictor.cls_score' \(7 outputs\), '.*bbox_pred' \(28 outputs\)"
    ):
        replace_head(model, NEW)
    predictor = "roi_heads.box_predictor"
    edited = replace_head(model, {f"{predictor}.cls_score": NEW, f"{predictor}.bbox_pred": 4 * NEW}).eval()
    with torch.no_grad():
        (output,) = edited([torch.rand(3, 64, 64)])
    assert output["boxes"].shape == (len(output["labels"]), 4)
    assert set(output["labels"].tolist()) <= set(range(1, NEW))


FOLLOWERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(2),
    "batch norm without weights": lambda: nn.BatchNorm1d(2, affine=False),
    "layer norm": lambda: nn.LayerNorm(2),
    "prelu": lambda: nn.PReLU(2),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_replace_head_gives_what_follows_it_the_new_width(name: str) -> None:
    follower = FOLLOWERS[name]()
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2), follower)
    edited = replace_head(model, 3)
    assert edited(torch.randn(5, 4)).shape == (5, 3)
    assert type(edited[2]) is type(follower)
    assert model[2] is follower
    assert model(torch.randn(5, 4)).shape == (5, 2)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_replace_head_of_a_transposed_convolution(dimensions: int) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = nn.Sequential(convolution(3, 4, 3), kind(4, 2, 2, stride=2, output_padding=1))
    inputs = torch.randn(2, 3, *[8] * dimensions)
    edited = replace_head(model, 3, inputs=inputs)
    apply = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
    expected = apply(model[0](inputs), edited[1].weight, edited[1].bias, stride=2, output_padding=1)
    assert identical(edited(inputs), expected)
    assert expected.shape == (2, 3, *model(inputs).shape[2:])


def test_replace_head_of_bilinear_and_lazy_layers() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.both = nn.Linear(4, 6), nn.Bilinear(6, 6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.both(self.body(x), self.body(x))

    model, inputs = Pair(), torch.randn(5, 4)
    edited = replace_head(model, 3)
    features = model.body(inputs)
    assert edited(inputs).shape == (5, 3)
    assert identical(edited(inputs), F.bilinear(features, features, edited.both.weight, edited.both.bias))
    lazy = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(2))
    assert replace_head(lazy, 3)(torch.randn(5, 4)).shape == (5, 3)


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) @ self.weight


class ReadWeight(nn.Module):
    """A layer whose forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.centers = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(x), F.normalize(self.centers.weight))


def test_replace_head_of_a_bare_parameter_is_refused_in_words() -> None:
    with pytest.raises(EditError, match="the head is 'weight', a parameter that OwnWeight multiplies with itself"):
        replace_head(OwnWeight(), 3)


def test_replace_head_of_a_layer_that_is_only_read() -> None:
    assert replace_head(ReadWeight(), 3)(torch.randn(5, 4)).shape == (5, 3)
    with pytest.raises(EditError, match="that layer is never called, ReadWeight only reads its weight"):
        replace_head(ReadWeight(), nn.Linear(6, 3, bias=False))


def test_replace_head_inside_of_a_module_tells_the_network_inside_its_width() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = models.VisionTransformer(32, 16, 1, 2, 24, 48, num_classes=11)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    model = Around()
    untouched = copy.deepcopy(model.net.heads)
    edited = replace_head(model, NEW)
    assert edited(torch.randn(2, 3, 32, 32)).shape == (2, NEW)
    assert (edited.net.num_classes, model.net.num_classes) == (NEW, 11)
    assert identical(untouched.head.weight, model.net.heads.head.weight)

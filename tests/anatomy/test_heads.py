"""Heads are where outputs originate, inside any wrapper; hooks that compare outputs by value are the oracle."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torchvision import models

import tiny
from regraft import param_groups
from regraft.anatomy.heads import find_heads
from regraft.anatomy.model_facts import ModelFacts
from regraft.errors import EditError
from regraft.freezing.schedule import Schedule


class Around(nn.Module):
    """A network inside of a class of one's own, as a LightningModule holds it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> Any:
        return self.backbone(x)


class OwnVit(nn.Module):
    """A class token at the root, and the head registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.classify = nn.Linear(8, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).mT  # (N, T, D)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.classify(x[:, 0])


class BareWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).relu() @ self.weight * self.logit_scale.exp()


class Cosine(nn.Module):
    """The classifier of ArcFace and CosFace without its margin: normalized weights, and a learned scale."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(classes, features))
        self.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.centers))


class Tied(nn.Module):
    def __init__(self, *, has_layer: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        if has_layer:
            self.lm_head = nn.Linear(8, 10, bias=False)
            self.lm_head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.words(x))
        return self.lm_head(x) if hasattr(self, "lm_head") else F.linear(x, self.words.weight)


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.prototypes = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -((self.body(x)[:, None] - self.prototypes) ** 2).sum(-1)


class Halves(nn.Module):
    """Two layers that write their parts into one output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        out = x.new_zeros(len(x), 5)
        out[:, :3] = self.left(x)
        out[:, 3:] = self.right(x)
        return out


def small_vit() -> nn.Module:
    return models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=11)


def timm_vit(name: str = "test_vit") -> nn.Module:
    return timm.create_model(name, num_classes=11)


WRAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own class": (lambda: Around(timm_vit()), "backbone.head"),
    "two levels": (lambda: Around(Around(small_vit())), "backbone.backbone.heads.head"),
    "DataParallel": (lambda: nn.DataParallel(timm_vit()), "module.head"),
    "AveragedModel": (lambda: AveragedModel(small_vit()), "module.heads.head"),
    "compiled": (lambda: torch.compile(small_vit()), "_orig_mod.heads.head"),
    "Sequential": (lambda: nn.Sequential(nn.Identity(), timm_vit()), "1.head"),
    "root": (OwnVit, "classify"),
    "wrapped root": (lambda: Around(OwnVit()), "backbone.classify"),
}


def layers_that_give_the_output(model: nn.Module, inputs: torch.Tensor) -> set[str]:
    """Find by hooks the innermost layers whose output is, number by number, the output of the network."""
    given: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, path=path: given.update({path: output}))
        for path, layer in model.named_modules()
        if next(layer.parameters(), None) is not None
    ]
    with torch.no_grad():
        output = model(inputs)
    for handle in handles:
        handle.remove()
    equal = {path for path, one in given.items() if isinstance(one, torch.Tensor) and torch.equal(one, output)}
    return {
        path for path in equal if not any(other.startswith(f"{path}.") for other in equal if other != path) and path
    }


@pytest.mark.parametrize("name", WRAPPED)
def test_find_heads_finds_the_layer_that_gives_the_output_inside_of_any_module(name: str) -> None:
    make, expected = WRAPPED[name]
    model = make().eval()
    assert find_heads(model) == [expected]
    if name != "compiled":  # hooks would compile it
        side = 160 if any(type(layer).__module__.startswith("timm.") for layer in model.modules()) else 32
        assert layers_that_give_the_output(model, torch.randn(2, 3, side, side)) == {expected}


@pytest.mark.parametrize("name", WRAPPED)
def test_schedule_start_and_backbone_lr_take_the_head_of_a_network_inside(name: str) -> None:
    make, head = WRAPPED[name]
    model = make()
    rates = {id(p): group["lr"] for group in param_groups(model, lr=1.0, backbone_lr=0.1) for p in group["params"]}
    assert {name for name, p in model.named_parameters() if rates[id(p)] == 1.0} == {f"{head}.weight", f"{head}.bias"}
    Schedule.parse("head:1,all:1").start(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{head}.weight", f"{head}.bias"}


def test_param_groups_does_not_decay_what_a_network_inside_names() -> None:
    model = Around(timm_vit())
    groups = param_groups(model, lr=1.0, weight_decay=0.1)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in undecayed and p.ndim > 1}
    assert names == {f"backbone.{name}" for name in model.backbone.no_weight_decay()} & {
        name for name, _ in model.named_parameters()
    }
    assert "backbone.pos_embed" in names


KINDS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[str], set[str]]] = {
    "bare": (BareWeight, torch.randn(2, 4), ["weight"], {"weight", "logit_scale"}),
    "cosine": (
        lambda: nn.Sequential(nn.Linear(4, 8), Cosine(8, 3)),
        torch.randn(2, 4),
        ["1"],
        {"1.centers", "1.scale"},
    ),
    "tied layer": (lambda: Tied(has_layer=True), torch.ones(1, 4).long(), ["lm_head"], {"lm_head.weight"}),
    "tied": (lambda: Tied(has_layer=False), torch.ones(1, 4).long(), ["words"], {"words.weight"}),
    "prototypes": (Prototypes, torch.randn(2, 4), ["prototypes"], {"prototypes"}),
    "norm after": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.BatchNorm1d(3)),
        torch.randn(2, 4),
        ["1"],
        {"1.weight", "1.bias", "2.weight", "2.bias"},
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), parametrizations.weight_norm(nn.Linear(8, 3, bias=False))),
        torch.randn(2, 4),
        ["1"],
        {"1.parametrizations.weight.original0", "1.parametrizations.weight.original1"},
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), parametrizations.spectral_norm(nn.Linear(8, 3))),
        torch.randn(2, 4),
        ["1"],
        {"1.parametrizations.weight.original", "1.bias"},
    ),
    "halves": (
        Halves,
        torch.randn(2, 4),
        ["left", "right"],
        {f"{s}.{n}" for s in ("left", "right") for n in ("weight", "bias")},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_describe_heads_knows_heads_that_are_no_plain_last_layer(name: str) -> None:
    make, inputs, heads, parameters = KINDS[name]
    model = make()
    facts = ModelFacts(model, inputs)
    assert [head.path for head in facts.heads] == heads
    assert facts.head_parameters == parameters
    shapes = {shape for head in facts.heads for _, shape in head.outputs}
    assert shapes == {tuple(leaf.shape) for leaf in tree_leaves(model.eval()(inputs))}


@pytest.mark.parametrize("aux", [True, False])
def test_describe_heads_says_which_output_each_head_gives(aux: bool) -> None:
    with torch.device("meta"):
        model = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=7, aux_loss=aux)
    outputs = {head.path: [name for name, _ in head.outputs] for head in ModelFacts(model).heads}
    expected = {"classifier.4": ["['out']"], "aux_classifier.4": ["['aux']"]}
    assert outputs == (expected if aux else {"classifier.4": ["['out']"]})


def test_find_auxiliary_heads_of_a_network_inside() -> None:
    model = Around(tiny.build("aux-head"))
    assert ModelFacts(model).auxiliary_heads(find_heads(model)) == ["backbone.aux"]


@pytest.mark.parametrize("make", [nn.ReLU, lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.ReLU())])
def test_find_heads_of_what_has_no_layers(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(EditError, match="has no layer with parameters, so it has no head to replace"):
        find_heads(make())


def test_old_weight_norm_is_a_head_of_its_own_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.Linear(4, 8), nn.utils.weight_norm(nn.Linear(8, 3, bias=False)))
    assert find_heads(model) == ["1"]

"""Another head on the same body: the original keeps its structure, and what comes before the head stays equal to it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models

import tiny
from oracles import identical, same, snapshot
from regraft import create_model, load, replace_head, save
from regraft.anatomy.heads import find_heads
from regraft.card import attach, card_of
from regraft.errors import ArgumentError, EditError, ModelError, SelectionError
from surgery.models import NEW, without_init


def small_vit() -> nn.Module:
    return models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=11)


NETS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "resnet18": (models.resnet18, 64, ("fc",)),
    "alexnet": (lambda: without_init(models.alexnet), 64, ("classifier.6",)),
    "squeezenet1_1": (models.squeezenet1_1, 64, ("classifier.1",)),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 64, ("classifier.3",)),
    "densenet121": (lambda: without_init(models.densenet121), 64, ("classifier",)),
    "vit": (small_vit, 32, ("heads.head",)),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), 64, ("head.fc",)),
    "deit_tiny_distilled_patch16_224": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
        224,
        ("head", "head_dist"),
    ),
    "levit_128s": (lambda: timm.create_model("levit_128s"), 224, ("head.linear", "head_dist.linear")),
}


@pytest.mark.parametrize("name", NETS)
def test_replace_head_leaves_features_bit_equal_and_the_original_untouched(name: str) -> None:
    make, side, heads = NETS[name]
    model = make().eval()
    before = snapshot(model)
    widths = {path: layer.extra_repr() for path, layer in model.named_modules()}
    assert tuple(find_heads(model)) == heads
    edited = replace_head(model, NEW)

    assert same(before, snapshot(model))
    assert {path: layer.extra_repr() for path, layer in model.named_modules()} == widths
    assert [type(layer) for layer in edited.modules()] == [type(layer) for layer in model.modules()]
    ours, theirs = edited.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert (ours[key] is tensor) == (key.rpartition(".")[0] not in heads), key

    fed: dict[tuple[str, str], torch.Tensor] = {}
    for which, network in (("original", model), ("edited", edited)):
        for head in heads:
            network.get_submodule(head).register_forward_pre_hook(
                lambda _, args, key=(which, head): fed.update({key: args[0].clone()})
            )
    inputs = torch.randn(2, 3, side, side)
    with torch.no_grad():
        original, new = model(inputs), edited(inputs)
    assert new.shape == (2, NEW)
    assert original.shape[1] != NEW
    assert all(identical(fed["original", head], fed["edited", head]) for head in heads)


@pytest.mark.parametrize("name", tiny.ALL)
def test_replace_head_of_every_tiny_network(name: str) -> None:
    model = tiny.build(name).eval()
    before = snapshot(model)
    edited = replace_head(model, NEW)
    assert edited(tiny.batch(name)).shape == (6, NEW)
    assert same(before, snapshot(model))


def test_find_heads_takes_the_layer_executed_last_and_not_registered_last() -> None:
    assert find_heads(tiny.build("residual")) == ["head"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_replace_head_has_the_mode_and_the_dtype_of_the_old(training: bool, dtype: torch.dtype) -> None:
    model = tiny.build("plain").to(dtype).train(training)
    head = replace_head(model, NEW).fc
    assert (head.training, head.weight.dtype, head.bias.dtype) == (training, dtype, dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_replace_head_has_a_bias_where_the_old_had_one(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=bias))
    assert (replace_head(model, NEW)[1].bias is not None) == bias


def test_replace_head_takes_a_module() -> None:
    model = tiny.build("residual").eval()
    head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, NEW))
    edited = replace_head(model, head)
    assert edited.head is head
    assert not head.training
    assert edited(tiny.batch("residual")).shape == (6, NEW)


def test_replace_head_gives_two_heads_modules_of_their_own() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    edited = replace_head(model, nn.Linear(192, NEW))
    assert edited.head.weight is not edited.head_dist.weight
    assert edited.head.weight.shape == edited.head_dist.weight.shape == (NEW, 192)


def test_replace_head_gives_a_network_that_came_without_a_head_one() -> None:
    model = timm.create_model("test_vit", num_classes=0).eval()
    inputs = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert find_heads(model) == ["head"]
    edited = replace_head(model, NEW)
    features = model(inputs)
    assert identical(edited(inputs), edited.head(features))
    assert edited(inputs).shape == (2, NEW)
    assert edited.num_classes == NEW
    assert identical(model(inputs), features)
    assert features.shape == (2, model.num_features)


def test_replace_head_takes_a_path_of_the_layer_to_replace() -> None:
    model = tiny.build("aux-head")
    edited = replace_head(model, NEW, path="aux")
    assert edited.aux.out_features == NEW
    assert edited.fc.out_features == tiny.CLASSES


def test_replace_head_puts_a_module_in_the_place_of_a_layer_without_parameters() -> None:
    model, inputs = tiny.build("plain").eval(), tiny.batch("plain")
    bounds = nn.Hardtanh(-0.1, 0.1)
    edited = replace_head(model, bounds, path="dropout")
    handle = model.dropout.register_forward_hook(lambda _, args, __: bounds(args[0]))
    assert identical(edited(inputs), model(inputs))
    handle.remove()
    assert not identical(edited(inputs), model(inputs))


@pytest.mark.parametrize(
    ("new", "path", "error", "message"),
    [
        (0, None, EditError, "a head needs at least 1 output, not 0. Nothing was changed."),
        (-3, None, EditError, "not -3"),
        (NEW, "bn1", EditError, "the head 'bn1' is a BatchNorm2d, which cannot be built for 7 classes."),
        (NEW, "dropout", EditError, "the head 'dropout' is a Dropout"),
        (NEW, "head", SelectionError, "no layer 'head' in PlainCnn."),
    ],
)
def test_replace_head_that_fails_changes_nothing(
    new: int, path: str | None, error: type[Exception], message: str
) -> None:
    model = tiny.build("plain")
    before = snapshot(model)
    with pytest.raises(error) as caught:
        replace_head(model, new, path=path)
    assert message in str(caught.value)
    assert same(before, snapshot(model))


def test_replace_head_finds_no_head_in_a_network_without_parameters() -> None:
    with pytest.raises(EditError, match="ReLU has no layer with parameters, so it has no head to replace"):
        replace_head(nn.ReLU(), NEW)


def test_replace_head_is_recorded_in_the_recipe() -> None:
    model = create_model("mobilenet_v3_small", weights="none", num_classes=4)
    recipe = card_of(replace_head(model, NEW)).recipe
    assert recipe is not None
    assert recipe.source.name == "mobilenet_v3_small"
    assert [(step.operation, step.arguments) for step in recipe.steps] == [
        ("replace_head", {"path": "classifier.3", "new": 4}),
        ("replace_head", {"path": "classifier.3", "new": NEW}),
    ]
    original = card_of(model).recipe
    assert original is not None
    assert len(original.steps) == 1


def test_replace_head_with_a_head_that_cannot_be_described_ends_the_recipe() -> None:
    model = create_model("squeezenet1_1", weights="none")

    class Local(nn.Dropout):
        pass

    edited = replace_head(model, Local(), path="classifier.0")
    assert card_of(edited).recipe is None
    assert card_of(model).recipe is not None


@pytest.mark.parametrize("has_recipe", [True, False])
def test_replace_head_forgets_the_classes_of_the_old_head(has_recipe: bool) -> None:
    model = create_model("squeezenet1_1", weights="none") if has_recipe else tiny.build("plain")
    attach(model, classes=("ants", "bees"), task="classification", metrics={"accuracy": 1.0})
    edited = replace_head(model, 3)
    assert (card_of(edited).classes, card_of(edited).metrics) == (None, {})
    assert card_of(model).classes == ("ants", "bees")


def test_replace_head_follows_the_random_state() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        weights.append(replace_head(tiny.build("plain"), NEW).fc.weight)
    assert identical(*weights)
    assert not identical(weights[0], replace_head(tiny.build("plain"), NEW).fc.weight)


def test_replace_head_shares_the_body_that_trains_with_the_original() -> None:
    model = tiny.build("plain")
    head = copy.deepcopy(model.fc)
    edited = replace_head(model, NEW)
    optimizer = torch.optim.SGD(edited.parameters(), lr=1.0)
    edited(tiny.batch("plain")).square().sum().backward()
    optimizer.step()
    assert identical(edited.conv1.weight, model.conv1.weight)
    assert identical(model.fc.weight, head.weight)


def test_replace_head_goes_by_registration_where_a_network_cannot_run_on_shapes() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum().item() > 0:
                x = self.body(x)
            return self.head(x)

    model, inputs = Branches(), torch.ones(3, 4)
    edited = replace_head(model, NEW)
    assert edited.head.weight.shape == (NEW, 4)
    assert identical(edited(inputs), edited.head(model.body(inputs)))


def test_create_model_refuses_names_that_do_not_exist_before_anything_is_built() -> None:
    with pytest.raises(ModelError, match="no model 'resnet81'"):
        create_model("resnet81", weights="none", num_classes=NEW)


def test_save_follows_replace_head(tmp_path: Path) -> None:
    edited = replace_head(tiny.sequential(), NEW)
    tensors = load_file(save(edited, tmp_path / "edited.safetensors"))
    assert tensors.keys() == edited.state_dict().keys()
    assert all(identical(tensors[name], tensor) for name, tensor in edited.state_dict().items())
    assert len(list(tensors.values())[-1]) == NEW


KEPT = {0: 2, 3: 0, 4: 6}


@pytest.mark.parametrize("name", [*NETS, *tiny.ALL])
def test_replace_head_keeps_rows_of_kept_classes_bit_identical_and_their_scores_equal(name: str) -> None:
    make, side, heads = NETS[name] if name in NETS else (lambda: tiny.build(name), 0, ())
    model = make().eval()
    torch.manual_seed(5)  # not that of the old head
    before = snapshot(model)
    edited = replace_head(model, NEW, keep=KEPT)
    assert same(before, snapshot(model))
    old, new = list(KEPT), list(KEPT.values())
    for head in heads or find_heads(model):
        ours, theirs = edited.get_submodule(head), model.get_submodule(head)
        assert identical(ours.weight[new], theirs.weight[old])
        assert identical(ours.bias[new], theirs.bias[old])
        assert not any(identical(ours.weight[row], other) for row in {*range(NEW)} - {*new} for other in theirs.weight)
    inputs = torch.randn(2, 3, side, side) if side else tiny.batch(name)
    with torch.no_grad():
        a, b = edited(inputs)[:, new], model(inputs)[:, old]
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_replace_head_with_a_class_that_joins_leaves_a_trained_network_as_good() -> None:
    model = tiny.build("plain").eval()
    inputs = tiny.batch("plain", 64)
    scores = replace_head(model, tiny.CLASSES + 1, keep={k: k for k in range(tiny.CLASSES)}).eval()(inputs)
    assert torch.equal(scores[:, : tiny.CLASSES].argmax(1), model(inputs).argmax(1))


def test_replace_head_keeps_classes_by_their_names() -> None:
    model = attach(tiny.build("plain"), classes=("ant", "bee", "cat", "dog", "elk"))
    edited = replace_head(model, 2, keep={"dog": 0, "bee": 1})
    assert identical(edited.fc.weight, model.fc.weight[[3, 1]])
    with pytest.raises(EditError, match="keep names the old class 'bees', which is unknown: Nearest: 'bee'"):
        replace_head(model, 2, keep={"bees": 0})
    with pytest.raises(EditError, match="gives the old class 1 twice"):
        replace_head(model, 2, keep={"bee": 0, 1: 1})


def test_replace_head_kept_classes_are_no_part_of_the_recipe(tmp_path: Path) -> None:
    model = create_model("squeezenet1_1", weights="none", num_classes=4)
    edited = replace_head(model, 3, keep={0: 0, 2: 1})
    recipe = card_of(edited).recipe
    assert recipe is not None
    assert recipe.steps[-1].arguments == {"path": "classifier.1", "new": 3}
    again = load(save(edited, tmp_path / "kept.safetensors"))
    assert identical(again.classifier[1].weight[:2], model.classifier[1].weight[[0, 2]])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({5: 0}, "keep names the old class 5, expected a number from 0 to 4 ('fc' has 5 classes, its successor 3)"),
        ({-1: 0}, "keep names the old class -1"),
        ({0: 3}, "keep names the new class 3, expected a number from 0 to 2"),
        ({0: 1, 2: 1}, "keep gives two old classes the same new one, 1"),
        ({"ant": 1}, "keep names the old class 'ant', which is unknown: the model's card has no names of classes"),
    ],
)
def test_replace_head_names_classes_that_cannot_be_kept(keep: Any, message: str) -> None:
    model = tiny.build("plain")
    before = snapshot(model)
    with pytest.raises(EditError) as caught:
        replace_head(model, 3, keep=keep)
    assert message in str(caught.value)
    assert str(caught.value).endswith("Nothing was changed.")
    assert same(before, snapshot(model))


def test_replace_head_with_a_module_keeps_rows_where_they_fit_and_changes_none_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    edited = replace_head(model, nn.LazyLinear(3), keep={4: 2})
    assert identical(edited[1].weight[2], model[1].weight[4])
    head = nn.Linear(6, 3, bias=False)
    weight = head.weight.clone()
    for other in (head, nn.Sequential(nn.Linear(6, 3))):
        with pytest.raises(EditError, match="no classes of '1' can be kept: it is a Linear, and another"):
            replace_head(model, other, keep={4: 2})
    assert identical(head.weight, weight)


@pytest.mark.parametrize("new", [True, "7", 2.0, nn.Linear])
def test_replace_head_refuses_what_is_no_head(new: Any) -> None:
    with pytest.raises(ArgumentError, match=r"replace_head: new is .*expected a whole number .*or a torch\.nn\.Module"):
        replace_head(tiny.build("plain"), new)


@pytest.mark.parametrize("keep", [{True: 1}, {0.0: 1}, {0: "a"}])
def test_replace_head_refuses_classes_to_keep_that_are_neither_numbers_nor_names(keep: Any) -> None:
    with pytest.raises(ArgumentError, match=r"replace_head: (a key of )?keep.* is .*, expected"):
        replace_head(tiny.build("plain"), 3, keep=keep)

import re

import pytest
from torch import nn
from torchvision import models

import tiny
from regraft import freeze, freeze_state, select, unfreeze
from regraft.errors import ArgumentError, SelectionError


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return models.resnet18()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1.0.conv1", lambda path, layer: path == "layer1.0.conv1"),
        ("", lambda path, layer: path == ""),
        ("layer[12].*.bn?", lambda path, layer: bool(re.fullmatch(r"layer[12]\..*\.bn.", path))),
        ("layer1*", lambda path, layer: path.startswith("layer1")),
        (r"re:layer\d\.1", lambda path, layer: bool(re.fullmatch(r"layer\d\.1", path))),
        ("type:BatchNorm2d", lambda path, layer: type(layer) is nn.BatchNorm2d),
        ("type:Module", lambda path, layer: True),
        ("children[:2]", lambda path, layer: path in ("conv1", "bn1")),
        ("children[-2:]", lambda path, layer: path in ("avgpool", "fc")),
        ("children[8:9]", lambda path, layer: path == "avgpool"),
        ("children[0]", lambda path, layer: path == "conv1"),
        ("children[-1]", lambda path, layer: path == "fc"),
        ("children[4].0", lambda path, layer: path == "layer1.0"),
        ("children[4:6].*.bn1", lambda path, layer: bool(re.fullmatch(r"layer[12]\.\d\.bn1", path))),
        ("children[4].children[-1]", lambda path, layer: path == "layer1.1"),
        ("children[:].1.bn2", lambda path, layer: bool(re.fullmatch(r"layer\d\.1\.bn2", path))),
        ("layer4[:1]", lambda path, layer: path == "layer4.0"),
        ("head", lambda path, layer: path == "fc"),
    ],
)
def test_select_takes_each_form_as_it_says(resnet18: nn.Module, pattern: str, expected: object) -> None:
    wanted = [path for path, layer in resnet18.named_modules() if expected(path, layer)]
    assert wanted
    assert select(resnet18, pattern) == wanted


def test_select_unites_several_patterns_in_registration_order(resnet18: nn.Module) -> None:
    assert select(resnet18, "fc", "type:Linear", "conv1") == ["conv1", "fc"]


def test_select_takes_nothing_for_no_pattern(resnet18: nn.Module) -> None:
    assert select(resnet18) == []


def test_select_takes_a_layer_with_two_names_under_both() -> None:
    assert select(tiny.build("sequential"), "type:ReLU") == ["2", "3.1", "8"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer5.0.conv1", "no layer 'layer5.0.conv1' in ResNet. Nearest: 'layer4.0.conv1'"),
        ("layerx*", "no layer 'layerx*' in ResNet."),
        ("re:conv9", "no layer 're:conv9' in ResNet."),
        ("re:(", "'re:(' is not a regular expression: "),
        ("type:BatchNorm3d", "no layer of type 'BatchNorm3d'. Nearest: 'BatchNorm2d'."),
        ("type:Xyzzy", "no layer of type 'Xyzzy'. Its types: AdaptiveAvgPool2d, BasicBlock"),
        ("children[10:]", "'children[10:]' selects nothing: ResNet has 10 top-level children: conv1, bn1"),
        ("children[10]", "'children[10]' selects nothing"),
        ("children[-11]", "'children[-11]' selects nothing"),
        ("children[]", "'children[]' selects nothing"),
        ("children[4].9", "'children[4].9' selects nothing: no layer '9' in Sequential. Its top-level layers: 0, 1."),
        ("children[4:6].head", "'children[4:6].head' selects nothing: no layer 'head' in Sequential."),
        ("layer1[5:]", "'layer1[5:]' selects nothing: 'layer1' has 2 children: 0, 1."),
        ("backbone", "For all but the head, write freeze(model), then unfreeze(model, 'head')."),
    ],
)
def test_select_refuses_a_pattern_that_matches_nothing(resnet18: nn.Module, pattern: str, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        select(resnet18, "conv1", pattern)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("dropout",)}, "'dropout' selects no parameters of PlainCnn: nothing to change."),
        ({"until": "nowhere"}, "no layer 'nowhere' in PlainCnn."),
        ({"patterns": ("conv1", "conv3")}, "no layer 'conv3' in PlainCnn. Nearest: 'conv2', 'conv1'."),
    ],
)
def test_freeze_that_fails_changes_nothing(options: dict[str, object], message: str) -> None:
    model = tiny.build("plain")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(SelectionError) as caught:
        freeze(model, *options.get("patterns", ()), until=options.get("until"))
    assert message in str(caught.value)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "take",
    [
        lambda model: (["conv1", "layer1"],),
        lambda model: (("conv1", model.layer1),),
        lambda model: (model.layer1, {"conv1"}),
        lambda model: (name for name in ("layer1", "conv1")),
        lambda model: ((layer for layer in (model.conv1, model.layer1)),),
        lambda model: (model.conv1, model.layer1[:]),
    ],
    ids=["list", "tuple", "layers", "names", "generator", "slice of a list of layers"],
)
def test_freeze_takes_layers_and_lists_as_their_paths(resnet18: nn.Module, take: object) -> None:
    with freeze_state(resnet18):
        freeze(resnet18, *take(resnet18))
        frozen = {name for name, parameter in resnet18.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in resnet18.named_parameters() if name.startswith(("conv1.", "layer1."))}
    assert select(resnet18, *take(resnet18)) in (["conv1", "layer1"], ["conv1", "layer1.0", "layer1.1"])


def test_freeze_until_takes_a_layer_and_a_pattern(resnet18: nn.Module) -> None:
    frozen = []
    for until in ("layer1", resnet18.layer1, "children[:5]", ["conv1", "layer1"]):
        with freeze_state(resnet18):
            freeze(resnet18, until=until)
            frozen.append([parameter.requires_grad for parameter in resnet18.parameters()])
    assert frozen[1:] == frozen[:1] * 3


def test_freeze_takes_the_head_by_its_role_only_where_no_layer_has_that_path() -> None:
    with freeze_state(model := tiny.build("residual")):
        freeze(model, "head")
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"head.weight", "head.bias"}
    with pytest.raises(SelectionError, match="'head' selects nothing: ReLU has no layer with parameters"):
        select(nn.ReLU(), "head")
    model = tiny.build("plain")
    freeze(model)
    unfreeze(model, "head")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda model: [], "patterns[0] is a list of 0, so it names no layer. Leave it out to take the whole model."),
        (
            lambda model: 6,
            "Write 'children[6]' for that top-level layer alone, 'children[:6]' for the first 6.",
        ),
        (
            lambda model: -2,
            "'children[-2]' for that top-level layer alone, 'children[:-2]' for all but the last 2.",
        ),
        (lambda model: slice(None, 6), "Write 'children[:6]' for these top-level layers."),
        (lambda model: nn.BatchNorm2d, "Write 'type:BatchNorm2d' for all layers of that class."),
        (lambda model: None, "patterns[0] is None, expected a pattern, a layer or a list. Leave it out"),
        (lambda model: lambda name: True, "[name for name, layer in model.named_modules() if …]"),
        (lambda model: nn.ReLU(), "patterns[0] is a ReLU that is no layer of this ResNet."),
        (lambda model: model.fc.weight, "Write 'params:fc.weight' for it alone, or 'fc' for its layer."),
        (lambda model: model.layer1.parameters(), "pass the layer itself, without .parameters()."),
        (lambda model: model.named_children(), "Pass the names alone: [name for name, _ in …]."),
        (lambda model: nn.Parameter(model.fc.bias), "It is no parameter of this ResNet."),
        (lambda model: 0.5, "patterns[0] is 0.5, expected a pattern, a layer or a list. help(regraft.select)"),
    ],
)
def test_freeze_says_what_to_write_instead_of_what_is_no_pattern(
    resnet18: nn.Module, take: object, message: str
) -> None:
    for function in (freeze, unfreeze, select):
        with pytest.raises(ArgumentError) as caught:
            function(resnet18, take(resnet18))
        assert f"{function.__name__}: patterns[0] is " in str(caught.value)
        assert message in str(caught.value)
    with pytest.raises(ArgumentError, match="freeze: until is "):
        freeze(resnet18, until=0.5)
    assert all(parameter.requires_grad for parameter in resnet18.parameters())

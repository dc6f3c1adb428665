import re

import pytest
from torch import nn
from torchvision import models

import tiny
from regraft import freeze, select
from regraft.errors import SelectionError


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

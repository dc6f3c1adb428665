import pytest
import torch
from torch import nn
from torchvision import models

import tiny
from regraft import build_optimizer, freeze, param_groups
from regraft.errors import ConfigError, SelectionError

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def identities(optimizer: torch.optim.Optimizer) -> list[int]:
    return sorted(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


@pytest.mark.parametrize("patterns", [None, ("children[:1]",), ("children[1:3]",)], ids=["all", "one", "two"])
@pytest.mark.parametrize("name", ["plain", "residual", "root-token", "tied", "functional-dropout", "aux-head"])
def test_build_optimizer_takes_exactly_the_trainable_parameters(name: str, patterns: tuple[str, ...] | None) -> None:
    model = tiny.build(name)
    if patterns is not None:
        freeze(model, *patterns)
    optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    assert identities(optimizer) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [models.resnet18, models.convnext_tiny, lambda: tiny.build("root-token")])
def test_build_optimizer_decays_no_biases_and_norms(make: object) -> None:
    with torch.device("meta"):
        model = make()
    optimizer = build_optimizer("sgd", model, lr=0.1, weight_decay=0.3, momentum=0.9)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {id(p) for layer in model.modules() if isinstance(layer, NORMS) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or id(parameter) in norms or parameter.ndim < 2
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name
    assert all(group["momentum"] == 0.9 and group["lr"] == 0.1 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        ((), set()),
        (("bias",), {"conv2.bias", "bn.weight", "bn.bias", "matrix_norm.bias"}),
        (("norm",), {"bn.weight", "bn.bias", "matrix_norm.weight", "matrix_norm.bias"}),
    ],
)
def test_param_groups_spares_what_is_chosen(no_decay: tuple[str, ...], spared: set[str]) -> None:
    model = nn.ModuleDict({"conv2": nn.Conv2d(2, 2, 1), "bn": nn.BatchNorm2d(2), "matrix_norm": nn.LayerNorm((2, 2))})
    groups = param_groups(model, 0.1, 0.2, no_decay=no_decay)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert found == spared


def test_param_groups_leaves_out_a_group_without_parameters() -> None:
    assert len(param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


@pytest.mark.parametrize("name", ["adamw", "AdamW", "SGD", torch.optim.AdamW])
def test_build_optimizer_takes_a_name_in_any_case_or_a_class(name: str | type[torch.optim.Optimizer]) -> None:
    made = build_optimizer(name, nn.Linear(2, 2), lr=0.1)
    assert type(made).__name__.lower() == (name if isinstance(name, str) else name.__name__).lower()


def test_build_optimizer_says_how_to_thaw_where_nothing_is_trainable() -> None:
    model = tiny.build("plain")
    freeze(model)
    with pytest.raises(SelectionError) as caught:
        build_optimizer("adamw", model, lr=0.1)
    message = str(caught.value)
    assert "every parameter of PlainCnn is frozen" in message
    assert "regraft.unfreeze(model, 'fc')" in message
    assert "top-level layers: conv1, bn1, conv2, bn2, fc." in message


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("adamx", nn.Linear(2, 2)), {}, ConfigError, "no optimizer 'adamx' in torch.optim or timm. Nearest: 'adam"),
        (("adamw", nn.Linear(2, 2)), {"momentum": 0.9}, ConfigError, "does not take {'momentum': 0.9}"),
        (("sgd", nn.Linear(2, 2)), {"momentum": -1.0}, ConfigError, "Invalid momentum value"),
        (("adamw", nn.ReLU()), {}, SelectionError, "ReLU has no parameters, so there is nothing to train"),
    ],
)
def test_build_optimizer_says_what_is_wrong(
    arguments: tuple[str, nn.Module], options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        build_optimizer(*arguments, lr=0.1, **options)
    assert message in str(caught.value)

"""Heads whose weights are normed, parametrized or adapted."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from regraft import replace_head
from regraft.errors import EditError


class CosineLinear(nn.Linear):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


def old_norm(norm: Callable[[nn.Module], nn.Module], bias: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(nn.Linear(6, 2, bias=bias))


LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "weight norm": lambda bias: parametrizations.weight_norm(nn.Linear(6, 2, bias=bias)),
    "spectral norm": lambda bias: parametrizations.spectral_norm(nn.Linear(6, 2, bias=bias)),
    "orthogonal": lambda bias: parametrizations.orthogonal(nn.Linear(6, 2, bias=bias)),
    "old weight norm": lambda bias: old_norm(nn.utils.weight_norm, bias),
    "old spectral norm": lambda bias: old_norm(nn.utils.spectral_norm, bias),
    "pruned": lambda bias: prune.l1_unstructured(nn.Linear(6, 2, bias=bias), "weight", 2),
    "plain": lambda bias: nn.Linear(6, 2, bias=bias),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_replace_head_keeps_the_norm_of_the_weights(name: str, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), LAYERS[name](bias))
    head = replace_head(model, 3)[1]
    assert head(torch.randn(5, 6)).shape == (5, 3)
    names = {name for name, _ in model[1].named_parameters()}
    expected = {"weight_orig": "weight"} if name == "pruned" else {}
    assert {name for name, _ in head.named_parameters()} == {expected.get(name, name) for name in names}
    assert all(parameter.requires_grad for parameter in head.parameters())
    if name == "spectral norm":
        for _ in range(50):
            head.train()(torch.randn(5, 6))
        assert torch.linalg.matrix_norm(head.weight, 2).item() == pytest.approx(1, abs=1e-2)
    if name == "orthogonal":
        assert torch.allclose(head.weight @ head.weight.T, torch.eye(3), atol=1e-5)


def test_replace_head_of_dino_keeps_the_lengths_frozen_at_one() -> None:
    last = parametrizations.weight_norm(nn.Linear(6, 2, bias=False))
    lengths = last.parametrizations.weight.original0
    lengths.data.fill_(1)
    lengths.requires_grad_(False)
    head = replace_head(nn.Sequential(nn.Linear(4, 6), last), 3)[1]
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(3))
    flags = {name: parameter.requires_grad for name, parameter in head.named_parameters()}
    assert flags == {"parametrizations.weight.original0": False, "parametrizations.weight.original1": True}


@pytest.mark.parametrize("name", ["plain", "weight norm", "old weight norm", "pruned"])
def test_replace_head_keeps_classes_of_normed_weights(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), LAYERS[name](True)).eval()
    edited = replace_head(model, 3, keep={0: 2, 1: 0}).eval()
    inputs = torch.randn(5, 4)
    assert torch.allclose(edited(inputs)[:, [2, 0]], model(inputs), atol=1e-6)


@pytest.mark.parametrize("name", ["spectral norm", "orthogonal", "old spectral norm"])
def test_replace_head_refuses_to_keep_classes_that_are_normed_together(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), LAYERS[name](True))
    with pytest.raises(EditError, match="no classes of '1' can be kept"):
        replace_head(model, 3, keep={0: 2})


def test_replace_head_keeps_the_forward_of_a_cosine_classifier() -> None:
    model = nn.Sequential(nn.Linear(4, 6), CosineLinear(6, 2))
    head = replace_head(model, 3)[1]
    assert type(head) is CosineLinear
    assert (head.out_features, head.weight.shape) == (3, (3, 6))
    assert head.scale.item() == 3
    inputs = torch.randn(5, 6)
    expected = 3 * torch.nn.functional.cosine_similarity(inputs[:, None], head.weight[None], dim=-1)
    assert torch.allclose(head(inputs), expected, atol=1e-5)
    assert model[1].weight.shape == (2, 6)


class Unknown(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale


def test_replace_head_refuses_parametrizations_with_tensors_of_their_own() -> None:
    head = nn.Linear(6, 2)
    parametrize.register_parametrization(head, "weight", Unknown(2))
    with pytest.raises(EditError, match="the weight of the head '1' is computed by a Unknown with tensors of its own"):
        replace_head(nn.Sequential(nn.Linear(4, 6), head), 3)


class Adapter(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_replace_head_of_an_adapted_layer_gives_a_plain_one() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Adapter(nn.Linear(6, 2)))
    edited = replace_head(model, 3)
    assert type(edited[1]) is nn.Linear
    assert edited(torch.randn(5, 4)).shape == (5, 3)
    with pytest.raises(EditError, match="no classes of '1' can be kept"):
        replace_head(model, 3, keep={0: 0})

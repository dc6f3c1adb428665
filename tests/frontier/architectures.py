"""Twelve architectures, patterns of freezing, and small networks that tracing finds hard."""

from collections.abc import Callable

import torch
from torch import nn
from torchvision import models

import regraft
from regraft.anatomy.heads import find_heads
from regraft.anatomy.model_facts import ModelFacts


def middle(model: nn.Module) -> str:
    depths = ModelFacts(model).depths
    order = sorted(set(depths.values()))
    half = order[(len(order) - 1) // 2]
    return [name for name, _ in model.named_parameters() if depths.get(name) == half][-1].rpartition(".")[0]


def head_alone(model: nn.Module) -> None:
    regraft.freeze(model)
    regraft.unfreeze(model, *find_heads(model))


def head_and_a_late_norm(model: nn.Module) -> None:
    head_alone(model)
    norms = [
        path for path, layer in model.named_modules() if "Norm" in type(layer).__name__ and list(layer.parameters())
    ]
    regraft.unfreeze(model, norms[-2])


def late_biases(model: nn.Module) -> None:
    head_alone(model)
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    for name in biases[-6:]:
        regraft.unfreeze(model, f"params:{name}")


PATTERNS: dict[str, Callable[[nn.Module], object]] = {
    "head": head_alone,
    "half": lambda model: regraft.freeze(model, until=middle(model)),
    "norm": head_and_a_late_norm,
    "biases": late_biases,
}

NETS = {
    "resnet18": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "googlenet": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "mnasnet0_5": 64,
    "vit_b_32": 224,
}


def make(name: str) -> nn.Module:
    options = {"init_weights": False} if name == "googlenet" else {}  # which takes a minute
    return models.get_model(name, weights=None, **options)


class Scaled(nn.Module):
    """Halves its scores until they are small, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Conv2d(6, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x)).mean((2, 3))
        scores = self.head(self.drop(x))
        while scores.abs().max() > 0.1:
            scores = scores / 2
        return scores

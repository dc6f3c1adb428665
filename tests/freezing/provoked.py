"""Faults that `audit` must find, each provoked in a network of its own."""

import copy
from collections.abc import Callable

import torch
from torch import nn

import tiny
from regraft import build_optimizer, freeze, unfreeze
from regraft.card import attach

Case = tuple[nn.Module, torch.optim.Optimizer | None]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer("sgd", model, lr=0.1, momentum=0.9)


def half_frozen() -> nn.Module:
    model = tiny.build("plain")
    freeze(model, until="bn1")
    return model.train()


def stale_gradient() -> Case:
    model = half_frozen()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    return model, None


def stale_gradient_of_the_root() -> Case:
    model = tiny.build("root-token")
    model.cls_token.requires_grad_(False)
    model.cls_token.grad = torch.ones_like(model.cls_token)
    return model, None


def unpinned_norm() -> Case:
    model = tiny.build("plain")
    model.bn1.requires_grad_(False)
    return model, None


def unpinned_dropout() -> Case:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model, None


def unpinned(layer: nn.Module) -> Callable[[], Case]:
    def provoke() -> Case:
        model = nn.ModuleDict({"front": copy.deepcopy(layer), "head": nn.Linear(4, 2)})
        model["front"].requires_grad_(False)
        return model, None

    return provoke


def broken_statistics() -> Case:
    model = half_frozen()
    model.bn1.running_var[2] = float("nan")
    return model, None


def head_width() -> Case:
    return attach(tiny.build("plain"), classes=("cat", "dog")), None


def listed_twice() -> Case:
    model = half_frozen()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"].append(model.fc.weight)
    return model, optimizer


def frozen_in_optimizer() -> Case:
    model = tiny.build("plain")
    optimizer = sgd(model)
    freeze(model, "conv1")
    return model, optimizer


def missing_from_optimizer() -> Case:
    model = half_frozen()
    optimizer = sgd(model)
    unfreeze(model, "conv1")
    return model, optimizer


def not_of_this_model() -> Case:
    model = half_frozen()
    optimizer = sgd(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    return model, optimizer


def thawed_by_hand() -> Case:
    model = tiny.build("plain")
    freeze(model, "conv1", "bn1")
    model.conv1.requires_grad_(True)
    model.bn1.requires_grad_(True)
    return model, None


def thawed_dropout() -> Case:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2))
    freeze(model)
    model = nn.Sequential(*model.children())  # nothing of what follows the flags is left
    model.requires_grad_(True)
    return model, None


def unpinned_spectral_norm() -> Case:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model, None


def unpinned_embedding() -> Case:
    model = nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model, None


PROVOKED: dict[str, tuple[Callable[[], Case], str, str, str]] = {
    "stale gradient": (stale_gradient, "stale-gradient", "conv1.weight", "is frozen but has a gradient"),
    "stale gradient of the root": (stale_gradient_of_the_root, "stale-gradient", "cls_token", "has a gradient"),
    "unpinned norm": (unpinned_norm, "unpinned", "bn1", "its running statistics would still move"),
    "unpinned dropout": (unpinned_dropout, "unpinned", "1", "would still drop at random"),
    "unpinned attention": (
        unpinned(nn.MultiheadAttention(4, 2, dropout=0.1)),
        "unpinned",
        "front",
        "would still drop at random",
    ),
    "unpinned recurrence": (unpinned(nn.LSTM(4, 4, 2, dropout=0.1)), "unpinned", "front", "drop at random"),
    "unpinned random slopes": (
        unpinned(nn.Sequential(nn.Linear(4, 4), nn.RReLU())),
        "unpinned",
        "front.1",
        "would still draw its slopes at random",
    ),
    "thawed by hand": (thawed_by_hand, "still-pinned", "bn1", "is trainable by its flags, but stays in evaluation"),
    "thawed dropout": (thawed_dropout, "still-pinned", "1", "stays in evaluation mode"),
    "unpinned spectral norm": (unpinned_spectral_norm, "unpinned", "0", "its power iteration would still move"),
    "unpinned embedding": (unpinned_embedding, "unpinned", "0", "still rewrite rows whose norm exceeds max_norm"),
    "broken statistics": (broken_statistics, "broken-statistics", "bn1.running_var", "holds NaN or infinity"),
    "head width": (head_width, "head-width", "fc", "gives 5 scores, but there are 2 classes"),
    "listed twice": (listed_twice, "listed-twice", "fc.weight", "is 2 times in the optimizer"),
    "frozen in optimizer": (frozen_in_optimizer, "frozen-in-optimizer", "conv1.weight", "is frozen, but in the optim"),
    "missing from optimizer": (missing_from_optimizer, "missing-from-optimizer", "conv1.weight", "is trainable, but"),
    "not of this model": (not_of_this_model, "not-of-this-model", "optimizer", "has 1 parameters that are not this"),
}

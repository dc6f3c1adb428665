"""Runs of every kind, small enough to be stopped at each step and continued."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import regraft
import tiny
from training.factories import dataset

Stop = tuple[int, int]  # epoch and step, from 1


class Noisy(Dataset):
    """Draws from every global generator for each item, as augmentations do."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.images, self.targets = dataset(count, seed).tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.rand(()) + random.random() + float(np.random.rand())
        return self.images[index] * drawn, self.targets[index]


def net(classes: int = 2, frozen: tuple[str, ...] = ()) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = tiny.PlainCnn(num_classes=classes)
    if frozen:
        regraft.freeze(model, *frozen)
    return model


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted() -> DataLoader:
    sampler = WeightedRandomSampler(torch.arange(1.0, 25.0), 20, generator=generator())
    return DataLoader(Noisy(24), 6, sampler=sampler)


SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 6, "lr": 0.02}
HEAD = ("conv*", "bn*")
OPTIMIZERS = ("sgd", "rmsprop", "adagrad", "nadam", "rprop", "asgd", "adadelta")
STOPS: list[list[Stop]] = [[(1, 2)], [(2, 1), (2, 2)], [(1, 3), (3, 1)]]
RUNS: dict[str, Callable[[Any], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "datasets": lambda _: (net(3), (dataset(20), dataset(9, 1)), {}),
    "mixup": lambda _: (net(3), (dataset(20), dataset(9, 1)), {"mixup": 0.4}),
    "loaders that draw from the global generator": lambda _: (
        net(3),
        (DataLoader(Noisy(22), 6, shuffle=True), DataLoader(Noisy(9, 1), 4, shuffle=True)),
        {},
    ),
    "loaders with generators": lambda _: (
        net(3),
        (weighted(), DataLoader(dataset(9, 1), 4, shuffle=True, generator=generator())),
        {},
    ),
    "batches in a list": lambda _: (net(3), ([dataset()[:9], dataset()[9:], dataset()[4:16]], [dataset(9, 1)[:]]), {}),
    "photos, each time anew": lambda f: (net(), f("photos"), {"augment": "standard"}),
    "cached features": lambda f: (net(frozen=("conv1", "bn1")), f("photos"), {"augment": "flip"}),
    "a head that is chosen": lambda f: (net(frozen=HEAD), f("more_photos"), {"head": "steps", "lr": None, "views": 3}),
    "gradual unfreezing": lambda f: (net(), f("photos"), {"unfreeze": "head:1,conv2:1,all:2"}),
    "gradual unfreezing, not cached": lambda f: (net(), f("photos"), {"unfreeze": "head:1,all:2", "cache": False}),
    "numbers": lambda f: (net(1), f("table"), {"loss": "huber"}),
    "bf16": lambda _: (net(3), (dataset(20), dataset(9, 1)), {"precision": "bf16"}),
    "fp16, with a scaler": lambda _: (net(3), (dataset(20), dataset(9, 1)), {"precision": "fp16"}),
    "cached features in bf16": lambda f: (net(frozen=("conv1", "bn1")), f("photos"), {"precision": "bf16"}),
    "a head that is chosen in bf16": lambda f: (
        net(frozen=HEAD),
        f("more_photos"),
        {"head": "steps", "lr": None, "precision": "bf16", "cache_precision": "int8"},
    ),
    "weights in bfloat16": lambda f: (net(frozen=("conv1", "bn1")).bfloat16(), f("photos"), {}),
    "weights in float64": lambda _: (net(3).double(), (dataset(20), dataset(9, 1)), {"mixup": 0.4}),
} | {name: lambda _, name=name: (net(3), (dataset(20), dataset(9, 1)), {"optimizer": name}) for name in OPTIMIZERS}

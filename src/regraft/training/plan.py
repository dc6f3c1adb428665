"""The summary of a run, from its network, data and options."""

import itertools
from collections.abc import Iterable, Sized
from typing import Any, cast

import torch
from torch import nn

from regraft.card import card_of
from regraft.checkpoint.create import is_checkpoint
from regraft.training.checks.weight_types import type_names
from regraft.training.config import TrainConfig
from regraft.training.result import TrainPlan
from regraft.training.steps.compute import ComputeContext
from regraft.training.train_data import TrainData


def describe_plan(
    model: nn.Module,
    name: str | None,
    train_data: TrainData,
    config: TrainConfig,
    lr: float,
    compute: ComputeContext,
) -> TrainPlan:
    """Return the summary of a run."""
    recipe = card_of(model).recipe
    weights = recipe.source.weights if recipe else "as given"
    if name is not None and is_checkpoint(name) and config.weights == "default":
        weights = "its own"
    listing = train_data.listing
    parameters = list(model.parameters())
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[compute.autocast_dtype]
    if compute.input_dtype not in (None, torch.float32):
        precision = f"in {type_names(parameters)}, as its weights are"
    return TrainPlan(
        model=name or (recipe.source.name if recipe else type(model).__name__),
        weights=weights,
        task=train_data.task,
        classes=train_data.classes,
        counts=tuple(listing.counts()) if listing else (),
        split=listing.split if listing else "as given",
        train_count=_count(train_data.train),
        validation_count=_count(train_data.validation),
        unreadable=train_data.unreadable,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        trained_layers=tuple(trained_layers(model)),
        lr=lr,
        device=f"{compute.device} {precision}",
    )


def _count(batches: Iterable[Any]) -> int | None:
    dataset = getattr(batches, "dataset", None)
    return len(cast(Sized, dataset)) if isinstance(dataset, Sized) else None


def trained_layers(model: nn.Module, prefix: str = "") -> list[str]:
    """List the paths of the largest layers all of whose parameters are trainable."""
    paths = []
    for name, layer in model.named_children():
        flags = [parameter.requires_grad for parameter in layer.parameters()]
        if flags and all(flags):
            paths.append(prefix + name)
        elif any(flags):
            paths += trained_layers(layer, f"{prefix}{name}.")
    return list(itertools.islice(paths, 50))

"""Initial weights of a head that an option asks for, or the reason why they cannot be had."""

from typing import Any

import torch
from torch import nn

from regraft.errors import ConfigError
from regraft.training.config import TrainConfig
from regraft.training.features.batches import FeatureBatches
from regraft.training.heads.ridge import is_solvable as is_ridge_solvable
from regraft.training.heads.ridge import linear_head, trainable_layers
from regraft.training.heads.solved_head import SolvedHead, is_solvable, solve_head
from regraft.training.heads.sweep import ridge_obstacle, ridge_start
from regraft.training.losses import Loss
from regraft.training.train_data import TrainData
from regraft.wording import option

STEP_OPTIONS = ("lr", "optimizer", "weight_decay", "schedule", "mixup", "unfreeze")  # of no use for a solved head


def require_ridge_start(live: nn.Module, train_data: TrainData) -> dict[str, torch.Tensor]:
    """Return the weights of a linear head by ridge regression on all training photos.

    Raises:
        ConfigError: The trained part is not a linear layer on cached features, or there are too many of them.
    """
    batches = train_data.train
    if isinstance(batches, FeatureBatches):
        rows = torch.arange(len(batches.dataset))
        start, reason = ridge_start(live, batches, rows), ridge_obstacle(live, batches, rows)
        if start is not None:
            return start
        reason = reason or "not all of the features are finite"
    else:
        reason = train_data.cache_disabled_reason or "nothing is computed once"
    raise ConfigError(
        f"{option('head', 'ridge')} needs a linear head on features that are computed once, and few enough of "
        f"them: {reason}. Freeze everything but the last layer, or leave the option out."
    )


def solved_head(live: nn.Module, train_data: TrainData, criterion: Loss, config: TrainConfig) -> SolvedHead | None:
    """Return a linear head at its optimum; None where it must be trained.

    Raises:
        ConfigError: It must be trained, and `head` says otherwise.
    """
    solved, reason = None, _solving_obstacle(live, train_data.train, criterion)
    if reason is None:
        reason = next((f"{option(name)} is for steps" for name in STEP_OPTIONS if _differs(config, name)), None)
    if reason is None:
        assert isinstance(train_data.train, FeatureBatches)
        solved = _solve(live, train_data.train, criterion, config)
        reason = "not all of the features are finite"
    if solved is None and config.head == "solved":
        raise ConfigError(
            f"{option('head', 'solved')} needs a linear head on features that are computed once: "
            f"{train_data.cache_disabled_reason or reason}. Freeze everything but the last layer, or leave the option "
            "out."
        )
    return solved


def _solving_obstacle(live: nn.Module, batches: Any, criterion: Loss) -> str | None:
    """Return why `_solve` cannot give the head of a network, as text; None if it can be tried."""
    if not isinstance(batches, FeatureBatches):
        return "nothing is computed once"
    is_squared = isinstance(criterion, nn.MSELoss)
    if not (is_squared or isinstance(criterion, nn.CrossEntropyLoss)) or criterion.reduction != "mean":
        return "the loss is neither the cross-entropy nor the squared error"
    rows = torch.arange(min(2, len(batches.dataset)))
    features, targets = batches.pick(rows, torch.zeros_like(rows))
    head = linear_head(live, features)
    if head is None:
        return "what is trained is not one linear layer with a bias"
    width, outputs, views = head[1].in_features, head[1].out_features, batches.features.views
    if is_squared != targets.is_floating_point() or (is_squared and outputs != 1):
        return "the loss is not that of its targets"
    photos = len(batches.dataset)
    if not (is_ridge_solvable if is_squared else is_solvable)(photos, width, outputs, views=views):
        return f"{photos} photos × {views} with {width} features and {outputs} outputs are too many or too few for it"
    return None


def _solve(live: nn.Module, batches: FeatureBatches, criterion: Any, config: TrainConfig) -> SolvedHead | None:
    """Return the head of a network by `solve_head`, from all photos in all of their views."""
    photos, views = len(batches.dataset), batches.features.views
    rows = torch.arange(photos).repeat_interleave(views)
    (features,), targets = batches.pick(rows, torch.arange(views).repeat(photos))
    head = linear_head(live, (features[:2],))
    assert head is not None
    ignored = getattr(criterion, "ignore_index", -1)
    weights = getattr(criterion, "weight", None)
    if 0 <= ignored < head[1].out_features:
        weights = torch.ones(head[1].out_features) if weights is None else weights.clone()
        weights[ignored] = 0
    return solve_head(
        features,
        targets,
        head[1].out_features,
        views=views,
        smoothing=getattr(criterion, "label_smoothing", 0.0),
        class_weights=weights,
        seed=config.seed,
    )


def head_parameters(live: nn.Module, solved: SolvedHead) -> dict[str, torch.Tensor]:
    """Return the parameters of a solved head's layer by their names in `live`."""
    ((path, layer),) = trainable_layers(live)
    dtype = layer.weight.dtype
    return {f"{path}.weight".lstrip("."): solved.weight.to(dtype), f"{path}.bias".lstrip("."): solved.bias.to(dtype)}


def _differs(config: TrainConfig, name: str) -> bool:
    return getattr(config, name) != getattr(TrainConfig(), name)

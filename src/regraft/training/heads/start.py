"""Initial weights of a head that an option asks for, or the reason why they cannot be had."""

import torch
from torch import nn

from regraft.errors import ConfigError
from regraft.training.config import TrainConfig
from regraft.training.features.batches import FeatureBatches
from regraft.training.heads.softmax_regression import SolvedHead, solve, solving_obstacle
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
        f"{option('head_start', 'ridge')} needs a linear head on features that are computed once, and few enough of "
        f"them: {reason}. Freeze everything but the last layer, or leave the option out."
    )


def solved_head(live: nn.Module, train_data: TrainData, criterion: Loss, config: TrainConfig) -> SolvedHead | None:
    """Return a linear head at its optimum; None where it must be trained.

    Raises:
        ConfigError: It must be trained, and `head_start` says otherwise.
    """
    solved, reason = None, solving_obstacle(live, train_data.train, criterion)
    if reason is None:
        reason = next((f"{option(name)} is for steps" for name in STEP_OPTIONS if _differs(config, name)), None)
    if reason is None:
        assert isinstance(train_data.train, FeatureBatches)
        solved = solve(live, train_data.train, smoothing=config.label_smoothing, seed=config.seed)
        reason = "not all of the features are finite"
    if solved is None and config.head_start == "solved":
        raise ConfigError(
            f"{option('head_start', 'solved')} needs a linear head for classes on features that are computed once: "
            f"{train_data.cache_disabled_reason or reason}. Freeze everything but the last layer, or leave the option "
            "out."
        )
    return solved


def _differs(config: TrainConfig, name: str) -> bool:
    return getattr(config, name) != getattr(TrainConfig(), name)

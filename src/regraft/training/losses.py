"""Losses by name, and the check that a loss is a single number."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from regraft.data.samples import Task
from regraft.errors import ConfigError, LossError, nearest
from regraft.zoo import import_object

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MEANS = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.MultiMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.SoftMarginLoss,
)
NAMES = {"classification": ("cross-entropy", "focal"), "regression": ("mse", "l1", "huber")}


class FocalLoss(nn.Module):
    """Focal loss: cross-entropy with a lower weight for well-classified samples, mean of -(1 - p)^gamma log p.

    Source: Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 4.

    Args:
        gamma: Focusing parameter; 0 is the cross-entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of scores (N, K) and classes (N,)."""
        log_probability = F.log_softmax(outputs, dim=1).gather(1, targets[:, None]).squeeze(1)  # (N,)
        return (-((1 - log_probability.exp()) ** self.gamma) * log_probability).mean()


def build_loss(name: str | None, task: Task, *, label_smoothing: float = 0.0, trust_code: bool = False) -> Loss:
    """Return the loss of that name, or the default of the task: a function of (outputs, targets).

    Raises:
        ConfigError: No loss of this task has that name.
        TrustError: The name is `py:…` and `trust_code` is false.
    """
    name = name or NAMES[task][0]
    if name.startswith("py:"):
        loss = import_object(name, trust_code=trust_code)
        return loss() if isinstance(loss, type) else loss
    if name not in NAMES[task]:
        hint = nearest(name, NAMES[task]) or f"Choose from {', '.join(NAMES[task])}, or py:FILE:name."
        raise ConfigError(f"no loss '{name}' for {task}. {hint}")
    losses: dict[str, Loss] = {
        "cross-entropy": nn.CrossEntropyLoss(label_smoothing=label_smoothing),
        "focal": FocalLoss(),
        "mse": OnColumns(nn.MSELoss()),
        "l1": OnColumns(nn.L1Loss()),
        "huber": OnColumns(nn.HuberLoss()),
    }
    return losses[name]


def check_loss(value: object) -> torch.Tensor:
    """Return `value` if it is a tensor with one element.

    Raises:
        LossError: It is not; the message describes the value.
    """
    if not isinstance(value, torch.Tensor):
        raise LossError(f"the loss returned a {type(value).__name__}, expected a tensor with one number.")
    if value.ndim != 0:
        raise LossError(
            f"the loss returned a tensor of shape {tuple(value.shape)}, expected one number. "
            "Reduce it, as in `.mean()` or reduction='mean'."
        )
    return value


class OnColumns(nn.Module):
    """A loss that compares outputs (N, 1) with targets (N,), which would otherwise broadcast to (N, N)."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of outputs and equally many targets."""
        return self.loss(outputs, targets.to(outputs.dtype).reshape(outputs.shape))


def is_mean_over_samples(loss: Loss, targets: torch.Tensor) -> bool:
    """Return whether a loss is known to be an unweighted mean over samples.

    Then the loss of a batch is the mean of the losses of its halves. False for unknown losses, such as a function or a
    class of the user's.

    Args:
        loss: The loss.
        targets: Targets of the batch; targets with the loss's `ignore_index` make the mean uneven.
    """
    loss = loss.loss if isinstance(loss, OnColumns) else loss
    if type(loss) is FocalLoss:
        return True
    if type(loss) not in MEANS or getattr(loss, "reduction", "") != "mean" or getattr(loss, "weight", None) is not None:
        return False
    ignored = getattr(loss, "ignore_index", None)
    return ignored is None or targets.is_floating_point() or not bool((targets == ignored).any())

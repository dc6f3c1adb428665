"""Convert targets for losses and metrics: class indices, or numbers for regression.

Loaders yield targets in many forms: `int32` and `bool`, columns (N, 1), one-hot rows, `float64` from Python's floats.
For known losses, they are converted to what the loss expects; unsuitable targets are refused with the reason. Custom
losses get the targets unchanged.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate

from regraft.data.items import ItemCollate, length_of
from regraft.data.samples import Task
from regraft.errors import DataError
from regraft.training.losses import FocalLoss, Loss, OnColumns, check_loss
from regraft.wording import for_caller, option

Kind = Literal["classes", "numbers", "logits", "unknown"]

CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss, FocalLoss)
CLASS_FUNCTIONS = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)
REGRESSION_LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, OnColumns)
REGRESSION_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy)
MAX_SCANNED = 1_000_000  # labels in memory that are checked before training


def kind_of(loss: Loss | None) -> Kind:
    """Return the kind of targets that a loss expects.

    Returns:
        `classes` (N,) for outputs (N, K); `numbers` of the outputs' shape; `logits`, numbers that are compared with the
        sigmoid of the outputs; `unknown` for a custom loss.
    """
    if type(loss) in CLASS_LOSSES or loss in CLASS_FUNCTIONS:
        return "classes"
    if type(loss) in REGRESSION_LOSSES or loss in REGRESSION_FUNCTIONS:
        return "numbers"
    is_of_logits = type(loss) is nn.BCEWithLogitsLoss or loss is F.binary_cross_entropy_with_logits
    return "logits" if is_of_logits else "unknown"


def ignored_label(loss: Loss | None) -> int | None:
    """Return the label that a loss ignores (`ignore_index`); None without one."""
    default = -100 if loss in (F.cross_entropy, F.nll_loss) else None  # torch's default
    label = getattr(loss, "ignore_index", default)
    return label if isinstance(label, int) else None


def fit_targets(loss: Loss, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return targets in the dtype and shape that a known loss expects; no value changes.

    Raises:
        DataError: The number of targets differs from that of outputs.
    """
    kind = kind_of(loss)
    if kind == "classes":
        if targets.is_floating_point() or _is_row_per_sample(outputs, targets):
            return targets.to(outputs.dtype)
        return _squeeze_column(targets, outputs).long()
    if kind == "unknown":
        return targets
    if targets.numel() != outputs.numel():
        raise DataError(
            f"the outputs have the shape {tuple(outputs.shape)} and the targets {tuple(targets.shape)}, which "
            f"{_name(loss)} cannot compare. Expected one target for each output. Use a network with as many outputs "
            f"as there are targets{for_caller(python=', as in regraft.replace_head(model, 1)', command='')}."
        )
    return targets.to(outputs.dtype).reshape(outputs.shape)


def batch_loss(criterion: Loss, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of outputs and targets, converted by `fit_targets`.

    Raises:
        LossError: The loss is not one number.
        DataError: A label is not a class, or the targets do not fit the outputs.
    """
    if kind_of(criterion) == "classes":
        require_labels(targets, outputs.shape[1] if outputs.ndim > 1 else 0, ignored=ignored_label(criterion))
    return check_loss(criterion(outputs, fit_targets(criterion, outputs, targets)))


def class_labels(outputs: torch.Tensor, targets: torch.Tensor, *, ignored: int | None = None) -> torch.Tensor:
    """Return targets as classes (N,) of int64; for one-hot or soft targets (N, K), the most likely class.

    Args:
        outputs: (N, K).
        targets: Classes (N,) or (N, 1) of any integer type or bool, or probabilities (N, K).
        ignored: A label that may lie outside of 0 to K - 1.

    Raises:
        DataError: A label is not one of the K classes, or outputs or targets have another shape.
    """
    if _is_row_per_sample(outputs, targets) and (targets.is_floating_point() or has_one_hot_rows(targets)):
        return targets.to(outputs.dtype).argmax(1)  # bool has no argmax
    labels = _squeeze_column(targets, outputs)
    is_of_numbers = labels.is_floating_point() or labels.is_complex()
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1] or is_of_numbers:
        raise DataError(
            f"the targets are {_described(targets)}, expected classes (N,) of integers, or shares (N, K) of K classes, "
            f"for outputs of the shape {tuple(outputs.shape)}, expected (N, K). Return one class for each sample, from "
            "a network that gives one row of scores for each."
        )
    require_labels(labels, outputs.shape[1], ignored=ignored)
    return labels.long()


def require_labels(labels: torch.Tensor, classes: int, *, ignored: int | None = None, part: str = "") -> None:
    """Refuse labels that are not a class.

    Args:
        labels: Of any integer type and shape.
        classes: Number of classes K; labels are 0 to K - 1.
        ignored: A label that may lie outside of these.
        part: Part of the data for the message, as in `validation `.

    Raises:
        DataError: A label is not a class; the message names it.
    """
    if labels.is_floating_point() or labels.numel() == 0:
        return
    labels = labels.long()
    wrong = (labels < 0) | (labels >= classes)
    if ignored is not None:
        wrong &= labels != ignored
    if bool(wrong.any()):
        label = int(labels[wrong].flatten()[0])
        advice = (
            "Number the classes from 0; to leave samples out, pass loss=nn.CrossEntropyLoss(ignore_index=…)"
            if label < 0
            else "Number the classes from 0 without gaps, or use a network with more outputs"
            + for_caller(python=f": regraft.replace_head(model, {int(labels.max()) + 1})", command="")
        )
        raise DataError(
            f"the {part}data has the label {label}, the network has {classes} outputs: expected labels from 0 to "
            f"{classes - 1}. {advice}."
        )


def task_of(
    task: Task, loss: Loss | None, loss_name: str | None, targets: torch.Tensor, validation: torch.Tensor | None
) -> Task:
    """Return whether targets are classes or numbers, from the loss and the targets.

    Args:
        task: The task that the dtype of the training targets suggests.
        loss: The user's loss; None for a loss by name.
        loss_name: Its name, if it has one.
        targets: Targets of the first training batch.
        validation: Targets of the first validation batch; None if it cannot be read cheaply.

    Raises:
        DataError: The targets do not suit the loss, or are ambiguous.
    """
    kind = kind_of(loss)
    if kind == "logits" and not targets.is_floating_point():
        raise DataError(
            f"the targets are {_described(targets)}, and {_name(loss)} compares outputs with floats from 0 to 1. "
            "Use one output for each class and cross-entropy, or return targets.float()."
        )
    if kind in ("numbers", "logits"):
        return "regression"
    if kind == "classes":
        if targets.is_floating_point() and (targets.ndim != 2 or targets.shape[1] < 2):
            choice = for_caller(python="Return targets.long(), or pass", command="Pass")
            raise DataError(
                f"the targets are {_described(targets)}, and {_name(loss)} compares outputs with classes (N,) of "
                f"integers, or with shares (N, K). {choice} {option('loss', 'mse')} to predict numbers."
            )
        _require_one_class(targets)
        return "classification"
    if not targets.is_floating_point():
        _require_one_class(targets)
        return task
    if validation is not None and not validation.is_floating_point() and targets.ndim == 2:
        return "classification"  # integer validation targets: the training targets are soft, as with mixup
    if loss is not None or loss_name is not None or targets.ndim != 2 or targets.shape[1] < 2:
        return task
    return _task_of_rows(targets)


def _require_one_class(targets: torch.Tensor) -> None:
    is_of_rows = targets.ndim == 2 and targets.shape[1] > 1 and not targets.is_floating_point()
    if is_of_rows and not has_one_hot_rows(targets):
        raise DataError(
            f"the targets are {_described(targets)}, with several classes a sample or none. Expected classes (N,) of "
            "integers. To learn several classes at once, return targets.float() and pass loss=nn.BCEWithLogitsLoss()."
        )


def _task_of_rows(targets: torch.Tensor) -> Task:
    """Return the task of targets (N, K) of floats: classification for one-hot rows, else regression."""
    if has_one_hot_rows(targets):
        return "classification"
    is_binary = bool(((targets == 0) | (targets == 1)).all())
    has_unit_sum = bool(torch.allclose(targets.sum(1), targets.new_ones(()), atol=1e-3) and (targets >= 0).all())
    if is_binary or has_unit_sum:
        what = "rows of 0 and 1 with several classes each" if is_binary else "rows of shares that add up to 1"
        choice = "nn.BCEWithLogitsLoss()" if is_binary else "nn.CrossEntropyLoss()"
        raise DataError(
            f"the targets are {_described(targets)}: {what}, which may be classes or numbers. Pass loss={choice} to "
            "learn classes, or loss='mse' to predict the numbers."
        )
    return "regression"


def labels_in_memory(data: Any) -> torch.Tensor | None:
    """Return all labels of a dataset or loader whose items are in memory, without calling user code; else None."""
    if isinstance(data, DataLoader):
        is_plain = data.collate_fn is default_collate or isinstance(data.collate_fn, ItemCollate)
        if data.batch_size is None or not is_plain:
            return None
        return labels_in_memory(data.dataset)
    if (length_of(data) or 0) > MAX_SCANNED:
        return None
    if isinstance(data, TensorDataset):
        return data.tensors[1] if len(data.tensors) == 2 else None
    if isinstance(data, Subset):
        labels = labels_in_memory(data.dataset)
        return labels[torch.as_tensor(data.indices)] if labels is not None else None
    if isinstance(data, ConcatDataset):
        return _joined(labels_in_memory(part) for part in data.datasets)
    if isinstance(data, (list, tuple)) and all(isinstance(item, (tuple, list)) and len(item) == 2 for item in data):
        return _joined(_as_labels(item[1]) for item in data)
    return None


def has_one_hot_rows(targets: torch.Tensor) -> bool:
    """Return whether each row of targets (N, K) has a single 1 and otherwise 0."""
    return bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(1) == 1).all())


def _is_row_per_sample(outputs: torch.Tensor, targets: torch.Tensor) -> bool:
    return outputs.ndim == 2 and targets.shape == outputs.shape and outputs.shape[1] > 1


def _as_labels(value: Any) -> torch.Tensor | None:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _joined(parts: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    labels = list(parts)
    if any(part is None or part.is_floating_point() for part in labels) or not labels:
        return None
    return torch.cat([cast(torch.Tensor, part).flatten().long() for part in labels])


def _squeeze_column(targets: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Squeeze a column (N, 1) of classes to (N,)."""
    is_column = outputs.ndim == 2 and targets.ndim == 2 and targets.shape[1] == 1
    return targets.squeeze(1) if is_column else targets


def _described(targets: torch.Tensor) -> str:
    return f"{str(targets.dtype).removeprefix('torch.')} of the shape {tuple(targets.shape)}"


def _name(loss: Any) -> str:
    loss = loss.loss if isinstance(loss, OnColumns) else loss
    return getattr(loss, "__name__", type(loss).__name__)

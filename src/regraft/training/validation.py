"""The metrics of the validation photos, from the outputs of a network for them."""

import math

import torch

from regraft.errors import LossError
from regraft.training.checks.targets import class_labels, ignored_label, kind_of
from regraft.training.metrics import Metrics, measure
from regraft.training.setup import TrainSetup
from regraft.wording import option


def measure_validation(
    setup: TrainSetup, outputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Return outputs and targets as metrics take them, and the metrics.

    Raises:
        DataError: A label is not a class.
        LossError: The loss is not finite.
    """
    outputs, targets = _align_for_metrics(setup, outputs, targets)
    metrics = measure(outputs, targets, _class_names(setup, outputs))
    _require_finite(metrics, setup)
    return outputs, targets, metrics


def _class_names(setup: TrainSetup, outputs: torch.Tensor) -> tuple[str, ...] | None:
    if setup.train_data.task == "regression":
        return None
    return setup.train_data.classes or tuple(map(str, range(outputs.shape[1])))


def _align_for_metrics(
    setup: TrainSetup, outputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets for the metrics: scores and classes without ignored labels, or numbers.

    Raises:
        DataError: A label is not a class.
    """
    if setup.train_data.task == "regression":
        return (outputs.sigmoid() if kind_of(setup.criterion) == "logits" else outputs), targets
    ignored = ignored_label(setup.criterion)
    labels = class_labels(outputs, targets, ignored=ignored)
    if ignored is None or not bool((labels == ignored).any()):
        return outputs, labels
    return outputs[labels != ignored], labels[labels != ignored]


def _require_finite(metrics: Metrics, setup: TrainSetup) -> None:
    if not math.isfinite(metrics.loss):
        raise LossError(
            f"the validation loss is {metrics.loss} (learning rate {setup.plan.lr:.3g}). Try a tenth of the learning "
            f"rate, {option('precision', 'fp32')}, or look for extreme values in the data."
        )

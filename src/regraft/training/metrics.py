"""How good predictions are."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from regraft.arguments import check_arguments
from regraft.data.folders import Task
from regraft.errors import DataError
from regraft.training.checks.targets import class_labels


@dataclass(frozen=True)
class ClassMetrics:
    """Of one class: what share of its predictions is right, what share of its photos is found, and their mean."""

    name: str
    precision: float
    recall: float
    f1: float
    count: int


@dataclass(frozen=True)
class Metrics:
    """How good the predictions on a set of photos are.

    Attributes:
        task: Classification or regression.
        count: Number of photos.
        loss: Mean cross-entropy (classification) or mean squared error (regression).
        accuracy: Share of right predictions; None for regression.
        calibration_error: Expected calibration error over 10 equal bins of confidence (Guo et al. 2017,
            https://arxiv.org/abs/1706.04599, equation 3); None for regression.
        per_class: One entry per class; empty for regression.
        confusion: Row: the true class, column: the predicted one; empty for regression.
        mae: Mean absolute error; None for classification.
        rmse: Root of the mean squared error; None for classification.
        r2: Coefficient of determination; None for classification, and where all targets are equal.
    """

    task: Task
    count: int
    loss: float
    accuracy: float | None = None
    calibration_error: float | None = None
    per_class: tuple[ClassMetrics, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    mae: float | None = None
    rmse: float | None = None
    r2: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the task has as JSON data."""
        return {name: value for name, value in asdict(self).items() if value is not None and value != ()}

    def is_better_than(self, other: "Metrics | None") -> bool:
        """Return whether these are better: higher accuracy, then lower loss; NaN ranks last."""
        check_arguments(Metrics.is_better_than, locals())
        return other is None or self._rank() > other._rank()

    def _rank(self) -> tuple[float, float]:
        return self.accuracy or 0.0, -math.inf if math.isnan(self.loss) else -self.loss

    def headline(self) -> str:
        """Say the main figures in a few words."""
        if self.accuracy is not None:
            return f"accuracy {self.accuracy:.4f} ({round(self.accuracy * self.count)} of {self.count})"
        explained = f", R² {self.r2:.3f}" if self.r2 is not None else ""
        return f"mean absolute error {self.mae:.4g}{explained} ({self.count} photos)"


def measure(outputs: torch.Tensor, targets: torch.Tensor, classes: Sequence[str] | None) -> Metrics:
    """Compare a model's outputs with what was to be found.

    Args:
        outputs: Scores (N, K) for classification, or numbers (N,) or (N, 1) for regression.
        targets: Classes (N,) of any integer type, one-hot rows (N, K), or numbers (N,).
        classes: Names of the K classes; None for regression.

    Raises:
        DataError: A label is none of the classes, or there is not one number for each output.
    """
    if classes is None:
        return _measure_regression(outputs, targets)
    return _measure_classes(outputs, class_labels(outputs, targets), classes)


def reliability(outputs: torch.Tensor, targets: torch.Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """Sort predictions into equal bins of confidence: (mean confidence, accuracy, count) of each bin with any."""
    confidence, predicted = outputs.softmax(1).max(1)
    correct = (predicted == targets).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    return [
        (confidence[index == b].double().mean().item(), correct[index == b].mean().item(), int((index == b).sum()))
        for b in range(bins)
        if (index == b).any()
    ]


def _measure_classes(outputs: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]) -> Metrics:
    # By hand, and held against scikit-learn by the tests: importing that costs as much as training a head.
    predicted, width = outputs.argmax(1), max(len(classes), outputs.shape[1])
    confusion = torch.bincount(targets * width + predicted, minlength=width * width).view(width, width)
    confusion = confusion[: len(classes), : len(classes)]
    right, predicted_counts = confusion.diagonal().double(), confusion.sum(0).double()
    true_counts = torch.bincount(targets, minlength=len(classes)).double()
    rows = zip(
        classes,
        (right / predicted_counts.clamp(min=1)).tolist(),
        (right / true_counts.clamp(min=1)).tolist(),
        (2 * right / (predicted_counts + true_counts).clamp(min=1)).tolist(),
        true_counts.long().tolist(),
        strict=True,
    )
    bins = reliability(outputs, targets)
    return Metrics(
        task="classification",
        count=len(targets),
        loss=torch.nn.functional.cross_entropy(outputs, targets).item(),
        accuracy=(predicted == targets).double().mean().item(),
        calibration_error=sum(abs(mean - right) * count for mean, right, count in bins) / len(targets),
        per_class=tuple(ClassMetrics(*row) for row in rows),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def _measure_regression(outputs: torch.Tensor, targets: torch.Tensor) -> Metrics:
    expected = targets.double().flatten()
    if outputs.numel() != expected.numel():
        raise DataError(
            f"the outputs have the shape {tuple(outputs.shape)} and the targets {tuple(targets.shape)}: expected one "
            "target for each output."
        )
    errors = outputs.double().flatten() - expected
    squared = errors.square().mean().item()
    spread = (expected - expected.mean()).square().mean().item()
    return Metrics(
        task="regression",
        count=len(expected),
        loss=squared,
        mae=errors.abs().mean().item(),
        rmse=squared**0.5,
        r2=1 - squared / spread if spread else None,
    )

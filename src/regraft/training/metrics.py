"""Metrics of predictions: accuracy, calibration, per-class scores, regression errors."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from regraft.anatomy.summary_table import aligned
from regraft.arguments import check_arguments
from regraft.data.decoding.files import Unreadable
from regraft.data.samples import Task
from regraft.data.sources import Source
from regraft.display import block, printable, table_html
from regraft.errors import DataError
from regraft.training.checks.targets import class_labels

NORMAL_QUANTILE = 1.959964  # of 0.975: leaves 2.5 % on either side
CLASS_HEAD, CLASS_RIGHT = ("class", "precision", "recall", "F1", "count"), (False, True, True, True, True)
MAX_CLASSES = 8  # in a session
MAX_NAME = 40  # characters of a class in a session


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall and F1 score of one class, with its number of photos."""

    name: str
    precision: float
    recall: float
    f1: float
    count: int


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The scores behind metrics, and whose they are; from these `write_report` writes the report of an evaluation.

    Attributes:
        outputs: Scores (N, K), or predictions (N, 1) for regression.
        targets: Classes (N,), or numbers.
        paths: The photos, in order; empty for datasets and loaders.
        unreadable: Files that were skipped.
        model: Name of the network, or of its class.
        data: Path of the data; None for datasets and loaders.
        checkpoint: Path of the model's file; None if unknown.
        seconds: Time of each phase.
        is_held_out: Whether these are the photos that the training held out, and chose its epoch on.
    """

    outputs: torch.Tensor
    targets: torch.Tensor
    paths: tuple[Source, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    model: str = ""
    data: str | None = None
    checkpoint: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    is_held_out: bool = False


@dataclass(frozen=True, repr=False)
class Metrics:
    """Metrics of the predictions on a set of photos.

    Attributes:
        task: Classification or regression.
        count: Number of photos.
        loss: Mean cross-entropy (classification) or mean squared error (regression).
        accuracy: Share of correct predictions; None for regression.
        calibration_error: Expected calibration error over 10 equal bins of confidence (Guo et al. 2017,
            https://arxiv.org/abs/1706.04599, equation 3); None for regression.
        per_class: One entry per class; empty for regression.
        confusion: Confusion matrix, rows true classes, columns predicted ones; empty for regression.
        mae: Mean absolute error; None for classification.
        rmse: Root mean squared error; None for classification.
        r2: Coefficient of determination; None for classification, and if all targets are equal.
        scores: The scores behind metrics of `evaluate`; None for those of a training run.
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
    scores: Scores | None = field(default=None, repr=False, compare=False)

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the accuracy (Wilson's); None for regression."""
        if self.accuracy is None:
            return None
        return wilson_interval(round(self.accuracy * self.count), self.count)

    def __repr__(self) -> str:
        rows = [(printable(name)[:MAX_NAME], *cells) for name, *cells in self._worst()]
        table = aligned([CLASS_HEAD, *rows], CLASS_RIGHT) if rows else []
        return "\n".join([block(self._title(), []), *(f"  {line}" for line in [*table, self._more()] if line)])

    def _repr_html_(self) -> str:
        return table_html(self._title(), CLASS_HEAD, self._worst(), [self._more()])

    def _title(self) -> str:
        error = f", calibration error {self.calibration_error:.4f}" if self.calibration_error is not None else ""
        return f"Metrics: {self.headline()}, loss {self.loss:.4f}{error}"

    def _more(self) -> str:
        more = len(self.per_class) - MAX_CLASSES
        return f"the {MAX_CLASSES} classes of the lowest F1 scores; .per_class has {more} more" if more > 0 else ""

    def _worst(self) -> list[tuple[str, ...]]:
        """Return the rows of the table of classes; of many, those of the lowest F1 scores."""
        worst = sorted(self.per_class, key=lambda entry: entry.f1)[:MAX_CLASSES]
        return [
            (entry.name, f"{entry.precision:.3f}", f"{entry.recall:.3f}", f"{entry.f1:.3f}", f"{entry.count}")
            for entry in (worst if len(self.per_class) > MAX_CLASSES else self.per_class)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics of the task as JSON data."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "scores"}
        values["per_class"] = tuple(map(asdict, self.per_class))
        return {name: value for name, value in values.items() if value is not None and value != ()}

    def confusions(self) -> list[tuple[str, str, int]]:
        """Return (true class, predicted class, number of photos) of all confusions, the most frequent first."""
        names = [entry.name for entry in self.per_class]
        pairs = [
            (names[row], names[column], count)
            for row, line in enumerate(self.confusion)
            for column, count in enumerate(line)
            if count and row != column
        ]
        return sorted(pairs, key=lambda pair: -pair[2])

    def is_better_than(self, other: "Metrics | None") -> bool:
        """Return whether these metrics are better: higher accuracy, then lower loss; NaN ranks last."""
        check_arguments(Metrics.is_better_than, locals())
        return other is None or self._rank() > other._rank()

    def _rank(self) -> tuple[float, float]:
        return self.accuracy or 0.0, -math.inf if math.isnan(self.loss) else -self.loss

    def headline(self) -> str:
        """Return the main metrics as one line of text."""
        if self.accuracy is not None:
            return f"accuracy {self.accuracy:.4f} ({round(self.accuracy * self.count)} of {self.count})"
        explained = f", R² {self.r2:.3f}" if self.r2 is not None else ""
        return f"mean absolute error {self.mae:.4g}{explained} ({self.count} photos)"


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).

    >>> [round(end, 3) for end in wilson_interval(9, 10)]
    [0.596, 0.982]
    """
    share, z = correct / count, NORMAL_QUANTILE
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(outputs: torch.Tensor, targets: torch.Tensor, classes: Sequence[str] | None) -> Metrics:
    """Compare a model's outputs with the targets.

    Args:
        outputs: Scores (N, K) for classification, or predictions (N,) or (N, 1) for regression.
        targets: Classes (N,) of any integer type, one-hot rows (N, K), or numbers (N,).
        classes: Names of the K classes; None for regression.

    Raises:
        DataError: A label is not a class, outputs and targets differ in number, or there are none.
    """
    if not len(targets):
        raise DataError("there are no samples to measure. Give data that has some.")
    if classes is None:
        return _measure_regression(outputs, targets)
    return _measure_classes(outputs, class_labels(outputs, targets), classes)


def reliability(outputs: torch.Tensor, targets: torch.Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """Sort predictions into equal bins of confidence: (mean confidence, accuracy, count) of each nonempty bin."""
    confidence, predicted = outputs.softmax(1).max(1)
    correct = (predicted == targets).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    return [
        (confidence[index == b].double().mean().item(), correct[index == b].mean().item(), int((index == b).sum()))
        for b in range(bins)
        if (index == b).any()
    ]


def calibration_error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the expected calibration error of scores (N, K) for classes (N,), see `Metrics.calibration_error`."""
    return sum(abs(mean - share) * count for mean, share, count in reliability(outputs, targets)) / len(targets)


def _measure_classes(outputs: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]) -> Metrics:
    # Not with scikit-learn, whose import takes as long as training a head. The tests compare with it.
    predicted, width = outputs.argmax(1), max(len(classes), outputs.shape[1])
    confusion = torch.bincount(targets * width + predicted, minlength=width * width).view(width, width)
    confusion = confusion[: len(classes), : len(classes)]
    correct, predicted_counts = confusion.diagonal().double(), confusion.sum(0).double()
    true_counts = torch.bincount(targets, minlength=len(classes)).double()
    rows = zip(
        classes,
        (correct / predicted_counts.clamp(min=1)).tolist(),
        (correct / true_counts.clamp(min=1)).tolist(),
        (2 * correct / (predicted_counts + true_counts).clamp(min=1)).tolist(),
        true_counts.long().tolist(),
        strict=True,
    )
    return Metrics(
        task="classification",
        count=len(targets),
        loss=torch.nn.functional.cross_entropy(outputs, targets).item(),
        accuracy=(predicted == targets).double().mean().item(),
        calibration_error=calibration_error(outputs, targets),
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

"""What a training run found out, as one value that a report can be written from."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.data.decode import Unreadable
from regraft.data.folders import Task
from regraft.training.config import TrainConfig
from regraft.training.metrics import Metrics


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss, metrics on the validation photos, learning rate at its end, seconds."""

    epoch: int
    train_loss: float
    validation: Metrics
    lr: float
    seconds: float

    def to_row(self) -> dict[str, Any]:
        """Return the figures as one row of a table."""
        measured = self.validation.to_dict()
        figures = {
            f"validation_{name}": measured[name] for name in ("loss", "accuracy", "mae", "r2") if name in measured
        }
        return {"epoch": self.epoch, "train_loss": self.train_loss, **figures, "lr": self.lr, "seconds": self.seconds}


@dataclass(frozen=True)
class ComputedOnce:
    """What was the same in every epoch, and therefore computed once.

    Attributes:
        frontier: Place and shape (without the batch) of each tensor at which an epoch began.
        share: Of the network's multiply-adds that lie before it.
        views: Versions of each photo.
        bytes: What all of it needs.
        where: Where it was kept: `in memory`, `on disk`, or on which device.
        was_found: Whether an earlier run had computed it.
        seconds: For computing or finding it.
        saved_s: Estimate of what decoding and computing it in every epoch would have taken more.
        note: Why the frontier lies elsewhere than where the constant part ends; None where it does not.
    """

    frontier: tuple[tuple[str, tuple[int, ...]], ...]
    share: float
    views: int
    bytes: int
    where: str
    was_found: bool
    seconds: float
    saved_s: float
    note: str | None


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, for people to read before it starts.

    Attributes:
        model: Name of the network, or of its class.
        weights: Where its first weights come from.
        task: Classification or regression.
        classes: Class names; None for regression.
        counts: (class, photos to learn from, photos to measure on) of each class; empty where unknown.
        split: How the two parts came about.
        train_count: Number of photos to learn from; None where a loader does not say.
        validation_count: Number of photos to measure on; None where a loader does not say.
        unreadable: Files that cannot be read and are skipped.
        parameters: Number of all parameters.
        trainable: Number of trainable parameters.
        trained_layers: Paths of the largest layers that are trained as a whole.
        lr: Highest learning rate.
        device: Where arithmetic is done, and in which precision.
    """

    model: str
    weights: str
    task: Task
    classes: tuple[str, ...] | None
    counts: tuple[tuple[str, int, int], ...]
    split: str
    train_count: int | None
    validation_count: int | None
    unreadable: tuple[Unreadable, ...]
    parameters: int
    trainable: int
    trained_layers: tuple[str, ...]
    lr: float
    device: str

    def lines(self, config: TrainConfig) -> Iterator[str]:
        """Say all of it in a few lines."""
        share = self.trainable / self.parameters
        yield f"model      {self.model}, weights: {self.weights}"
        yield (
            f"trained    {self.trainable:,} of {self.parameters:,} parameters ({share:.2%}): "
            + (", ".join(self.trained_layers) if share < 1 else "all layers")
            + ("" if share == 1 else "; the rest is frozen")
        )
        if config.unfreeze is not None:
            yield f"unfreezing {config.unfreeze} (layers:epochs)"
        if self.classes is not None and self.counts:
            counts = ", ".join(f"{name} {train}+{measured}" for name, train, measured in self.counts)
            yield f"photos     {self.train_count} + {self.validation_count} for validation ({self.split})"
            yield f"classes    {len(self.classes)} (photos + validation): {counts}"
        elif self.train_count is not None:
            yield f"examples   {self.train_count} + {self.validation_count} for validation ({self.split})"
        for file in self.unreadable:
            yield f"skipped    {str(file.path)!r}: {file.reason}"
        yield (
            f"training   {config.epochs} epochs, batches of {config.batch_size}, {config.optimizer}, learning rate "
            f"{self.lr:g} ({config.schedule}), augmentation {config.augment}, on {self.device}"
        )


@dataclass(frozen=True)
class FitResult:
    """What `fit` returns.

    Attributes:
        model: The trained model in evaluation mode, with the weights of the best epoch.
        plan: What was done to what.
        config: All options, with the values that were used.
        history: One record per epoch.
        best_epoch: The epoch whose weights were kept, from 1.
        validation: Metrics of those weights on the validation photos.
        outputs: Their scores on the validation photos (N, K), in order.
        targets: What was to be found (N,).
        paths: The validation photos, in order; empty for datasets that are no files.
        seconds: Time of each phase.
        out: Folder of the results; None where nothing was written.
        checkpoint: The saved model; None where nothing was written.
        computed_once: What was computed once for all epochs; None where every epoch ran the whole network.
        not_once_because: Why it did; None where something was computed once, or where nothing is frozen.
    """

    model: nn.Module
    plan: Plan
    config: TrainConfig
    history: tuple[EpochRecord, ...]
    best_epoch: int
    validation: Metrics
    outputs: torch.Tensor
    targets: torch.Tensor
    paths: tuple[Path, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    out: Path | None = None
    checkpoint: Path | None = None
    computed_once: ComputedOnce | None = None
    not_once_because: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data, without weights and scores."""
        return {
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "out": str(self.out) if self.out else None,
            "validation": self.validation.to_dict(),
            "best_epoch": self.best_epoch,
            "epochs": [record.to_row() for record in self.history],
            "seconds": self.seconds,
            "computed_once": asdict(self.computed_once) if self.computed_once else None,
            "not_once_because": self.not_once_because,
            "parameters": self.plan.parameters,
            "trainable": self.plan.trainable,
            "classes": self.plan.classes,
            "unreadable": [{"path": str(file.path), "reason": file.reason} for file in self.plan.unreadable],
            "config": self.config.model_dump(mode="json", exclude_none=True),
        }

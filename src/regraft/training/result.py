"""The result of a training run, as one value from which a report can be written."""

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.anatomy.summary_table import percent
from regraft.data.decoding.files import Unreadable
from regraft.data.samples import Task
from regraft.data.sources import Source
from regraft.display import block, shortened, some, table_html
from regraft.training.config import TrainConfig
from regraft.training.doubt.calibration import Calibration
from regraft.training.metrics import Metrics

COLUMNS = ("epoch", "training loss", "validation loss", "validation", "seconds")
MAX_EPOCHS = 12  # in a session


@dataclass(frozen=True, repr=False)
class EpochRecord:
    """One epoch: mean training loss, metrics on the validation photos, learning rate at its end, seconds."""

    epoch: int
    train_loss: float
    validation: Metrics
    lr: float
    seconds: float

    def __repr__(self) -> str:
        return f"EpochRecord({self.epoch}: {self.validation.headline()})"

    def cells(self) -> tuple[str, ...]:
        """Return the record as one row of a table to read."""
        losses = (f"{self.train_loss:.4f}", f"{self.validation.loss:.4f}")
        return (f"{self.epoch}", *losses, self.validation.headline(), f"{self.seconds:.1f}")

    def to_row(self) -> dict[str, Any]:
        """Return the record as one row of a table."""
        measured = self.validation.to_dict()
        figures = {
            f"validation_{name}": measured[name] for name in ("loss", "accuracy", "mae", "r2") if name in measured
        }
        return {"epoch": self.epoch, "train_loss": self.train_loss, **figures, "lr": self.lr, "seconds": self.seconds}


@dataclass(frozen=True)
class ComputedOnce:
    """The part of the network that was the same in every epoch, and therefore computed once.

    Attributes:
        frontier: Place and shape (without the batch dimension) of each cached tensor, from which epochs begin.
        share: Share of the network's multiply-adds before the frontier.
        views: Number of cached views of each photo.
        bytes: Size of the cached features.
        where: Where they were kept: `in memory`, `on disk`, or the device.
        was_found: Whether an earlier run had computed them.
        seconds: Time to compute or load them.
        saved_s: Estimated time that decoding and computing them in every epoch would have taken in addition.
        note: Why the frontier is not at the end of the constant part; None where it is.
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


@dataclass(frozen=True, repr=False)
class TrainPlan:
    """Summary of a run.

    Attributes:
        model: Name of the network, or of its class.
        weights: Source of its initial weights.
        task: Classification or regression.
        classes: Class names; None for regression.
        counts: (class, training photos, validation photos) of each class; empty if unknown.
        split: How the data was split.
        train_count: Number of training samples; None if the loader has no length.
        validation_count: Number of validation samples; None if the loader has no length.
        unreadable: Unreadable files, which are skipped.
        parameters: Number of all parameters.
        trainable: Number of trainable parameters.
        trained_layers: Paths of the largest layers that are trainable as a whole.
        lr: Highest learning rate.
        device: Device and precision.
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

    def __repr__(self) -> str:
        return block("TrainPlan", self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as labelled lines for a session."""
        names = f"{len(self.classes)}: {some(self.classes, 6)}" if self.classes else ""
        count = "unknown number of" if self.train_count is None else f"{self.train_count:,}"
        validation = "" if self.validation_count is None else f", {self.validation_count:,} for validation"
        return [
            ("model", f"{self.model}, weights: {self.weights}"),
            (
                "trained",
                f"{self.trainable:,} of {self.parameters:,} parameters "
                f"({percent(self.trainable, self.parameters)}): {some(self.trained_layers, 4)}",
            ),
            ("data", f"{count} samples for training{validation}"),
            ("classes", names),
            ("skipped", f"{len(self.unreadable)} unreadable files" if self.unreadable else ""),
            ("rate", f"{self.lr:g}, on {self.device}"),
        ]


@dataclass(frozen=True, repr=False)
class FitResult:
    """The result of `fit`.

    Attributes:
        model: The trained model in evaluation mode, with the weights of the best epoch.
        plan: Summary of model, data and options.
        config: All options, with the values that were used.
        history: One record per epoch.
        best_epoch: The epoch whose weights were kept, from 1.
        validation: Metrics of those weights on the validation photos.
        outputs: Their scores on the validation photos (N, K), in order.
        targets: The validation targets (N,).
        paths: The validation photos, in order; empty for datasets without files.
        seconds: Time of each phase.
        out: Folder of the results; None if nothing was written.
        checkpoint: Path of the saved model; None if nothing was written.
        computed_once: The part that was computed once; None if every epoch ran the whole network.
        cache_disabled_reason: Why every epoch ran it; None if a part was computed once, or if nothing is frozen.
        is_named: Whether `config` describes the run completely: network and loss by name, data as a path.
        calibration: How sure its probabilities are; None for regression, few photos, and runs that were stopped.
        stopped_by: What stopped the run before its last epoch (a signal, an error); None if it ended. The result of a
            stopped run is an attribute of the exception: `error.result`.
        to_continue: The command or call that resumes it; None if it ended, or if there is no state to resume from.
    """

    model: nn.Module
    plan: TrainPlan
    config: TrainConfig
    history: tuple[EpochRecord, ...]
    best_epoch: int
    validation: Metrics
    outputs: torch.Tensor
    targets: torch.Tensor
    paths: tuple[Source, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    out: Path | None = None
    checkpoint: Path | None = None
    computed_once: ComputedOnce | None = None
    cache_disabled_reason: str | None = None
    is_named: bool = False
    calibration: Calibration | None = None
    stopped_by: str | None = None
    to_continue: str | None = None

    def __repr__(self) -> str:
        return block(f"FitResult: {self._title()}", self._rows())

    def _repr_html_(self) -> str:
        rows = [(*record.cells(), "best" if record.epoch == self.best_epoch else "") for record in self.history]
        head, notes = (*COLUMNS, ""), [f"{label}: {text}" for label, text in self._rows() if text]
        return table_html(self._title(), head, shortened(rows, 2, MAX_EPOCHS - 3), notes)

    def _title(self) -> str:
        return f"{self.validation.headline()} in the best epoch, {self.best_epoch} of {len(self.history)}"

    def _rows(self) -> list[tuple[str, str]]:
        losses = [f"{record.train_loss:.4f}" for record in self.history]
        where = "nowhere (out=FOLDER writes it)" if self.checkpoint is None else str(self.checkpoint)
        share = "" if self.computed_once is None else f"{self.computed_once.share:.1%} of the network"
        return [
            ("saved", where),
            *self.plan.rows(),
            ("losses", f"{' -> '.join(dict.fromkeys((losses[0], losses[-1])))} in training" if losses else ""),
            ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())),
            ("once", share),
            ("sureness", str(self.calibration or "")),
            ("stopped", f"by {self.stopped_by}" if self.stopped_by else ""),
        ]

    @property
    def not_once_because(self) -> str | None:
        """The old name of `cache_disabled_reason`, for one more version."""
        message = "FitResult.not_once_because is deprecated. Use cache_disabled_reason."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.cache_disabled_reason

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data, without weights and scores."""
        return {
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "out": str(self.out) if self.out else None,
            "validation": self.validation.to_dict(),
            "best_epoch": self.best_epoch,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "epochs": [record.to_row() for record in self.history],
            "seconds": self.seconds,
            "computed_once": asdict(self.computed_once) if self.computed_once else None,
            "cache_disabled_reason": self.cache_disabled_reason,
            "not_once_because": self.cache_disabled_reason,  # the old name, for one more version
            "parameters": self.plan.parameters,
            "trainable": self.plan.trainable,
            "classes": self.plan.classes,
            "unreadable": [{"path": str(file.path), "reason": file.reason} for file in self.plan.unreadable],
            "config": self.config.model_dump(mode="json", exclude_none=True),
        }

"""The progress of a run: everything that changes during training, except network and optimizer."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.card import attach
from regraft.checkpoint.file.tree import Tree
from regraft.training.metrics import ClassMetrics, Metrics
from regraft.training.result import EpochRecord
from regraft.training.steps.tally import Tally

PHASES = ("model", "reading", "features", "setup", "training", "validation", "saving", "other")  # as they are shown


@dataclass(frozen=True)
class Best:
    """The best weights so far, with their results on the validation photos.

    Attributes:
        epoch: The epoch of these weights, from 1.
        metrics: Metrics on the validation photos.
        outputs: Scores (N, K) on them.
        targets: Their targets (N,).
        paths: The photos, in order; empty for datasets without files.
        tensors: Copies of the weights, on the CPU.
    """

    epoch: int
    metrics: Metrics
    outputs: torch.Tensor
    targets: torch.Tensor
    paths: tuple[Path, ...]
    tensors: dict[str, torch.Tensor]

    def load_into(self, model: nn.Module) -> None:
        """Copy these weights into the model."""
        slots = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, copied in self.tensors.items():
                slots[name].copy_(copied)
        attach(model, metrics=self.metrics.to_dict())

    def to_tree(self) -> Tree:
        """Convert to plain data."""
        return {
            **vars(self),
            "metrics": metrics_to_tree(self.metrics),
            "paths": list(map(str, self.paths)),
        }

    @classmethod
    def from_tree(cls, tree: Tree) -> "Best":
        """Convert back from the data of `to_tree`."""
        return cls(**{**tree, "metrics": metrics_from_tree(tree["metrics"]), "paths": tuple(map(Path, tree["paths"]))})


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        epoch: The current epoch, from 1; one more than the number of epochs when all are complete.
        step: Number of completed steps in it.
        tally: Its running totals.
        history: Records of the completed epochs.
        best: The best of them; None before the first is complete.
        seconds: Time of each phase.
        states: The random states at the beginning of the epoch, from which its order follows; None before it begins.
    """

    epoch: int = 1
    step: int = 0
    tally: Tally = field(default_factory=Tally)
    history: list[EpochRecord] = field(default_factory=list)
    best: Best | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    states: Tree | None = None
    began: float = field(default_factory=time.perf_counter)  # on the clock of this process
    _earlier_s: float = 0.0  # of `seconds`, from the processes before this one
    _written: list[Tree] = field(default_factory=list)  # converted records, so that each is converted once

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def move_seconds(self, source: str, target: str, seconds: float) -> None:
        """Count a part of one phase as another phase."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def add_preparation(self, prepared: "RunState") -> None:
        """Take over the clock, and the times so far, of the state with which this process began."""
        self.began, self._earlier_s = prepared.began, sum(self.seconds.values())
        for phase, seconds in prepared.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def all_seconds(self) -> dict[str, float]:
        """Return the time of each phase, and as `other` what remains to the clock's time."""
        rest = time.perf_counter() - self.began + self._earlier_s - sum(self.seconds.values())
        seconds = {**self.seconds, "other": self.seconds.get("other", 0.0) + max(0.0, rest)}
        return {phase: seconds[phase] for phase in PHASES if phase in seconds}

    def begin_next_epoch(self) -> None:
        """Move on to the next epoch; the micro-batch size is kept, as memory is no larger there."""
        self.epoch, self.step, self.states = self.epoch + 1, 0, None
        self.tally = Tally(at_a_time=self.tally.at_a_time)

    def to_tree(self) -> Tree:
        """Convert everything but the random states to plain data."""
        for record in self.history[len(self._written) :]:
            self._written.append({**vars(record), "validation": metrics_to_tree(record.validation)})
        return {
            "epoch": self.epoch,
            "step": self.step,
            "tally": self.tally.to_tree(),
            "history": list(self._written),
            "best": self.best.to_tree() if self.best is not None else None,
            "seconds": self.all_seconds(),
        }

    @classmethod
    def from_tree(cls, tree: Tree) -> "RunState":
        """Convert back from the data of `to_tree`."""
        return cls(
            epoch=tree["epoch"],
            step=tree["step"],
            tally=Tally(**tree["tally"]),
            history=[
                EpochRecord(**{**record, "validation": metrics_from_tree(record["validation"])})
                for record in tree["history"]
            ],
            best=Best.from_tree(tree["best"]) if tree["best"] is not None else None,
            seconds=tree["seconds"],
        )


def metrics_to_tree(metrics: Metrics) -> Tree:
    """Convert metrics to plain data; of the confusion matrix, only nonzero entries are kept."""
    confusion = torch.tensor(metrics.confusion, dtype=torch.int64)
    places = confusion.nonzero()
    counts = confusion[tuple(places.T)]
    return {
        **vars(metrics),
        "per_class": [dataclasses.asdict(entry) for entry in metrics.per_class],
        "confusion": (len(metrics.confusion), places, counts),
    }


def metrics_from_tree(tree: Tree) -> Metrics:
    """Convert back from the data of `metrics_to_tree`."""
    width, places, counts = tree["confusion"]
    confusion = torch.zeros(width, width, dtype=torch.int64)
    confusion[tuple(places.T)] = counts
    per_class = tuple(ClassMetrics(**entry) for entry in tree["per_class"])
    rows: list[Any] = confusion.tolist()
    return Metrics(**{**tree, "per_class": per_class, "confusion": tuple(map(tuple, rows))})

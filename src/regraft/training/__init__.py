"""Train, measure, predict."""

from regraft.training.config import TrainConfig
from regraft.training.evaluate import Prediction, evaluate, predict
from regraft.training.fit import fit
from regraft.training.metrics import ClassMetrics, Metrics
from regraft.training.result import EpochRecord, FitResult, Plan

__all__ = [
    "ClassMetrics",
    "EpochRecord",
    "FitResult",
    "Metrics",
    "Plan",
    "Prediction",
    "TrainConfig",
    "evaluate",
    "fit",
    "predict",
]

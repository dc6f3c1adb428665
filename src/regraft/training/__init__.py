"""Train, measure, predict.

`fit` is imported from `regraft.training.fitting`: it imports the compiler of torch, which `predict` does not need.
"""

from regraft.training.config import TrainConfig
from regraft.training.inference import Prediction, evaluate, predict
from regraft.training.metrics import ClassMetrics, Metrics
from regraft.training.result import EpochRecord, FitResult, TrainPlan

__all__ = [
    "ClassMetrics",
    "EpochRecord",
    "FitResult",
    "Metrics",
    "Prediction",
    "TrainConfig",
    "TrainPlan",
    "evaluate",
    "predict",
]

"""The contents of the report of an evaluation."""

from pathlib import Path
from typing import Any

from torch import nn

from regraft.checkpoint.file.format import current_versions
from regraft.report.predictions import describe_predictions
from regraft.report.suggestions import suggest_after_evaluation
from regraft.training.metrics import Metrics, Scores


def describe_evaluation(metrics: Metrics, scores: Scores, model: nn.Module | None = None) -> dict[str, Any]:
    """Return the variables of the template `evaluation.html`; with the network, heat maps of its mistakes too."""
    return {
        "scores": scores,
        "part": "",
        "data": Path(scores.data).resolve().name if scores.data else None,
        "versions": current_versions(),
        "suggestions": suggest_after_evaluation(metrics, scores),
        "unreadable": scores.unreadable,
        **describe_predictions(metrics, scores, model),
    }

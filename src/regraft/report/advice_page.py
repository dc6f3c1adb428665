"""The contents of the page of an advice."""

from pathlib import Path
from typing import Any

from regraft.advice.result import Advice, Ranking
from regraft.checkpoint.file.format import current_versions
from regraft.report import plots

COLUMNS = {
    "RGN": "Relative gradient norm: the norm of the gradient of these layers as a share of the norm of their weights "
    "(arXiv 2210.11466).",
    "LogME": "Log evidence of a linear model on the features (arXiv 2102.11005); beside, not leading.",
    "epoch": "Measured on a few photos, for all training photos in one view.",
    "memory": "Estimated, for a step with AdamW.",
    "file": "What a training changes: a checkpoint beside its base.",
}


def describe_advice(advice: Advice | Ranking) -> dict[str, Any]:
    """Return the variables of the template `advice.html`."""
    best = advice.best if isinstance(advice, Ranking) else advice
    measured = [(d.name, d.score, d.error or 0.0) for d in best.depths if d.score is not None]
    score = "accuracy on photos left out" if best.task == "classification" else "R² on photos left out"
    return {
        "advice": advice,
        "best": best,
        "data": Path(best.data).resolve().name if best.data else None,
        "tables": [entry.table() for entry in (advice, best)] if isinstance(advice, Ranking) else [best.table()],
        "columns": COLUMNS,
        "plot": (
            plots.scores_by_depth(measured, best.chance, best.recommended.name if best.recommended else None, score)
            if measured
            else None
        ),
        "versions": current_versions(),
    }

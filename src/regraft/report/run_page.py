"""The contents of the report of one training run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.anatomy.model_summary import summary
from regraft.anatomy.summary_table import ModelSummary, cells
from regraft.checkpoint.file.format import current_versions
from regraft.report import plots
from regraft.report.layer_diagram import describe_blocks
from regraft.report.predictions import describe_predictions
from regraft.report.suggestions import suggest_after_run
from regraft.training.config import TrainConfig
from regraft.training.metrics import Scores
from regraft.training.result import FitResult

SHOWN_DEPTH = 2


@dataclass(frozen=True)
class LayerRow:
    """A row of the table of layers."""

    name: str
    path: str
    depth: int
    state: str
    cells: tuple[str, ...]


def describe_run(result: FitResult, *, heat_maps: bool = True) -> dict[str, Any]:
    """Return the variables of the template `run.html`, with heat maps of the mistakes or without."""
    checkpoint = result.checkpoint
    scores = Scores(result.outputs, result.targets, result.paths)
    options = _options(result.config)
    model_summary = summary(result.model)
    return {
        "result": result,
        "part": "validation ",  # of the data, in words
        "plan": result.plan,
        "data": Path(result.config.data).name if result.config.data else None,
        "predict_command": f"regraft predict {shlex.quote(str(checkpoint))} photo.jpg" if checkpoint else None,
        "options": options,
        "changed_options": [option for option in options if option[2]],
        "versions": current_versions(),
        "suggestions": suggest_after_run(result, scores),
        "unreadable": result.plan.unreadable,
        # Of the validation loss, which does not depend on the training loss.
        "loss_name": "mean squared error" if result.plan.task == "regression" else "cross-entropy",
        "losses": plots.learning_curves(
            {
                "training": [record.train_loss for record in result.history],
                "validation": [record.validation.loss for record in result.history],
            },
            result.best_epoch,
            "loss",
            from_zero=True,
        ),
        "progress": _progress(result),
        **describe_predictions(result.validation, scores, result.model if heat_maps else None),
        **_layers(model_summary),
        "blocks": describe_blocks(result.model, model_summary),
    }


def _progress(result: FitResult) -> str:
    """Plot the metric by which a person judges: the accuracy, or the mean absolute error."""
    is_regression = result.plan.task == "regression"
    metrics = [record.validation for record in result.history]
    values = [entry.mae if is_regression else entry.accuracy for entry in metrics]
    label = "mean absolute error" if is_regression else "accuracy"
    return plots.learning_curves({"validation": values}, result.best_epoch, label, from_zero=is_regression)


def _layers(model_summary: ModelSummary) -> dict[str, Any]:
    rows = [
        LayerRow(layer.path.rpartition(".")[2] or layer.type, layer.path, layer.depth, layer.state, cells(layer)[:-1])
        for layer in model_summary.layers
    ]
    upper = [row for row in rows if row.depth <= SHOWN_DEPTH]
    return {"layers": upper, "all_layers": rows if len(rows) > len(upper) else None, "model_summary": model_summary}


def _options(config: TrainConfig) -> list[tuple[str, str, bool]]:
    """Return (name, value, whether it differs from the default) of every option."""
    defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
    return [(name, _option_text(value), value != defaults[name]) for name, value in config]


def _option_text(value: Any) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

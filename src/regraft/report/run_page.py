"""The contents of the report of one training run."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.anatomy.model_summary import summary
from regraft.anatomy.summary_table import ModelSummary, cells
from regraft.checkpoint.file.format import current_versions
from regraft.report import plots
from regraft.report.pictures import thumbnail
from regraft.training.config import TrainConfig
from regraft.training.metrics import reliability
from regraft.training.result import FitResult

MAX_PICTURES = 12
MAX_PAIRS = 8
SHOWN_DEPTH = 2
FEW_PHOTOS = 100
NORMAL_QUANTILE = 1.959964  # of 0.975: leaves 2.5 % on either side


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction: name of the photo, thumbnail, true and predicted target, and confidence or error."""

    name: str
    picture: str | None
    true: str
    predicted: str
    degree: str


@dataclass(frozen=True)
class LayerRow:
    """A row of the table of layers."""

    name: str
    path: str
    depth: int
    state: str
    cells: tuple[str, ...]


def describe_run(result: FitResult) -> dict[str, Any]:
    """Return the variables of the template `run.html`."""
    checkpoint = result.checkpoint
    page: dict[str, Any] = {
        "result": result,
        "plan": result.plan,
        "metrics": result.validation,
        "things": "photos" if result.paths else "examples",
        "few": result.validation.count < FEW_PHOTOS,
        "has_pictures": bool(result.paths),
        "data": Path(result.config.data).name if result.config.data else None,
        "predict_command": f"regraft predict {shlex.quote(str(checkpoint))} photo.jpg" if checkpoint else None,
        "options": _options(result.config),
        "versions": current_versions(),
        "total_s": sum(result.seconds.values()),
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
        **_layers(summary(result.model)),
    }
    page |= _about_numbers(result) if result.plan.task == "regression" else _about_classes(result)
    return page


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


def _about_classes(result: FitResult) -> dict[str, Any]:
    metrics = result.validation
    names = [entry.name for entry in metrics.per_class]
    correct = round((metrics.accuracy or 0.0) * metrics.count)
    most = max(metrics.per_class, key=lambda entry: entry.count)
    pairs = [
        (count, names[row], names[column])
        for row, line in enumerate(metrics.confusion)
        for column, count in enumerate(line)
        if count and row != column
    ]
    return {
        "correct": correct,
        "interval": wilson_interval(correct, metrics.count),
        "most_frequent": (most.name, most.count / metrics.count),
        "progress": plots.learning_curves(
            {"validation": [record.validation.accuracy for record in result.history]}, result.best_epoch, "accuracy"
        ),
        "confusion": plots.confusion(metrics.confusion, names),
        "confusion_numbered": len(names) <= plots.MAX_NUMBERED_CLASSES,
        "pairs": sorted(pairs, key=lambda pair: -pair[0])[:MAX_PAIRS],
        "reliability": plots.reliability_diagram(reliability(result.outputs, result.targets)),
        "mistakes": _confident_mistakes(result, names),
    }


def _about_numbers(result: FitResult) -> dict[str, Any]:
    predicted, true = result.outputs.double().flatten(), result.targets.double().flatten()
    errors = predicted - true
    worst = errors.abs().argsort(descending=True, stable=True)[:MAX_PICTURES].tolist() if result.paths else []
    return {
        "progress": plots.learning_curves(
            {"validation": [record.validation.mae for record in result.history]},
            result.best_epoch,
            "mean absolute error",
            from_zero=True,
        ),
        "scatter": plots.predicted_against_true(predicted.tolist(), true.tolist()),
        "residuals": plots.residuals(errors.tolist()),
        "mistakes": [
            _mistake(result.paths[index], f"{true[index]:.4g}", f"{predicted[index]:.4g}", f"{errors[index]:+.4g}")
            for index in worst
        ],
    }


def _confident_mistakes(result: FitResult, names: list[str]) -> list[Mistake]:
    if not result.paths:
        return []
    probability, predicted = result.outputs.double().softmax(1).max(1)
    wrong = (predicted != result.targets).nonzero().flatten()
    order = probability[wrong].argsort(descending=True, stable=True)
    indices: list[int] = wrong[order][:MAX_PICTURES].tolist()
    return [
        _mistake(result.paths[i], names[int(result.targets[i])], names[int(predicted[i])], f"{probability[i]:.1%}")
        for i in indices
    ]


def _mistake(path: Path, true: str, predicted: str, degree: str) -> Mistake:
    return Mistake(path.name, thumbnail(path), true, predicted, degree)


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

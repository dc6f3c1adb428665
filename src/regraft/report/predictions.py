"""What the pages of a run and of an evaluation share: figures, plots and example photos of measured predictions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from regraft.data.sources import ShardMember, Source, short_name
from regraft.report import plots
from regraft.report.calibration_intervals import calibration_interval
from regraft.report.explanations.heat_maps import HeatMap, HeatMaps, draw_heat_maps
from regraft.report.pictures import thumbnail
from regraft.training.metrics import Metrics, Scores, reliability

MAX_MISTAKES = 12
MAX_RIGHT = 6  # in each of the two galleries of right predictions
MAX_PAIRS = 8
FEW_PHOTOS = 100


@dataclass(frozen=True)
class Example:
    """A prediction with its photo: name, thumbnail, true and predicted target, and confidence or error.

    `heat_map` shows where it looked, where that is known.
    """

    name: str
    picture: str | None
    true: str
    predicted: str
    degree: str
    is_right: bool = False
    heat_map: HeatMap | None = None


@dataclass(frozen=True)
class Gallery:
    """Examples of one kind, with a title, a note, and heat maps of all of them where there are any."""

    title: str
    note: str
    examples: tuple[Example, ...]
    heat_maps: HeatMaps | None = None


def describe_predictions(metrics: Metrics, scores: Scores, model: nn.Module | None = None) -> dict[str, Any]:
    """Return the variables of the sections that both pages share.

    Args:
        metrics: What was measured.
        scores: The scores behind it.
        model: The network, for heat maps of its mistakes; None for none.
    """
    page: dict[str, Any] = {
        "metrics": metrics,
        "regression": metrics.task == "regression",
        "things": "photos" if scores.paths else "examples",
        "few": metrics.count < FEW_PHOTOS,
        "has_pictures": bool(scores.paths),
    }
    return page | (_about_numbers(scores) if metrics.task == "regression" else _about_classes(metrics, scores, model))


def _about_classes(metrics: Metrics, scores: Scores, model: nn.Module | None) -> dict[str, Any]:
    names = [entry.name for entry in metrics.per_class]
    most = max(metrics.per_class, key=lambda entry: entry.count)
    return {
        "correct": round((metrics.accuracy or 0.0) * metrics.count),
        "interval": metrics.accuracy_interval,
        "most_frequent": (most.name, most.count / metrics.count),
        "confusion": plots.confusion(metrics.confusion, names),
        "confusion_numbered": len(names) <= plots.MAX_NUMBERED_CLASSES,
        "pairs": metrics.confusions()[:MAX_PAIRS],
        "reliability": plots.reliability_diagram(reliability(scores.outputs, scores.targets)),
        "calibration": calibration_interval(scores.outputs, scores.targets),
        "galleries": _galleries_of_classes(scores, names, model) if scores.paths else [],
    }


def _about_numbers(scores: Scores) -> dict[str, Any]:
    predicted, true = scores.outputs.double().flatten(), scores.targets.double().flatten()
    errors = predicted - true
    order: list[int] = errors.abs().argsort(descending=True, stable=True).tolist()

    def gallery(title: str, note: str, indices: Sequence[int]) -> Gallery:
        return Gallery(
            title,
            note,
            tuple(
                _example(scores.paths[i], f"{true[i]:.4g}", f"{predicted[i]:.4g}", f"{errors[i]:+.4g}") for i in indices
            ),
        )

    worst, best = order[:MAX_MISTAKES], order[MAX_MISTAKES:][::-1][:MAX_RIGHT]
    return {
        "scatter": plots.predicted_against_true(predicted.tolist(), true.tolist()),
        "residuals": plots.residuals(errors.tolist()),
        "galleries": [
            gallery("Worst errors", "Look here for wrong numbers, bad crops and photos unlike the others.", worst),
            gallery("Closest", "", best),
        ]
        if scores.paths
        else [],
    }


def _galleries_of_classes(scores: Scores, names: Sequence[str], model: nn.Module | None) -> list[Gallery]:
    """Return the most confident mistakes, and the least and the most confident right predictions."""
    probability, predicted = scores.outputs.double().softmax(1).max(1)
    is_right = predicted == scores.targets
    order = probability.argsort(descending=True, stable=True)
    wrong: list[int] = order[~is_right[order]].tolist()
    right: list[int] = order[is_right[order]].tolist()
    surest = _of_many_classes(right, predicted.tolist(), len(names))
    least = [index for index in reversed(right) if index not in surest][:MAX_RIGHT]

    def gallery(title: str, note: str, indices: Sequence[int]) -> Gallery:
        examples = tuple(
            _example(
                scores.paths[i],
                names[int(scores.targets[i])],
                names[int(predicted[i])],
                f"{probability[i]:.1%}",
                is_right=bool(is_right[i]),
            )
            for i in indices
        )
        return Gallery(title, note, examples)

    note = "Look here for wrong labels, bad crops and classes that overlap."
    if len(wrong) > MAX_MISTAKES:
        note += f" The {MAX_MISTAKES} surest of {len(wrong)} mistakes."
    mistakes = gallery("Most confident mistakes", note, wrong[:MAX_MISTAKES])
    if model is not None and wrong:
        mistakes = _with_heat_maps(mistakes, model, scores, wrong[:MAX_MISTAKES], predicted.tolist())
    return [
        mistakes,
        gallery("Right, but least sure", "More photos like these teach it the most.", least),
        gallery("Right and sure", "What the model takes for typical.", surest),
    ]


def _with_heat_maps(
    gallery: Gallery, model: nn.Module, scores: Scores, indices: Sequence[int], predicted: Sequence[int]
) -> Gallery:
    """Return a gallery with heat maps of what spoke for the predicted classes."""
    heat_maps = draw_heat_maps(model, [scores.paths[i] for i in indices], [predicted[i] for i in indices])
    pairs = zip(gallery.examples, heat_maps.maps, strict=True)
    return replace(
        gallery,
        examples=tuple(replace(example, heat_map=heat_map) for example, heat_map in pairs),
        heat_maps=heat_maps,
    )


def _of_many_classes(order: Sequence[int], classes: Sequence[int], count: int) -> list[int]:
    """Return the first predictions of an order, so few of each of the `count` classes that many are shown."""
    limit, taken, chosen = -(-MAX_RIGHT // count), Counter[int](), []
    for index in order:
        if taken[classes[index]] < limit and len(chosen) < MAX_RIGHT:
            taken[classes[index]] += 1
            chosen.append(index)
    return chosen


def _example(path: Source, true: str, predicted: str, degree: str, *, is_right: bool = False) -> Example:
    name = short_name(path) if isinstance(path, ShardMember) else path.name
    return Example(name, thumbnail(path), true, predicted, degree, is_right)

import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy.stats import binomtest

from regraft.training.metrics import Metrics, measure, reliability, wilson_interval

NAMES = ("a", "b", "c", "d")


def draw(seed: int, count: int = 97, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    scores = torch.randn(count, classes, generator=generator) * 2
    return scores + torch.nn.functional.one_hot(targets, classes) * seed, targets


@pytest.mark.parametrize("seed", range(4))
def test_measure_classification_figures_are_scikit_learns(seed: int) -> None:
    scores, targets = draw(seed)
    found, predicted = measure(scores, targets, NAMES), scores.argmax(1)
    report = sklearn.metrics.classification_report(
        targets, predicted, target_names=NAMES, labels=range(4), output_dict=True, zero_division=0.0
    )
    assert found.accuracy == sklearn.metrics.accuracy_score(targets, predicted)
    assert found.loss == pytest.approx(sklearn.metrics.log_loss(targets, scores.double().softmax(1), labels=range(4)))
    for one in found.per_class:
        figures = (one.precision, one.recall, one.f1, one.count)
        wanted = report[one.name]
        assert figures == (wanted["precision"], wanted["recall"], wanted["f1-score"], wanted["support"])
    assert np.array_equal(found.confusion, sklearn.metrics.confusion_matrix(targets, predicted, labels=range(4)))
    assert found.count == len(targets)


@pytest.mark.parametrize("seed", range(4))
def test_measure_calibration_error_is_its_definition(seed: int) -> None:
    scores, targets = draw(seed)
    probabilities = scores.softmax(1).tolist()
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(probabilities, targets.tolist(), strict=True):
        confidence = max(row)
        members.setdefault(min(int(confidence * 10), 9), []).append((confidence, row.index(confidence) == target))
    expected = 0.0
    for inside in members.values():
        mean = sum(confidence for confidence, _ in inside) / len(inside)
        right = sum(correct for _, correct in inside) / len(inside)
        expected += len(inside) / len(targets) * abs(mean - right)
    assert measure(scores, targets, NAMES).calibration_error == pytest.approx(expected, abs=1e-7)
    assert sum(count for _, _, count in reliability(scores, targets)) == len(targets)


def test_reliability_puts_a_certain_prediction_in_the_last_bin() -> None:
    assert reliability(torch.tensor([[100.0, 0.0]]), torch.tensor([0])) == [(1.0, 1.0, 1)]


def test_measure_counts_a_class_as_zero_that_is_never_predicted_or_never_occurs() -> None:
    found = measure(torch.tensor([[1.0, 0.0, 0.0]] * 2), torch.tensor([0, 1]), ("a", "b", "c"))
    assert [(one.precision, one.recall, one.count) for one in found.per_class] == [(0.5, 1, 1), (0, 0, 1), (0, 0, 0)]
    assert found.confusion == ((1, 0, 0), (1, 0, 0), (0, 0, 0))


@pytest.mark.parametrize("columns", [False, True], ids=["(N,)", "(N, 1)"])
def test_measure_regression_figures_are_scikit_learns(columns: bool) -> None:
    targets = torch.randn(50)
    outputs = targets + torch.randn(50) / 3
    found = measure(outputs[:, None] if columns else outputs, targets, None)
    assert found.mae == pytest.approx(sklearn.metrics.mean_absolute_error(targets, outputs))
    assert found.loss == pytest.approx(sklearn.metrics.mean_squared_error(targets, outputs))
    assert found.rmse == pytest.approx(sklearn.metrics.root_mean_squared_error(targets, outputs))
    assert found.r2 == pytest.approx(sklearn.metrics.r2_score(targets, outputs))
    assert (found.accuracy, found.per_class, found.confusion) == (None, (), ())


def test_measure_has_no_explained_variance_of_equal_targets() -> None:
    found = measure(torch.randn(4), torch.ones(4), None)
    assert found.r2 is None
    assert "R²" not in found.headline()


@pytest.mark.parametrize("numbers", [True, False])
def test_measure_figures_are_json(numbers: bool) -> None:
    found = measure(torch.randn(5), torch.randn(5), None) if numbers else measure(*draw(1), NAMES)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["count"] == found.count
    assert ("accuracy" in data) != numbers
    assert ("mae" in data) == numbers


def metrics(accuracy: float | None, loss: float) -> Metrics:
    return Metrics("regression" if accuracy is None else "classification", 1, loss, accuracy)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (metrics(0.9, 2.0), metrics(0.8, 1.0)),
        (metrics(0.9, 1.0), metrics(0.9, 2.0)),
        (metrics(None, 1.0), metrics(None, 2.0)),
        (metrics(0.9, 1.0), None),
        (metrics(None, 1.0), metrics(None, math.nan)),
        (metrics(0.9, 1.0), metrics(0.9, math.nan)),
    ],
)
def test_metrics_are_better_when_more_accurate_then_by_lower_loss(better: Metrics, worse: Metrics | None) -> None:
    assert better.is_better_than(worse)
    if worse is not None:
        assert not worse.is_better_than(better)
        assert not better.is_better_than(better)


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (7, 7), (132, 153), (1, 1)])
def test_wilson_interval_agrees_with_scipy(correct: int, count: int) -> None:
    assert wilson_interval(correct, count) == pytest.approx(
        tuple(binomtest(correct, count).proportion_ci(method="wilson")), abs=1e-6
    )

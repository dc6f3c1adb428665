"""How sure a calibration error is."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from regraft.report.calibration_intervals import calibration_interval
from regraft.training.metrics import measure


def scores(count: int, temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores (N, 2) and outcomes that are drawn by the scores over a temperature: 1 is perfectly calibrated."""
    generator = torch.Generator().manual_seed(seed)
    odds = 3 * torch.rand(count, generator=generator)
    is_first = torch.rand(count, generator=generator) < torch.sigmoid(odds / temperature)
    return torch.stack([odds, torch.zeros(count)], 1), (~is_first).long()


def test_calibration_interval_agrees_with_scipy_where_the_error_is_large() -> None:
    outputs, targets = scores(400, 4.0)
    confidence, predicted = outputs.softmax(1).double().max(1)
    is_right = (predicted == targets).double().numpy()

    def error(confidence: np.ndarray, is_right: np.ndarray) -> float:
        bins = np.minimum((confidence * 10).astype(int), 9)
        gaps = [(confidence[bins == k] - is_right[bins == k]).sum() for k in range(10)]
        return float(np.abs(gaps).sum() / len(confidence))

    data = (confidence.numpy(), is_right)
    rng = np.random.default_rng(0)
    expected = bootstrap(data, error, paired=True, vectorized=False, n_resamples=600, method="BCa", rng=rng)
    interval = calibration_interval(outputs, targets)
    measured = measure(outputs, targets, ("a", "b")).calibration_error
    assert measured == pytest.approx(error(*data))
    assert interval.low < measured < interval.high
    assert interval.low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert interval.high == pytest.approx(expected.confidence_interval.high, abs=0.02)
    assert measured > interval.chance


def test_calibration_interval_holds_zero_for_a_calibrated_model() -> None:
    hits = 0
    for seed in range(20):
        outputs, targets = scores(120, 1.0, seed)
        interval = calibration_interval(outputs, targets)
        hits += interval.low == 0
        assert 0 < interval.chance < 0.2
        assert interval == calibration_interval(outputs, targets)
    assert hits >= 17


def test_calibration_interval_of_scores_that_are_not_numbers_is_not_a_number() -> None:
    interval = calibration_interval(torch.full((9, 2), torch.nan), torch.zeros(9, dtype=torch.long))
    assert np.isnan(interval.high)

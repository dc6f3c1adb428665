"""Cross-validated probes, and LogME, against formulas and loops written out here."""

import math

import numpy as np
import pytest
import torch

from regraft.advice.probes import count_folds, logme, probe


def reference_logme(features: np.ndarray, targets: np.ndarray, outputs: int) -> float:
    """The evidence of arXiv 2102.11005, equation 2, with explicit matrices, at MacKay's fixed point."""
    count, width = features.shape
    values = []
    for index in range(outputs):
        y = (targets == index).astype(float) if outputs > 1 else targets.astype(float)
        alpha = beta = 1.0
        for _ in range(500):
            a = alpha * np.eye(width) + beta * features.T @ features
            m = beta * np.linalg.solve(a, features.T @ y)
            gamma = sum(beta * s / (alpha + beta * s) for s in np.linalg.eigvalsh(features.T @ features))
            alpha = gamma / (m @ m + 1e-5)
            beta = (count - gamma) / (((features @ m - y) ** 2).sum() + 1e-5)
        a = alpha * np.eye(width) + beta * features.T @ features
        m = beta * np.linalg.solve(a, features.T @ y)
        fit = ((features @ m - y) ** 2).sum()
        evidence = (
            count / 2 * math.log(beta)
            + width / 2 * math.log(alpha)
            - count / 2 * math.log(2 * math.pi)
            - beta / 2 * fit
            - alpha / 2 * (m @ m)
            - np.linalg.slogdet(a)[1] / 2
        )
        values.append(evidence / count)
    return float(np.mean(values))


@pytest.mark.parametrize(("count", "width"), [(60, 8), (30, 50)])
def test_logme_is_the_evidence_of_the_paper(count: int, width: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, width)) * rng.uniform(0.2, 3, width) + 0.5
    targets = (features[:, 0] + 2 * rng.normal(size=count) > 0.5).astype(int) + (features[:, 1] > 1)
    assert logme(features, targets, 3) == pytest.approx(reference_logme(features, targets, 3), abs=1e-6)
    numbers = features[:, 0] + rng.normal(size=count)
    assert logme(features, numbers, 1) == pytest.approx(reference_logme(features, numbers, 1), abs=1e-6)


def test_logme_rises_with_what_the_features_tell() -> None:
    rng = np.random.default_rng(1)
    targets = np.arange(80) % 4
    noise, telling = rng.normal(size=(80, 16)), np.eye(4)[targets] @ rng.normal(size=(4, 16))
    values = [logme(noise + strength * telling, targets, 4) for strength in (0.0, 0.5, 2.0)]
    assert values == sorted(values)


def test_probe_scores_photos_that_it_has_not_learned_from() -> None:
    torch.manual_seed(0)
    targets = torch.arange(60) % 3
    noise = torch.randn(60, 40)
    random = probe(noise, targets, 3)
    assert random is not None
    assert random.score < 0.6  # a head that has seen all photos gets every one of them
    telling = probe(noise + 6 * torch.eye(40)[targets], targets, 3)
    assert telling is not None
    assert telling.score > 0.95
    assert telling.chance == pytest.approx(1 / 3)
    assert 0 < telling.error < random.error < 0.1


def test_probe_of_numbers_gives_r_squared() -> None:
    torch.manual_seed(0)
    activations = torch.randn(80, 5)
    targets = activations @ torch.randn(5) + 0.1 * torch.randn(80)
    known = probe(activations, targets, 1)
    chance = probe(activations, torch.randn(80), 1)
    assert known is not None
    assert chance is not None
    assert known.score > 0.97
    assert chance.score < 0.2


def test_count_folds_leaves_a_photo_of_each_class_to_learn_from() -> None:
    assert count_folds(torch.arange(30) % 3) == 5
    assert count_folds(torch.tensor([0, 0, 0, 1, 1, 1, 1])) == 3
    assert count_folds(torch.tensor([0, 0, 1, 1, 1, 2])) == 2  # the class of one photo is not scored
    assert count_folds(torch.arange(5)) == count_folds(torch.zeros(9, dtype=torch.int64)) == 1
    assert probe(torch.randn(5, 3), torch.arange(5), 5) is None
    assert probe(torch.full((12, 3), float("nan")), torch.arange(12) % 2, 2) is None

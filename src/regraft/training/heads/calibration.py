"""Scores → probabilities that are as sure as they are right: a factor on the scores, fitted on photos left out.

Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, of which the factor is the inverse of the temperature.
"""

import torch

MAX_ITERATIONS = 30
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e3


def fit_factor(scores: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, photos: int) -> float:
    """Return the factor on scores (N, K) of the lowest cross-entropy with classes (N,), of rows with weights (N,).

    The targets are as of `photos + 1` photos of which one could be anything: scores that separate all photos would
    else have no largest factor. Newton's method finds it, as the loss is convex in the factor.
    """
    outputs = scores.shape[1]
    unsure = 1 / (photos + 2)
    own = scores.gather(1, targets[:, None])[:, 0]
    wanted = (1 - unsure) * own + unsure * scores.mean(1)
    share = weights / weights.sum().clamp(min=1e-30)
    spread = float((share * scores.var(1, correction=0)).sum()) ** 0.5
    if outputs < 2 or not 0 < spread < float("inf"):
        return 1.0
    factor = 1 / spread
    for _ in range(MAX_ITERATIONS):
        probabilities = (factor * scores).softmax(1)
        mean = (probabilities * scores).sum(1)
        variance = (probabilities * scores.square()).sum(1) - mean.square()
        slope, bend = float((share * (mean - wanted)).sum()), float((share * variance).sum())
        step = -slope / max(bend, 1e-12 * spread**2)
        moved = min(max(factor + step, factor / 4), factor * 4)
        if abs(moved - factor) <= 1e-4 * factor:
            break
        factor = moved
    return min(max(factor * spread, MIN_FACTOR), MAX_FACTOR) / spread

"""How well a linear head does on the activations at one depth, on photos that it has not learned from."""

import math
from dataclasses import dataclass

import numpy as np
import torch

MAX_FOLDS = 5
DRAWS = 4  # of the folds, over which scores are averaged
PENALTIES = np.logspace(-3, 3, 13)  # times the mean squared singular value
MIN_SPREAD = 1e-9
MAX_LOGME_STEPS = 100
LOGME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Probe:
    """A cross-validated linear probe.

    Attributes:
        score: Share of the photos that are right, or R² of numbers, on photos left out.
        error: Standard error of the score.
        chance: The score of a guess that has not seen the photo.
        losses: Squared error of each scored photo, summed over the classes as 0 and 1, in units of the spread of the
            targets: 1 for a guess. (P,)
        folds: Number of folds.
        width: Number D of activations.
    """

    score: float
    error: float
    chance: float
    losses: np.ndarray
    folds: int
    width: int


def count_folds(targets: torch.Tensor) -> int:
    """Return the number of folds for cross-validation, 5 or fewer; 1 if there is none.

    Each fold holds out photos of every class that has two or more; a class with a single photo cannot be learned while
    that is left out.
    """
    if targets.is_floating_point():
        return min(MAX_FOLDS, len(targets)) if len(targets) >= 2 * MAX_FOLDS else 1
    counts = torch.bincount(targets)
    counts = counts[counts >= 2]
    return min(MAX_FOLDS, int(counts.min())) if len(counts) >= 2 else 1


def probe(activations: torch.Tensor, targets: torch.Tensor, outputs: int, *, seed: int = 0) -> Probe | None:
    """Cross-validate a linear head on activations (N, D).

    Args:
        activations: (N, D), finite.
        targets: (N,) of int64 classes below K, or of floats.
        outputs: K; 1 for numbers.
        seed: Random seed of the folds.

    Returns:
        The probe; None where too few photos allow no folds, or an activation is not finite.
    """
    folds = count_folds(targets)
    if folds < 2 or not bool(activations.isfinite().all()):
        return None
    predicted = [out_of_fold(activations, targets, outputs, folds, seed + draw) for draw in range(DRAWS)]
    expected = targets.numpy()
    width = activations.shape[1]
    columns = expected[:, None].astype(float) if targets.is_floating_point() else np.eye(outputs)[expected]
    spread = float(((columns - columns.mean(0)) ** 2).sum(1).mean()) or 1.0
    squares = np.mean([((scores - columns) ** 2).sum(1) for scores in predicted], 0) / spread
    if targets.is_floating_point():
        error = float(squares.std()) / math.sqrt(len(squares))
        return Probe(1 - float(squares.mean()), error, 0.0, squares, folds, width)
    counts = np.bincount(expected, minlength=outputs)
    is_scored = counts[expected] >= 2
    hits = np.mean([scores.argmax(1) == expected for scores in predicted], 0)[is_scored]
    # Agresti and Coull: the plain formula gives zero where all or none are right.
    count, share = len(hits) + 4, (hits.sum() + 2) / (len(hits) + 4)
    error, chance = math.sqrt(share * (1 - share) / count), counts.max() / len(expected)
    return Probe(float(hits.mean()), error, chance, squares[is_scored], folds, width)


def out_of_fold(activations: torch.Tensor, targets: torch.Tensor, outputs: int, folds: int, seed: int) -> np.ndarray:
    """Return what heads predict for photos that they have not learned from: scores (N, K), or numbers (N, 1).

    The heads are ridge regressions on the classes as 0 and 1, exact and in closed form: with the hat matrix H of all
    photos, the residuals of a left-out fold B are (I − H_BB)⁻¹ (y − H y)_B. Of the penalties, that with the least
    squared error over all folds is taken.
    """
    expected = targets.numpy()
    is_regression = targets.is_floating_point()
    columns = expected[:, None].astype(float) if is_regression else np.eye(outputs)[expected]
    inputs = activations.double().numpy()
    spread = inputs.std(0)
    inputs = (inputs - inputs.mean(0)) / np.where(spread > MIN_SPREAD * spread.max(), spread, np.inf)
    squares, vectors = np.linalg.eigh(inputs @ inputs.T)  # of the photos with each other
    squares = squares.clip(0)
    mean = columns.mean(0)
    projected = vectors.T @ (columns - mean)
    counts = np.zeros(1) if is_regression else np.bincount(expected, minlength=outputs)
    # Photos of a class with one photo are a stratum of their own: they take part in learning alone.
    strata = np.zeros(len(inputs), dtype=int) if is_regression else np.where(counts[expected] >= 2, expected, outputs)
    number = fold_numbers(strata, folds, seed)
    best: tuple[float, np.ndarray] | None = None
    for penalty in PENALTIES * max(float(squares.mean()), 1e-12):
        shrunk = squares / (squares + penalty)
        residuals = columns - mean - vectors @ (shrunk[:, None] * projected)
        for fold in range(folds):
            rows = np.flatnonzero(number == fold)
            hat = (vectors[rows] * shrunk) @ vectors[rows].T + 1 / len(inputs)
            residuals[rows] = np.linalg.solve((1 + 1e-9) * np.eye(len(rows)) - hat, residuals[rows])
        error = float((residuals**2).mean())
        if best is None or error < best[0]:
            best = error, columns - residuals
    assert best is not None
    return best[1]


def fold_numbers(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the number of the fold of each photo, (N,): random, even within each label and of even sizes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_label = order[labels[order].argsort(kind="stable")]
    numbers = np.empty(len(labels), dtype=int)
    numbers[by_label] = np.arange(len(labels)) % folds
    return numbers


def logme(activations: np.ndarray, targets: np.ndarray, outputs: int) -> float | None:
    """Return LogME: the log evidence a photo of a linear model on activations (N, D), the mean over the classes.

    With F the activations, y one column of the targets (one-hot for classes) and its precisions α (of the weights) and
    β (of the noise), the evidence is

        L(α, β) = N/2 log β + D/2 log α − N/2 log 2π − β/2 ‖F m − y‖² − α/2 ‖m‖² − 1/2 log |A|,
        A = α I + β FᵀF,   m = β A⁻¹ Fᵀ y,

    at its maximum, found by MacKay's fixed point: γ = Σ β σ² / (α + β σ²) over the eigenvalues σ² of FᵀF,
    α ← γ / ‖m‖², β ← (N − γ) / ‖F m − y‖².

    Returns:
        L / N, averaged over the K columns; None where it is not finite (fewer than two photos, constant targets).

    Source: You et al. 2021, https://arxiv.org/abs/2102.11005, algorithm 1.
    """
    columns = (
        [targets.astype(float)] if outputs == 1 else [(targets == index).astype(float) for index in range(outputs)]
    )
    left, singular, _ = np.linalg.svd(activations, full_matrices=False)
    values = [_evidence(column, left, singular**2, activations.shape[1]) for column in columns]
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else None


def _evidence(target: np.ndarray, left: np.ndarray, squares: np.ndarray, width: int) -> float:
    """Return the largest log evidence a photo for one column of targets.

    Args:
        target: (N,).
        left: Left singular vectors of the activations, (N, R).
        squares: Squared singular values, (R,).
        width: D.
    """
    count = len(target)
    projected = (left.T @ target) ** 2
    outside = max(float((target**2).sum() - projected.sum()), 0.0)  # what no head can reach
    alpha = beta = 1.0
    for _ in range(MAX_LOGME_STEPS):
        ratio = alpha / beta
        gamma = float((squares / (squares + ratio)).sum())
        norm = float((squares * projected / (squares + ratio) ** 2).sum())
        residual = float((projected * (ratio / (squares + ratio)) ** 2).sum()) + outside
        alpha, beta = gamma / (norm + 1e-5), (count - gamma) / (residual + 1e-5)
        if abs(alpha / beta - ratio) <= LOGME_TOLERANCE * ratio:
            break
    ratio = alpha / beta
    norm = float((squares * projected / (squares + ratio) ** 2).sum())
    residual = float((projected * (ratio / (squares + ratio)) ** 2).sum()) + outside
    determinant = float(np.log(alpha + beta * squares).sum()) + (width - len(squares)) * math.log(alpha)
    evidence = width * math.log(alpha) + count * math.log(beta) - determinant - count * math.log(2 * math.pi)
    return 0.5 * (evidence - beta * residual - alpha * norm) / count

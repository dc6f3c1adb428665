"""How well a linear head tells the classes from the activations at one depth, on photos that it has not learned from."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_FOLDS = 5
MIN_EIGENVALUE = 1e-10  # relative; directions below it carry nothing but rounding
MAX_LOGME_STEPS = 100
LOGME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Probe:
    """A cross-validated linear probe.

    Attributes:
        score: Share of the photos that are right, or R² of numbers, on photos left out.
        error: Standard error of the score.
        chance: The score of a guess that has not seen the photo.
        logme: LogME of the same activations; None where it is not defined.
        hits: For each scored photo, whether it is right; for numbers, its squared error. (P,)
        folds: Number of folds.
        width: Number D of activations.
    """

    score: float
    error: float
    chance: float
    logme: float | None
    hits: np.ndarray
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
    predicted = out_of_fold(activations, targets, outputs, folds, seed)  # (N, K) or (N,)
    expected = targets.numpy()
    measure = logme(activations.double().numpy(), expected, outputs)
    width = activations.shape[1]
    if targets.is_floating_point():
        squares = (predicted - expected) ** 2
        spread = float(((expected - expected.mean()) ** 2).mean()) or 1.0
        score, error = 1 - float(squares.mean()) / spread, float(squares.std()) / spread / math.sqrt(len(squares))
        return Probe(score, error, 0.0, measure, squares / spread, folds, width)
    counts = np.bincount(expected, minlength=outputs)
    is_scored = counts[expected] >= 2
    hits = (predicted.argmax(1) == expected)[is_scored].astype(float)
    score = float(hits.mean())
    # Agresti and Coull: the plain formula gives zero where all or none are right.
    count, share = len(hits) + 4, (hits.sum() + 2) / (len(hits) + 4)
    return Probe(
        score, math.sqrt(share * (1 - share) / count), counts.max() / len(expected), measure, hits, folds, width
    )


def out_of_fold(activations: torch.Tensor, targets: torch.Tensor, outputs: int, folds: int, seed: int) -> np.ndarray:
    """Return what heads predict for photos that they have not learned from: (N, K) scores, or (N,) numbers."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    inputs, expected = activations.float().numpy(), targets.numpy()
    head: Any
    if targets.is_floating_point():
        splits = _splits(np.zeros(len(inputs), dtype=int), folds, seed)
        head = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15)))
    else:
        # Photos of a class with one photo join a class of their own here: they take part in learning alone.
        counts = np.bincount(expected, minlength=outputs)
        strata = np.where(counts[expected] >= folds, expected, outputs)
        splits = _splits(strata, folds, seed)
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
    predicted = np.full((len(inputs), outputs), -np.inf) if not targets.is_floating_point() else np.zeros(len(inputs))
    for learned, left_out in splits:
        head.fit(inputs[learned], expected[learned])
        if targets.is_floating_point():
            predicted[left_out] = head.predict(inputs[left_out])
        else:
            predicted[np.ix_(left_out, head.classes_)] = head.predict_log_proba(inputs[left_out])
    return predicted


def _splits(labels: np.ndarray, folds: int, seed: int) -> Any:
    """Yield (learned, left out) indices of folds that are even within each class, and of even sizes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[labels[order].argsort(kind="stable")]
    number = np.empty(len(labels), dtype=int)
    number[by_class] = np.arange(len(labels)) % folds
    for fold in range(folds):
        yield np.flatnonzero(number != fold), np.flatnonzero(number == fold)


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

"""A linear head that is solved, not trained: the best of a few ways by cross-validation, with calibrated scores.

Softmax regression on features as they are is what the others are measured against, alone or averaged with the means of
the classes, whichever has the lower loss on photos left out. Standardized features, the means alone and ridge
regression are taken if they are better by more than one standard error: on few photos, the best of many is often luck.
The scores are scaled at last by a factor that is fitted on the same photos, so that its probabilities are calibrated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from regraft.training.heads.calibration import fit_factor
from regraft.training.heads.class_means import ClassMeans
from regraft.training.heads.components import Components
from regraft.training.heads.folds import Folds, shares
from regraft.training.heads.ridge import Ridge
from regraft.training.heads.ridge import is_solvable as is_ridge_solvable
from regraft.training.heads.softmax_regression import SoftmaxRegression, scores_of

PENALTIES = tuple(10 ** (0.5 - power / 2) for power in range(9))  # from 3 to 3e-4, times half the sum of squares
DEFAULT_PENALTY = 0.1  # where no photo can be left out
MIN_FALL = 1e-3  # of the loss from one penalty to the next, as a share, for which a weaker one is tried
SHRINKAGES, MIDDLE = (0.1, 0.3, 0.6, 0.9, 1.0), 2
MAX_SMALL = 100  # photos up to which standardized features are tried too: on more, they were hardly ever better
TOLERANCE, FOLD_TOLERANCE = 1e-4, 3e-2  # see `SoftmaxRegression.solve`; fold heads are only compared
MAX_NUMBERS = 500_000_000  # features, scores, and parameters of the heads of all folds with their history
HISTORY_COPIES = 20
MAX_WIDTH = 4_096  # of the covariances of `ClassMeans`

Parts = tuple[torch.Tensor, torch.Tensor]  # weight (K, D) and bias (K,)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to solve a head.

    Attributes:
        name: What it is.
        scores: Scores (N, K) of each row by a head that has not learned from it, calibrated.
        losses: Cross-entropy of each of these rows.
        solve: Returns the head of all rows, calibrated.
        factor: That on the scores, for which they are.
    """

    name: str
    scores: torch.Tensor
    losses: torch.Tensor
    solve: Callable[[], Parts]
    factor: float


@dataclass(frozen=True, eq=False)
class SolvedHead:
    """A solved head.

    Attributes:
        weight: (K, D).
        bias: (K,).
        way: How it was solved.
        loss: Mean loss on the training photos, without a penalty.
        out_of_fold: Log-probabilities (P, K) of each photo in its first view by a head that has not learned from it;
            equal ones for the only photo of a class. For regression, predictions (P, 1).
        fold_losses: Mean loss on photos left out by each way that was tried, the one that was taken first.
        factor: On its scores, which calibrates them and is in the weights already; None if it was not fitted.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    way: str
    loss: float
    out_of_fold: torch.Tensor
    fold_losses: dict[str, float]
    factor: float | None = None

    def __str__(self) -> str:
        if not self.fold_losses:
            return f"{self.way}; no class has a second photo that could be left out to compare"
        tried = ", ".join(f"{name} {loss:.3f}" for name, loss in self.fold_losses.items())
        return f"{self.way} (loss on photos not learned from: {tried})"


def is_solvable(photos: int, width: int, outputs: int, *, views: int = 1) -> bool:
    """Return whether `solve_head` is affordable for a number of photos, features D, outputs K and views V."""
    numbers = photos * views * (width + 6 * outputs) + 6 * (width + 1) * outputs * HISTORY_COPIES
    return numbers <= MAX_NUMBERS and photos >= 2


def solve_head(
    features: torch.Tensor,
    targets: torch.Tensor,
    outputs: int,
    *,
    views: int = 1,
    smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
    seed: int = 0,
) -> SolvedHead | None:
    """Solve for the weight (K, D) and bias (K,) of a linear layer, on the device of the features, in float32.

    Args:
        features: (N, D).
        targets: (N,) of int64 classes below K, or of floats if K is 1.
        outputs: K.
        views: Number V of consecutive rows that show the same photo, which stay in one fold.
        smoothing: Share of each target that is spread over all classes.
        class_weights: Weight of each class in the loss, (K,).
        seed: Random seed of the folds.

    Returns:
        The head; None where a feature is not finite.
    """
    features = features.float()
    if not bool(features.isfinite().all()):
        return None
    folds = Folds.of(targets, views=views, seed=seed)
    if targets.is_floating_point():
        return _solve_regression(features, targets, views)
    weights = torch.ones(len(targets), device=features.device)
    if class_weights is not None:
        weights = class_weights.to(weights)[targets]
    problem = _Problem(features, targets, outputs, views, smoothing, weights, folds)
    if folds.count < 2 or outputs < 2:
        return problem.without_folds()
    candidates = problem.candidates()
    best = problem.best_of(candidates)
    return problem.head(best, candidates)


class _Problem:
    """The features of a head, in both scalings, and what is to be given for them."""

    def __init__(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        outputs: int,
        views: int,
        smoothing: float,
        weights: torch.Tensor,
        folds: Folds,
    ) -> None:
        self._features, self._targets, self._outputs, self._views = features, targets, outputs, views
        self._weights, self._folds = weights, folds
        self._expected = F.one_hot(targets, outputs).float() * (1 - smoothing) + smoothing / outputs
        self._plain = Components.of(features, is_standardized=False)
        self._everything = shares(weights[None])
        self._counted = weights * (folds.numbers >= 0)

    def candidates(self) -> list[Candidate]:
        """Return the ways to solve the head, of which the first two need not win by more than an error."""
        photos = len(self._targets) // self._views
        plain = self._by_regression(self._plain, "softmax regression")
        if self._features.shape[1] > MAX_WIDTH:
            return [plain]
        means = self._by_means()
        averaged = self._calibrated(
            "softmax regression averaged with class means",
            (plain.scores + means.scores) / 2,
            lambda: _mean_of(plain.solve(), means.solve()),
        )
        ways = [plain, averaged, means]
        if photos > MAX_SMALL:
            return ways
        standardized = Components.of(self._features, is_standardized=True)
        ways.append(self._by_regression(standardized, "softmax regression on standardized features"))
        if is_ridge_solvable(photos, self._features.shape[1], self._outputs, views=self._views):
            ways.append(self._by_ridge(standardized))
        return ways

    def best_of(self, candidates: list[Candidate]) -> Candidate:
        """Return the best of the first two, or one that is better by more than one standard error."""
        best = min(candidates[:2], key=self._mean)
        for other in sorted(candidates, key=self._mean):
            gains = self._by_photo(best.losses - other.losses)
            if float(gains.mean()) > float(gains.std()) / math.sqrt(len(gains)):
                return other
        return best

    def head(self, best: Candidate, candidates: list[Candidate]) -> SolvedHead:
        """Return the head of a way."""
        weight, bias = best.solve()
        order = sorted(candidates, key=lambda candidate: (candidate is not best, self._mean(candidate)))
        losses = {candidate.name: self._mean(candidate) for candidate in order}
        return replace(self._head(best.name, weight, bias, best.scores, losses), factor=best.factor)

    def without_folds(self) -> SolvedHead:
        """Return the head where no photo can be left out: softmax regression with a penalty that was not chosen."""
        regression = SoftmaxRegression(self._plain, self._expected)
        heads = regression.solve(regression.zeros(1), self._everything, DEFAULT_PENALTY, tolerance=TOLERANCE)
        weights, biases = regression.parts(heads, DEFAULT_PENALTY)
        scores = torch.zeros_like(self._expected)
        name = f"softmax regression, penalty {DEFAULT_PENALTY:.2g}"
        return self._head(name, *self._plain.to_features(weights[0], biases[0]), scores, {})

    def _head(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor, scores: torch.Tensor, losses: dict[str, float]
    ) -> SolvedHead:
        logs = (self._features @ weight.T + bias).log_softmax(1)
        loss = float((self._everything[0] * -(logs * self._expected).sum(1)).sum())
        return SolvedHead(weight, bias, name, loss, scores[:: self._views].log_softmax(1), losses)

    def _by_regression(self, components: Components, name: str) -> Candidate:
        """Return softmax regression with the penalty of the lowest loss, from strong ones to weaker ones."""
        regression, learned = SoftmaxRegression(components, self._expected), self._folds.learned(self._weights)
        heads, previous = regression.zeros(self._folds.count), None
        tried: list[tuple[float, Candidate]] = []
        for penalty in PENALTIES:
            heads = regression.solve(heads, learned, penalty, tolerance=FOLD_TOLERANCE, previous=previous)
            previous, start = penalty, heads.mean(0, keepdim=True)

            def solve(penalty: float = penalty, start: torch.Tensor = start) -> Parts:
                solution = regression.solve(start, self._everything, penalty, tolerance=TOLERANCE, previous=penalty)
                weights, biases = regression.parts(solution, penalty)
                return components.to_features(weights[0], biases[0])

            scores = self._folds.own(regression.scores(heads, penalty))
            candidate = self._calibrated(f"{name}, penalty {penalty:.2g}", scores, solve)
            tried.append((self._mean(candidate), candidate))
            if len(tried) > 1 and tried[-1][0] > (1 - MIN_FALL) * tried[-2][0]:
                break
        return min(tried, key=lambda pair: pair[0])[1]

    def _by_means(self) -> Candidate:
        """Return class means with the shrinkage of the lowest loss, which falls and then rises along `SHRINKAGES`."""
        means = ClassMeans(self._plain, self._targets, self._outputs, self._folds, self._weights)
        tried = {place: self._of_means(means, SHRINKAGES[place]) for place in (MIDDLE, MIDDLE + 1)}
        losses = {place: self._mean(candidate) for place, candidate in tried.items()}
        step = 1 if losses[MIDDLE + 1] < losses[MIDDLE] else -1
        place = MIDDLE + 2 if step == 1 else MIDDLE - 1
        while 0 <= place < len(SHRINKAGES):
            tried[place] = self._of_means(means, SHRINKAGES[place])
            losses[place] = self._mean(tried[place])
            if losses[place] > losses[place - step]:
                break
            place += step
        return tried[min(losses, key=lambda place: losses[place])]

    def _of_means(self, means: ClassMeans, shrinkage: float) -> Candidate:
        scores = scores_of(self._plain.rows, *means.solve(shrinkage, slice(None, -1)))

        def solve() -> Parts:
            weights, biases = means.solve(shrinkage, slice(-1, None))
            return self._plain.to_features(weights[0], biases[0])

        return self._calibrated(f"class means, shrinkage {shrinkage:.1f}", self._folds.own(scores), solve)

    def _by_ridge(self, components: Components) -> Candidate:
        solution = Ridge(components, self._targets, self._outputs, views=self._views)
        return self._calibrated("ridge regression", solution.left_out.float(), lambda: solution.parts())

    def _calibrated(self, name: str, scores: torch.Tensor, solve: Callable[[], Parts]) -> Candidate:
        photos = int((self._counted[:: self._views] > 0).sum())
        factor = fit_factor(scores, self._targets, self._counted, photos)
        losses = F.cross_entropy(factor * scores, self._targets, reduction="none")

        def solve_scaled() -> Parts:
            weight, bias = solve()
            return factor * weight, factor * bias

        return Candidate(name, factor * scores, losses, solve_scaled, factor)

    def _mean(self, candidate: Candidate) -> float:
        return float(self._by_photo(candidate.losses).mean())

    def _by_photo(self, values: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean over the views of each photo that is left out once."""
        weights = self._counted / self._counted.sum() * (self._counted > 0).sum()
        return (values * weights).view(-1, self._views).mean(1)[self._counted[:: self._views] > 0]


def _solve_regression(features: torch.Tensor, targets: torch.Tensor, views: int) -> SolvedHead:
    """Return ridge regression, with the penalty of the lowest squared error on photos left out."""
    components = Components.of(features, is_standardized=True)
    solution = Ridge(components, targets, 1, views=views)
    weight, bias = solution.parts()
    loss = float(F.mse_loss((features @ weight.T + bias)[:, 0], targets.float()))
    left_out = solution.left_out.float()
    error = float(F.mse_loss(left_out[:, 0], targets.float()))
    return SolvedHead(weight, bias, "ridge regression", loss, left_out[::views], {"ridge regression": error})


def _mean_of(first: Parts, second: Parts) -> Parts:
    return (first[0] + second[0]) / 2, (first[1] + second[1]) / 2

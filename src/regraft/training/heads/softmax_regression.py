"""A linear head at its optimum: softmax regression with an L2 penalty, solved rather than trained.

The penalty is chosen by cross-validation: the head is solved for each fold, from the strongest penalty to weaker ones,
each beginning where the last one ended, until the loss on the photos left out rises. All folds are solved together, so
that on a GPU the work is a few large products instead of thousands of small steps.

Source: L-BFGS, Nocedal and Wright, Numerical Optimization, 2006, section 7.2; with a backtracking line search, section
3.1.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regraft.training.features.batches import FeatureBatches
from regraft.training.heads.ridge import linear_head
from regraft.training.losses import Loss

FOLDS = 5
PENALTIES = tuple(10 ** (-power / 2) for power in range(9))  # from 1 to 1e-4, times half the sum of squares
MAX_RISES = 2  # penalties in a row whose loss is higher than the lowest, after which no weaker one is tried
MAX_NUMBERS = 500_000_000  # features, and parameters of the heads of all folds with their history
MIN_PHOTOS = 2 * FOLDS
TOLERANCE = 1e-4  # of the gradient's norm at zero
MAX_ITERATIONS = 200
HISTORY = 10
SUFFICIENT = 1e-4  # share of the decrease that the gradient predicts
MAX_HALVINGS = 20
MIN_SPREAD = 1e-9


@dataclass(frozen=True)
class SolvedHead:
    """A solved head.

    Attributes:
        weight: (K, D).
        bias: (K,).
        penalty: The chosen penalty.
        loss: Mean loss on the training photos, without the penalty.
        fold_losses: Mean loss on the photos left out, for each penalty that was tried.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float
    loss: float
    fold_losses: tuple[float, ...]

    def weights(self, live: nn.Module) -> dict[str, torch.Tensor]:
        """Return the parameters of the head's layer by their names in `live`."""
        ((path, layer),) = _trainable_layers(live)
        dtype = layer.weight.dtype
        return {f"{path}.weight".lstrip("."): self.weight.to(dtype), f"{path}.bias".lstrip("."): self.bias.to(dtype)}

    def __str__(self) -> str:
        tried = ", ".join(
            f"{penalty:.2g}: {loss:.3f}" for penalty, loss in zip(PENALTIES, self.fold_losses, strict=False)
        )
        return (
            f"softmax regression with penalty {self.penalty:.2g} (loss on photos not learned from, by penalty: {tried})"
        )


def is_solvable(photos: int, width: int, outputs: int, *, views: int = 1) -> bool:
    """Return whether `solve_head` is affordable for a number of photos, features D, outputs K and views V."""
    numbers = photos * views * (width + FOLDS * outputs) + FOLDS * (width + 1) * outputs * 2 * HISTORY
    return numbers <= MAX_NUMBERS and photos >= MIN_PHOTOS


def solve_head(
    features: torch.Tensor,
    targets: torch.Tensor,
    outputs: int,
    *,
    views: int = 1,
    smoothing: float = 0.0,
    seed: int = 0,
) -> SolvedHead | None:
    """Solve for the weight (K, D) and bias (K,) of a linear layer, on the device of the features, in float32.

    Features are standardized for this; the weights of the result take them as they are.

    Args:
        features: (N, D).
        targets: (N,) of int64 classes below K.
        outputs: K.
        views: Number V of consecutive rows that show the same photo, which stay in one fold.
        smoothing: Share of each target that is spread over all classes.
        seed: Random seed of the folds.

    Returns:
        The head; None where a feature is not finite.
    """
    inputs = features.float()
    if not bool(inputs.isfinite().all()):
        return None
    mean, std = inputs.mean(0), inputs.std(0)
    std = std.where(std > MIN_SPREAD * std.max(), 1.0)  # constant features are not scaled
    inputs = (inputs - mean) / std
    expected = F.one_hot(targets, outputs).float() * (1 - smoothing) + smoothing / outputs
    problem = _Problem(inputs, expected)
    folds = _folds(targets[::views], seed).repeat_interleave(views).to(inputs.device)  # (N,)
    is_left_out = folds[None] == torch.arange(FOLDS, device=inputs.device)[:, None]  # (F, N)
    learned, left_out = (_shares(rows) for rows in (~is_left_out, is_left_out))
    heads = inputs.new_zeros(FOLDS, (inputs.shape[1] + 1) * outputs)
    losses: list[float] = []
    for penalty in PENALTIES:
        heads = problem.solve(heads, learned, penalty)
        losses.append(float(problem.losses(heads, left_out).mean()))
        if len(losses) - 1 - losses.index(min(losses)) >= MAX_RISES:
            break
    penalty = PENALTIES[losses.index(min(losses))]
    everything = _shares(torch.ones_like(folds)[None])
    solution = problem.solve(heads.mean(0, keepdim=True), everything, penalty)
    loss = float(problem.losses(solution, everything))
    weight, bias = problem.parts(solution)
    weight = weight[0].T / std
    return SolvedHead(weight, bias[0] - weight @ mean, penalty, loss, tuple(losses))


def solving_obstacle(live: nn.Module, batches: Any, criterion: Loss) -> str | None:
    """Return why `solve` cannot give the head of a network, as text; None if it can be tried."""
    if not isinstance(batches, FeatureBatches):
        return "nothing is computed once"
    if not isinstance(criterion, nn.CrossEntropyLoss) or criterion.weight is not None or criterion.reduction != "mean":
        return "the loss is another one than the cross-entropy"
    rows = torch.arange(min(2, len(batches.dataset)))
    features, _ = batches.pick(rows, torch.zeros_like(rows))
    head = linear_head(live, features)
    if head is None:
        return "what is trained is not one linear layer with a bias"
    width, outputs, views = head[1].in_features, head[1].out_features, batches.features.views
    if not is_solvable(len(batches.dataset), width, outputs, views=views):
        return (
            f"{len(batches.dataset)} photos × {views} with {width} features and {outputs} outputs are too many or too "
            "few for it"
        )
    return None


def solve(live: nn.Module, batches: FeatureBatches, *, smoothing: float, seed: int) -> SolvedHead | None:
    """Return the head of a network by `solve_head`, from all photos in all of their views."""
    views, count = batches.features.views, len(batches.dataset)
    draws = torch.arange(views).repeat(count)
    (features,), targets = batches.pick(torch.arange(count).repeat_interleave(views), draws)
    ((_, layer),) = _trainable_layers(live)
    return solve_head(features, targets, layer.weight.shape[0], views=views, smoothing=smoothing, seed=seed)


def _trainable_layers(live: nn.Module) -> list[tuple[str, Any]]:
    return [
        (path, layer)
        for path, layer in live.named_modules()
        if any(parameter.requires_grad for parameter in layer.parameters(False))
    ]


def _folds(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the number of the fold of each photo, (P,): random, and even within each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels.cpu()[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[by_class] = torch.arange(len(labels)) % FOLDS
    return folds


def _shares(rows: torch.Tensor) -> torch.Tensor:
    """Return the share of each row in the mean over some rows, for each of B choices of them, (B, N)."""
    return rows.float() / rows.sum(1, keepdim=True).clamp(min=1)


class _Problem:
    """Softmax regressions on the same rows, of which each counts some; heads are (B, (D + 1) * K)."""

    def __init__(self, inputs: torch.Tensor, expected: torch.Tensor) -> None:
        self._inputs, self._expected = inputs, expected
        self._width, self._outputs = inputs.shape[1], expected.shape[1]

    def parts(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights (B, D, K) and biases (B, K)."""
        numbers = heads.view(len(heads), self._width + 1, self._outputs)
        return numbers[:, :-1], numbers[:, -1]

    def losses(self, heads: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the mean losses over rows with shares (B, N), without penalty, (B,)."""
        return -(self._scores(heads).log_softmax(-1) * self._expected[:, None]).sum(-1).T.mul(shares).sum(1)

    def value(self, heads: torch.Tensor, shares: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the penalized losses (B,) and their gradients, (B, (D + 1) * K)."""
        weights, _ = self.parts(heads)
        logs = self._scores(heads).log_softmax(-1)  # (N, B, K)
        losses = -(logs * self._expected[:, None]).sum(-1).T.mul(shares).sum(1)
        residuals = (logs.exp() - self._expected[:, None]) * shares.T[..., None]
        of_weights = torch.einsum("nd,nbk->bdk", self._inputs, residuals) + penalty * weights
        gradients = torch.cat([of_weights, residuals.sum(0)[:, None]], 1).flatten(1)
        return losses + penalty / 2 * weights.square().sum((1, 2)), gradients

    def solve(self, heads: torch.Tensor, shares: torch.Tensor, penalty: float) -> torch.Tensor:
        """Return the heads of least penalized loss, from others; all at once, each with its own steps."""
        at_zero = self.value(torch.zeros_like(heads), shares, penalty)[1].norm(dim=1)
        values, gradients = self.value(heads, shares, penalty)
        history: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=HISTORY)
        for _ in range(MAX_ITERATIONS):
            if bool((gradients.norm(dim=1) <= TOLERANCE * at_zero).all()):
                break
            direction = _direction(gradients, history)
            steps = torch.ones_like(values) if history else 1 / gradients.norm(dim=1).clamp(min=1e-12)
            moved, new_values, new_gradients = self._moved(
                heads, values, gradients, direction * steps[:, None], shares, penalty
            )
            if torch.equal(moved, heads):  # as low as rounding allows
                break
            change, bend = moved - heads, new_gradients - gradients
            curvature = (change * bend).sum(1)
            history.append((change, bend, torch.where(curvature > 1e-12, 1 / curvature, 0.0)))
            heads, values, gradients = moved, new_values, new_gradients
        return heads

    def _moved(
        self,
        heads: torch.Tensor,
        values: torch.Tensor,
        gradients: torch.Tensor,
        steps: torch.Tensor,
        shares: torch.Tensor,
        penalty: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return heads, values and gradients after steps that are halved until they lower the loss, or left out."""
        slopes, sizes = (steps * gradients).sum(1), torch.ones_like(values)
        for halvings in range(MAX_HALVINGS + 1):
            sizes = sizes if halvings < MAX_HALVINGS else torch.where(sizes * 2**halvings > 1, sizes, 0.0)
            moved = heads + sizes[:, None] * steps
            new_values, new_gradients = self.value(moved, shares, penalty)
            is_lower = new_values <= values + SUFFICIENT * sizes * slopes
            if bool(is_lower.all()):
                return moved, new_values, new_gradients
            sizes = torch.where(is_lower, sizes, sizes / 2)
        return heads, values, gradients

    def _scores(self, heads: torch.Tensor) -> torch.Tensor:
        weights, biases = self.parts(heads)
        return torch.einsum("nd,bdk->nbk", self._inputs, weights) + biases


def _direction(
    gradients: torch.Tensor, history: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Return the direction of each step: the two-loop recursion, for all problems at once."""
    direction, factors = -gradients, []
    for change, bend, inverse in reversed(history):
        factor = inverse * (change * direction).sum(1)
        direction = direction - factor[:, None] * bend
        factors.append(factor)
    if history:
        change, bend, inverse = history[-1]
        scale = (change * bend).sum(1) / bend.square().sum(1).clamp(min=1e-30)
        direction = direction * torch.where(inverse > 0, scale, 1.0)[:, None]
    for (change, bend, inverse), factor in zip(history, reversed(factors), strict=True):
        direction = direction + change * (factor - inverse * (bend * direction).sum(1))[:, None]
    return direction

"""Softmax regression with an L2 penalty, at its optimum, for several choices of rows at once.

The coordinates are principal components (`Components`), each scaled by the curvature that it has at the start. The
problem is nearly round then, and takes a few steps of L-BFGS instead of dozens.

Source: L-BFGS, Nocedal and Wright, Numerical Optimization, 2006, section 7.2; with a backtracking line search, section
3.1.
"""

from collections import deque

import torch

from regraft.training.heads.components import Components

MAX_ITERATIONS = 200
HISTORY = 10
SUFFICIENT = 1e-4  # share of the decrease that the gradient predicts
MAX_HALVINGS = 20


class SoftmaxRegression:
    """Softmax regressions on the same rows, of which each counts some; heads are (B, (R + 1) * K), scaled.

    Args:
        components: The rows (N, R).
        expected: Target probabilities (N, K).
    """

    def __init__(self, components: Components, expected: torch.Tensor) -> None:
        self._rows, self._variances, self._expected = components.rows, components.variances, expected
        self._outputs = expected.shape[1]
        self._curvature = (1 - 1 / max(self._outputs, 2)) / max(self._outputs, 2)  # of a score at equal probabilities

    def zeros(self, count: int) -> torch.Tensor:
        """Return heads of zeros, (B, (R + 1) * K)."""
        return self._rows.new_zeros(count, (self._rows.shape[1] + 1) * self._outputs)

    def parts(self, heads: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights (B, R, K) and biases (B, K) of heads that were solved with a penalty."""
        numbers = heads.view(len(heads), -1, self._outputs) * self._scales(penalty)
        return numbers[:, :-1], numbers[:, -1]

    def scores(self, heads: torch.Tensor, penalty: float) -> torch.Tensor:
        """Return the scores of all rows by all heads, (N, B, K)."""
        return scores_of(self._rows, *self.parts(heads, penalty))

    def solve(
        self,
        heads: torch.Tensor,
        shares: torch.Tensor,
        penalty: float,
        *,
        tolerance: float,
        previous: float | None = None,
    ) -> torch.Tensor:
        """Return the heads of least loss with a penalty, all at once, each with its own steps.

        Args:
            heads: Where they begin.
            shares: Share of each row in the loss of each head, (B, N).
            penalty: Times half the sum of squares of the weights; biases are free.
            tolerance: Norm of the gradient at the end, as a share of that at zero.
            previous: Penalty that `heads` were solved with; None for zeros.
        """
        heads = heads if previous is None else self._rescaled(heads, previous, penalty)
        at_zero = self._value(torch.zeros_like(heads), shares, penalty)[1].norm(dim=1)
        values, gradients = self._value(heads, shares, penalty)
        history: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=HISTORY)
        for _ in range(MAX_ITERATIONS):
            if bool((gradients.norm(dim=1) <= tolerance * at_zero).all()):
                break
            moved, new_values, new_gradients = self._moved(
                heads, values, gradients, _direction(gradients, history), shares, penalty
            )
            if torch.equal(moved, heads):  # as low as rounding allows
                break
            change, bend = moved - heads, new_gradients - gradients
            curvature = (change * bend).sum(1)
            history.append((change, bend, torch.where(curvature > 1e-12, 1 / curvature, 0.0)))
            heads, values, gradients = moved, new_values, new_gradients
        return heads

    def _scales(self, penalty: float) -> torch.Tensor:
        scales = (self._curvature * self._variances + penalty).rsqrt()
        return torch.cat([scales, scales.new_full((1,), self._curvature**-0.5)])[:, None]

    def _rescaled(self, heads: torch.Tensor, previous: float, penalty: float) -> torch.Tensor:
        factors = self._scales(previous) / self._scales(penalty)
        return (heads.view(len(heads), -1, self._outputs) * factors).flatten(1)

    def _value(self, heads: torch.Tensor, shares: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the penalized losses (B,) and their gradients, (B, (R + 1) * K)."""
        weights, biases = self.parts(heads, penalty)
        logs = scores_of(self._rows, weights, biases).log_softmax(-1)  # (N, B, K)
        losses = -(logs * self._expected[:, None]).sum(-1).T.mul(shares).sum(1)
        residuals = (logs.exp() - self._expected[:, None]) * shares.T[..., None]
        products = self._rows.T @ residuals.flatten(1)  # (R, B * K)
        of_weights = products.view(-1, len(heads), self._outputs).transpose(0, 1) + penalty * weights
        gradients = torch.cat([of_weights, residuals.sum(0)[:, None]], 1) * self._scales(penalty)
        return losses + penalty / 2 * weights.square().sum((1, 2)), gradients.flatten(1)

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
            new_values, new_gradients = self._value(moved, shares, penalty)
            is_lower = new_values <= values + SUFFICIENT * sizes * slopes
            if bool(is_lower.all()):
                return moved, new_values, new_gradients
            sizes = torch.where(is_lower, sizes, sizes / 2)
        return heads, values, gradients


def scores_of(rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Return the scores of rows (N, R) by B heads, (N, B, K), as one product."""
    flat = weights.transpose(0, 1).flatten(1)
    return (rows @ flat).view(len(rows), *biases.shape) + biases


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

"""A linear head in closed form: ridge regression on standardized features.

The penalty, and for classes a factor on the scores, are chosen by leave-one-out cross-validation: each photo is left
out with all of its views. This needs no further solution of the whole problem.

Source: Hoerl and Kennard 1970, https://doi.org/10.1080/00401706.1970.10488634; leaving one out: Allen 1974,
https://doi.org/10.1080/00401706.1974.10489157.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regraft.anatomy.modes import evaluation_mode
from regraft.training.heads.components import MAX_DIRECTIONS, Components

MAX_NUMBERS = 20_000_000  # entries of each matrix in float64: features, targets, leverages among views
PENALTIES = torch.logspace(-3, 3, 13, dtype=torch.float64)  # times the mean variance of the directions
SCALES = torch.logspace(0, 2, 21, dtype=torch.float64)


def linear_head(live: nn.Module, features: tuple[torch.Tensor, ...]) -> tuple[str, nn.Linear] | None:
    """Return path and layer if the live part is a single linear layer; None if it is more.

    Args:
        live: The part of a network that takes the features.
        features: A few rows of its inputs.
    """
    layers = trainable_layers(live)
    if len(layers) != 1 or len(features) != 1 or features[0].ndim != 2:
        return None
    ((path, layer),) = layers
    if type(layer) is not nn.Linear or layer.bias is None:
        return None
    if layer.in_features != features[0].shape[1] or layer.weight.dtype != features[0].dtype:
        return None
    with evaluation_mode(live), torch.no_grad():
        output = live(*features)
        is_all = isinstance(output, torch.Tensor) and torch.equal(output, layer(features[0]))
    return (path, layer) if is_all else None


def trainable_layers(live: nn.Module) -> list[tuple[str, Any]]:
    """Return path and layer of all that hold trainable parameters themselves."""
    return [
        (path, layer)
        for path, layer in live.named_modules()
        if any(parameter.requires_grad for parameter in layer.parameters(False))
    ]


class Ridge:
    """Ridge regression, computed in float64, with the penalty of the least squared error on photos left out.

    Args:
        components: Standardized features (N, D) with a rotation.
        targets: (N,) of int64 classes below K, or of floats if K is 1.
        outputs: K.
        views: Number V of consecutive rows that show the same photo.

    Attributes:
        left_out: Predictions (N, K) for each photo by the solution without it.
    """

    def __init__(self, components: Components, targets: torch.Tensor, outputs: int, *, views: int) -> None:
        rows, is_number = components.rows.double(), targets.is_floating_point()
        expected = targets.double()[:, None] if is_number else F.one_hot(targets, outputs).double()
        count, squares = len(rows), rows.square().sum(0)  # (R,)
        target_mean = expected.mean(0)
        left = rows / squares.sqrt().clamp(min=1e-30)
        projected = left.T @ (expected - target_mean)  # (R, K)
        by_photo = left.unflatten(0, (-1, views))
        identity = torch.eye(views, dtype=left.dtype, device=left.device)
        best: tuple[float, torch.Tensor] | None = None
        for penalty in PENALTIES.to(rows.device) * max(components.mean_square, 1e-30):
            shrunk = squares / (squares + penalty)
            fitted = left @ (shrunk[:, None] * projected)
            leverage = (by_photo * shrunk) @ by_photo.mT + 1 / count  # (P, V, V): leverages among the views of a photo
            residuals = (expected - target_mean - fitted).unflatten(0, (-1, views))
            errors = torch.linalg.solve((1 + 1e-9) * identity - leverage, residuals).flatten(0, 1)  # leave-one-out
            error = float(errors.square().mean())
            if best is None or error < best[0]:
                best = error, expected - errors
                weight = (squares.sqrt() / (squares + penalty))[:, None] * projected  # (R, K)
                self._solution = weight.to(components.rows), target_mean.to(components.rows)
        assert best is not None
        self._components, self.left_out = components, best[1]

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight (K, D) and bias (K,) for the features as they are."""
        return self._components.to_features(*self._solution)


def is_solvable(photos: int, width: int, outputs: int, *, views: int = 1) -> bool:
    """Return whether `ridge` is affordable for a number of photos, features D, outputs K and views V."""
    count = photos * views
    is_small = count * max(width, outputs, views) <= MAX_NUMBERS and min(count, width) <= MAX_DIRECTIONS
    return is_small and photos >= 2


def ridge(
    features: torch.Tensor, targets: torch.Tensor, outputs: int, *, views: int = 1
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Solve for the weight (K, D) and bias (K,) of a linear layer, in float64 for features of any dtype.

    Args:
        features: (N, D).
        targets: (N,) of int64 classes below K, or of floats if K is 1.
        outputs: K.
        views: Number V of consecutive rows that show the same photo.

    Returns:
        Weight and bias; None if the problem is too large (see `is_solvable`), or if a feature is not finite.
    """
    count, width = features.shape
    if not is_solvable(count // views, width, outputs, views=views) or not bool(features.isfinite().all()):
        return None
    solution = Ridge(Components.of(features.double(), is_standardized=True), targets, outputs, views=views)
    scale = 1.0
    if not targets.is_floating_point():
        scale = min(SCALES.tolist(), key=lambda factor: float(F.cross_entropy(factor * solution.left_out, targets)))
    weight, bias = solution.parts()
    return weight * scale, bias * scale

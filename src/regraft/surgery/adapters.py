"""Adapters between two parts of a stitched network whose shapes differ, made of layers of torch.nn only."""

import math

import torch
from torch import nn

from regraft.anatomy.inputs import Shape
from regraft.errors import EditError


def adapter_for(given: Shape, wanted: Shape, *, is_fitted: bool = False) -> nn.Sequential:
    """Build an adapter between two shapes, batch included: maps (N, C, H, W), tokens (N, T, D) or vectors (N, D).

    Maps are resampled (average pooling down, bilinear up), then changed in width by a 1×1 convolution with batch norm;
    tokens and vectors in width by a linear layer. A map becomes tokens row by row, and tokens a map where they fill one
    of the other side's proportions or a square, a class token in front left out. Weights keep the variance of what goes
    through (Glorot).

    Args:
        given: Shape of the input.
        wanted: Shape of the output.
        is_fitted: Whether the adapter will be fitted, and needs a layer with weights even where the widths agree.

    Raises:
        EditError: No usual conversion leads from one shape to the other.

    >>> [type(layer).__name__ for layer in adapter_for((1, 64, 28, 28), (1, 128, 14, 14))]
    ['AdaptiveAvgPool2d', 'Conv2d', 'BatchNorm2d']
    """
    if given[1:] == wanted[1:] and not is_fitted:
        return nn.Sequential(nn.Identity())
    layers = _steps(given, wanted, is_fitted)
    if layers is None:
        raise EditError(
            f"no usual way leads from {given} to {wanted}. Give an adapter of your own, or cut where both give maps "
            "(N, C, H, W), tokens (N, T, D) or vectors (N, D). Nothing was changed."
        )
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Transpose(nn.Module):
    """Swaps (N, D, T) and (N, T, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return x.transpose(1, 2)


class WithoutFirst(nn.Module):
    """Drops the class token: (N, 1 + T, D) → (N, T, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return x[:, 1:]


class ClassToken(nn.Module):
    """Puts a learned token in front: (N, T, D) → (N, 1 + T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


def _steps(given: Shape, wanted: Shape, is_fitted: bool) -> list[nn.Module] | None:
    match len(given), len(wanted):
        case 4, 4:
            return [*_resample(given, wanted), *_width(given[1], wanted[1], is_fitted)]
        case 4, 3 if grid := _grid(wanted[1], given[2:]):
            shape = (given[0], wanted[2], *grid)
            flat = [nn.Flatten(2), Transpose()]
            token = [ClassToken(wanted[2])] if math.prod(grid) < wanted[1] else []
            return [*_resample(given, shape), *_width(given[1], wanted[2], is_fitted), *flat, *token]
        case 3, 4 if grid := _grid(given[1], wanted[2:]):
            drop = [WithoutFirst()] if math.prod(grid) < given[1] else []
            shape = (given[0], given[2], *grid)
            unflat = [Transpose(), nn.Unflatten(2, grid)]
            return [*drop, *unflat, *_resample(shape, wanted), *_width(given[2], wanted[1], is_fitted)]
        case 4, 2:
            return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given[1], wanted[1])]
        case 3, 2:
            return [nn.AdaptiveAvgPool2d((1, given[2])), nn.Flatten(), nn.Linear(given[2], wanted[1])]
        case (3, 3) | (2, 2) if given[1:-1] == wanted[1:-1]:
            return [nn.Linear(given[-1], wanted[-1])]
        case 2, 4:
            return [nn.Linear(given[1], math.prod(wanted[1:])), nn.Unflatten(1, tuple(wanted[1:]))]
    return None


def _resample(given: Shape, wanted: Shape) -> list[nn.Module]:
    if given[2:] == wanted[2:]:
        return []
    if given[2] >= wanted[2] and given[3] >= wanted[3]:
        return [nn.AdaptiveAvgPool2d(tuple(wanted[2:]))]
    return [nn.Upsample(size=tuple(wanted[2:]), mode="bilinear", align_corners=False)]


def _width(given: int, wanted: int, is_fitted: bool) -> list[nn.Module]:
    return [] if given == wanted and not is_fitted else [nn.Conv2d(given, wanted, 1), nn.BatchNorm2d(wanted)]


def _grid(tokens: int, like: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the height and width of the map that so many tokens fill, a class token in front aside.

    That is a map of the proportions of `like` (H, W), or else a square.
    """
    for height, width in (like, (1, 1)):
        for count in (tokens, tokens - 1):
            rows = math.isqrt(max(count, 0) * height // width)
            if rows and rows * width % height == 0 and rows * (rows * width // height) == count:
                return rows, rows * width // height
    return None

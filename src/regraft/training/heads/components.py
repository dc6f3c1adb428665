"""The features of a head in the coordinates in which it is solved: their principal components.

A linear head with a penalty on its weights is the same in rotated coordinates. There, features do not vary together,
so that one scale a coordinate makes a problem nearly round, and few photos need no more coordinates than rows.
"""

from dataclasses import dataclass

import torch

MAX_DIRECTIONS = 1_024  # above it, an eigendecomposition takes longer than it saves
MIN_SPREAD = 1e-9  # of the largest deviation: features that vary less are constant, and are not scaled
MIN_VARIANCE = {torch.float32: 1e-6, torch.float64: 1e-13}  # of the largest: what is less is rounding


@dataclass(frozen=True, eq=False)
class Components:
    """Features, scaled and rotated.

    Attributes:
        rows: (N, R), in the dtype of the features.
        variances: Mean square of each coordinate, (R,).
    """

    rows: torch.Tensor
    variances: torch.Tensor
    _mean: torch.Tensor
    _std: torch.Tensor
    _turns: tuple[torch.Tensor, ...]  # whose product rotates the rows back, from the last to the first

    @property
    def mean_square(self) -> float:
        """Mean of the squared singular values, those that are left out as rounding included."""
        count, width = len(self.rows), len(self._std)
        return float(self.variances.sum()) * count / min(count, width)

    @classmethod
    def of(cls, features: torch.Tensor, *, is_standardized: bool) -> "Components":
        """Rotate features (N, D) after a scaling to a mean variance of 1, or to 1 for each of them."""
        mean = features.mean(0)
        inputs = features - mean
        std = inputs.square().mean(0).sqrt()
        if is_standardized:
            std = std.where(std > MIN_SPREAD * std.max(), 1.0)
        else:
            std = std.square().mean().sqrt().expand_as(std)
            std = std.where(std > 0, 1.0)
        inputs = inputs / std
        count, width = inputs.shape
        if min(count, width) > MAX_DIRECTIONS:
            return cls(inputs, inputs.square().mean(0), mean, std, ())
        is_wide = width > count
        values, vectors = torch.linalg.eigh(inputs @ inputs.T if is_wide else inputs.T @ inputs)
        is_kept = values > max(MIN_VARIANCE[features.dtype] * float(values[-1]), 0.0)
        is_kept[-1] = True  # features that are all equal keep one coordinate
        values, vectors = values[is_kept].clamp(min=0), vectors[:, is_kept]
        if is_wide:
            roots = values.sqrt()
            rows, turns = vectors * roots, (vectors / roots.clamp(min=1e-15), inputs.T)
        else:
            rows, turns = inputs @ vectors, (vectors,)
        return cls(rows, values / count, mean, std, turns)

    def to_features(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight (K, D) and bias (K,) for the features as they are, from those of the rows, (R, K) and (K,)."""
        for turn in self._turns:
            weight = turn @ weight
        weight = weight.T / self._std
        return weight, bias - weight @ self._mean

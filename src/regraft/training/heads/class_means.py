"""A linear head from the means of the classes: linear discriminants, with a covariance shrunk towards a sphere.

Few photos tell the means of their classes well, and how features vary together badly: the shrinkage is chosen by
cross-validation. All of it (1) leaves the nearest mean.

Source: Friedman, Regularized Discriminant Analysis, 1989, https://doi.org/10.1080/01621459.1989.10478752.
"""

import torch
from torch.nn import functional as F

from regraft.training.heads.components import Components
from regraft.training.heads.folds import Folds

MIN_SHARE = 1e-9  # of a class that nothing was learned of
MIN_VARIANCE = 1e-3  # within classes, as a share of all: photos of a class that are all equal leave rounding


class ClassMeans:
    """Means of the classes and the covariance within them: without each fold, and of all rows as the last.

    Args:
        components: The rows (N, R).
        targets: Classes (N,) below K.
        outputs: K.
        folds: The F folds.
        weights: Weight of each row, (N,).
    """

    def __init__(
        self, components: Components, targets: torch.Tensor, outputs: int, folds: Folds, weights: torch.Tensor
    ) -> None:
        rows = components.rows
        members = F.one_hot(targets, outputs) * weights[:, None]  # (N, K)
        parts = [folds.numbers == fold for fold in range(-1, folds.count)]
        counts = torch.stack([members[part].sum(0) for part in parts])
        sums = torch.stack([members[part].T @ rows[part] for part in parts])
        products = torch.stack([rows[part].T @ (rows[part] * weights[part][:, None]) for part in parts])
        counts, sums, products = (_without_each(values) for values in (counts, sums, products))
        total = counts.sum(1)
        self._priors = (counts / total[:, None]).clamp(min=MIN_SHARE)  # (F + 1, K)
        self._means = sums / counts.clamp(min=MIN_SHARE)[..., None]  # (F + 1, K, R)
        between = torch.einsum("bk,bkr,bks->brs", counts, self._means, self._means)
        self._within = (products - between) / total[:, None, None]
        least = MIN_VARIANCE * float(components.variances.mean())
        self._variances = self._within.diagonal(dim1=1, dim2=2).mean(1).clamp(min=max(least, 1e-12))

    def solve(self, shrinkage: float, which: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights (B, R, K) and biases (B, K) of some of the F + 1 heads."""
        shrunk, means = (1 - shrinkage) * self._within[which], self._means[which].mT
        shrunk.diagonal(dim1=1, dim2=2).add_(shrinkage * self._variances[which, None])
        weights = torch.cholesky_solve(means, torch.linalg.cholesky(shrunk))
        return weights, self._priors[which].log() - (weights * means).sum(1) / 2


def _without_each(values: torch.Tensor) -> torch.Tensor:
    """Return sums without each fold, and of everything, from those of the rows of no fold and of each fold."""
    everything = values.sum(0, keepdim=True)
    return torch.cat([everything - values[1:], everything])

"""Which photos are left out together, and how much each counts."""

from dataclasses import dataclass

import torch

FOLDS = 5


@dataclass(frozen=True, eq=False)
class Folds:
    """A division of the photos into folds, for rows that show them.

    Attributes:
        numbers: Fold of each row, (N,); -1 for rows that are always learned from.
        count: Number of folds F; 0 if no photo can be left out.
    """

    numbers: torch.Tensor
    count: int

    @classmethod
    def of(cls, targets: torch.Tensor, *, views: int, seed: int) -> "Folds":
        """Divide photos at random and evenly within each class; those of one class alone are never left out.

        Args:
            targets: Class of each row, (N,), or its number for regression.
            views: Number of consecutive rows that show the same photo, which stay in one fold.
            seed: Random seed.
        """
        labels = targets[::views].cpu()
        if labels.is_floating_point():
            labels = torch.zeros(len(labels), dtype=torch.int64)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        order = order[torch.bincount(labels)[labels[order]] > 1]
        count = min(FOLDS, len(order))
        numbers = torch.full((len(labels),), -1)
        numbers[order[labels[order].argsort(stable=True)]] = torch.arange(len(order)) % max(count, 1)
        return cls(numbers.repeat_interleave(views).to(targets.device), count)

    @property
    def is_left_out(self) -> torch.Tensor:
        """Whether a row is left out by each fold, (F, N)."""
        return self.numbers[None] == torch.arange(self.count, device=self.numbers.device)[:, None]

    def learned(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the share of each row in what is learned from, without each fold, (F, N)."""
        return shares(~self.is_left_out * weights)

    def own(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (N, K) of each row by the head that has not learned from it, from those of all, (N, F, K).

        A row that is never left out gets zeros: nothing is known of it.
        """
        rows = torch.arange(len(scores), device=scores.device)
        return torch.where(self.numbers[:, None] >= 0, scores[rows, self.numbers.clamp(min=0)], 0.0)


def shares(weights: torch.Tensor) -> torch.Tensor:
    """Return weights (B, N) as shares of their sum."""
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)

"""The frontier's tensors for every photo, and batches of them for the live part."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regraft.data.photos import Photos, SeededShuffle, leaves_one
from regraft.frontier.precision import Precision, unpacked
from regraft.frontier.store import Rows


@dataclass(frozen=True)
class Features:
    """The frontier's tensors for every version of every photo; row `index * views + view`.

    Attributes:
        tensors: What is kept of the frontier, rows (N * V, …); see `packed`.
        dtypes: Types of the frontier's tensors.
        precision: How they are kept.
        error: Largest difference between a value and what is kept of it, as a share of the largest value of its tensor.
        views: Number of versions V of each photo.
        seconds: What it took to compute or find them.
        cost_s: What it took to compute them, be it in an earlier run.
        was_found: Whether an earlier run had computed them.
        place: `memory`, `disk`, or the name of a device.
    """

    tensors: tuple[Rows, ...]
    dtypes: tuple[torch.dtype, ...]
    precision: Precision
    error: float
    views: int
    seconds: float
    cost_s: float
    was_found: bool
    place: str

    @property
    def where(self) -> str:
        """Where they are kept, in words."""
        return "in memory" if self.place == "memory" else f"on {self.place}"

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)

    def pick(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return some rows of each tensor of the frontier, on the device where they are kept."""
        return unpacked([tensor[rows.to(tensor.device)] for tensor in self.tensors], self.dtypes, self.precision)


class FeatureBatches:
    """Batches ((tensors of the frontier), targets) for the live part.

    Args:
        features: Rows of all photos and versions.
        photos: Whose rows they are.
        batch_size: N.
        sampler: Draws order and versions anew in each epoch; None: the photos in order, in their first version.
    """

    def __init__(
        self, features: Features, photos: Photos, batch_size: int, sampler: SeededShuffle | None = None
    ) -> None:
        self.features, self.dataset, self.batch_size, self.sampler = features, photos, batch_size, sampler
        self.targets = torch.tensor([sample.target for sample in photos.samples])
        if any(isinstance(tensor, torch.Tensor) and tensor.is_cuda for tensor in features.tensors):
            self.targets = self.targets.to(features.place)
        self._drops_last = sampler is not None and leaves_one(len(photos), batch_size)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self._drops_last)

    def __iter__(self) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        count = len(self.dataset)
        order, draws = self.sampler.draw() if self.sampler else (torch.arange(count), torch.zeros(count).long())
        begun = self.sampler.first // self.batch_size if self.sampler else 0
        for step in range(begun, len(self)):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield self.pick(order[part], draws[part])

    def pick(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Return features and targets of some photos, in the versions that the numbers in `draws` stand for."""
        rows = indices * self.features.views + draws % self.features.views
        return self.features.pick(rows), self.targets[indices.to(self.targets.device)]

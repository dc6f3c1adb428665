"""The frontier's tensors for every photo, and batches of them for the live part.

However features are computed and kept (mixed precision, 16 or 8 bits, on a GPU, in memory, in a file), they are handed
out in one form: on the device of the network, in the types that its constant part gives outside of autocast. These are
what the weights of the live part expect, be they called inside of autocast, which casts by itself, or outside of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regraft.data.photos import Photos, SeededShuffle, leaves_one
from regraft.frontier.cache.precision import Precision, unpacked
from regraft.frontier.cache.store import Rows

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Features:
    """The frontier's tensors for every version of every photo; row `index * views + view`.

    Attributes:
        tensors: What is kept of the frontier, rows (N * V, …); see `packed`.
        dtypes: Types in which the frontier's tensors are handed out.
        precision: How they are kept.
        error: Largest difference between a value and what is kept of it, as a share of the largest value of its tensor.
        views: Number of versions V of each photo.
        seconds: What it took to compute or find them.
        cost_s: What it took to compute them, be it in an earlier run.
        was_found: Whether an earlier run had computed them.
        place: `memory`, `disk`, or the name of a device.
        device: Where they are handed out.
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
    device: torch.device = CPU

    @property
    def where(self) -> str:
        """Where they are kept, in words."""
        return "in memory" if self.place == "memory" else f"on {self.place}"

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all tensors, as it is handed out."""
        return sum(tensor.nbytes for tensor in self.pick(torch.zeros(1, dtype=torch.int64)))

    def pick(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return some rows of each tensor of the frontier, on `device` and in `dtypes`."""
        kept = [tensor[rows.to(tensor.device)].to(self.device) for tensor in self.tensors]
        return unpacked(kept, self.dtypes, self.precision)


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
        self.targets = torch.tensor([sample.target for sample in photos.samples]).to(features.device)
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

"""The frontier's tensors for every photo (the features), and batches of them for the live part.

However features are computed and kept (mixed precision, 16 or 8 bits, on a GPU, in memory, in a file), they are
returned in one form: on the network's device, in the dtypes that its constant part returns without autocast. The
weights of the live part expect these, inside of autocast, which casts by itself, and outside of it.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch

from regraft.data.photos import Photos, SeededShuffle, leaves_one
from regraft.frontier.cache.precision import unpacked
from regraft.frontier.cache.rows import Rows
from regraft.train_options import CachePrecision
from regraft.training.ranks.group import NO_ROWS, SINGLE, OwnRows, Ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Features:
    """The frontier's tensors for every view of every photo, in row `index * views + view`.

    Attributes:
        tensors: The packed tensors, rows (N * V, …); see `packed`.
        dtypes: Dtypes in which `pick` returns the frontier's tensors.
        precision: Precision of the packed tensors.
        error: Largest rounding error of a value, as a share of the largest value of its tensor.
        views: Number of views V of each photo.
        seconds: Time to compute or load them.
        cost_s: Time that computing them took, possibly in an earlier run.
        was_found: Whether an earlier run had computed them.
        place: `memory`, `disk`, or the name of a device.
        device: Device on which `pick` returns them.
    """

    tensors: tuple[Rows, ...]
    dtypes: tuple[torch.dtype, ...]
    precision: CachePrecision
    error: float
    views: int
    seconds: float
    cost_s: float
    was_found: bool
    place: str
    device: torch.device = CPU

    @property
    def where(self) -> str:
        """Where they are kept, as text."""
        return "in memory" if self.place == "memory" else f"on {self.place}"

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all tensors, as `pick` returns it."""
        return sum(tensor.nbytes for tensor in self.pick(torch.zeros(1, dtype=torch.int64)))

    def pick(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return rows of each tensor of the frontier, on `device` and in `dtypes`."""
        kept = [tensor[rows.to(tensor.device)].to(self.device) for tensor in self.tensors]
        return unpacked(kept, self.dtypes, self.precision)


class PickedBatches:
    """Batches (inputs, targets) whose photos are picked by index, all of a batch at once.

    Args:
        photos: The photos.
        batch_size: N.
        device: Where the targets are kept.
        sampler: Draws order and views in each epoch; None: the photos in order, in their first view.
    """

    def __init__(
        self, photos: Photos, batch_size: int, device: torch.device, sampler: SeededShuffle | None = None
    ) -> None:
        self.dataset, self.batch_size, self.sampler = photos, batch_size, sampler
        self.targets = torch.tensor([sample.target for sample in photos.samples]).to(device)
        self._drops_last = sampler is not None and leaves_one(len(photos), batch_size)
        self._ranks = SINGLE

    def shared(self, ranks: Ranks) -> Self:
        """Return the same batches, of which a rank reads its rows (`OwnRows`)."""
        batches = copy.copy(self)
        batches._ranks = ranks
        return batches

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self._drops_last)

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        count = len(self.dataset)
        order, draws = self.sampler.draw() if self.sampler else (torch.arange(count), torch.zeros(count).long())
        begun = self.sampler.first // self.batch_size if self.sampler else 0
        for step in range(begun, len(self)):
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            indices, seeds = order[part], draws[part]
            if self._ranks.size == 1:
                yield self.pick(indices, seeds)
                continue
            own = self._ranks.share_of_batch(len(indices))
            yield OwnRows(*self.pick(indices[own], seeds[own])) if own.start < own.stop else NO_ROWS

    def pick(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return inputs and targets of photos by index, in the views that `draws` stand for."""
        raise NotImplementedError


class FeatureBatches(PickedBatches):
    """Batches ((tensors of the frontier), targets) for the live part.

    Args:
        features: Features of all photos and views.
        photos: The photos of these features.
        batch_size: N.
        sampler: See `PickedBatches`.
    """

    def __init__(
        self, features: Features, photos: Photos, batch_size: int, sampler: SeededShuffle | None = None
    ) -> None:
        super().__init__(photos, batch_size, features.device, sampler)
        self.features = features

    def pick(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Return features and targets of photos by index, in the views that `draws` stand for, modulo V."""
        rows = indices * self.features.views + draws % self.features.views
        return self.features.pick(rows), self.targets[indices.to(self.targets.device)]

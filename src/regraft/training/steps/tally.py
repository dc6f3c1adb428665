"""Running totals of an epoch, and the losses that a device still computes."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from regraft.data.device_copies import HostCopy
from regraft.errors import LossError


@dataclass(frozen=True)
class UnreadLoss:
    """The loss of a step that a device has been given, but may not have taken yet.

    Attributes:
        copy: The mean loss of the batch.
        count: Number of photos.
        error: Makes the error for a loss that is not finite.
    """

    copy: HostCopy
    count: int
    error: Callable[[float], LossError]


@dataclass
class Tally:
    """Running totals of an epoch.

    Attributes:
        steps: Number of steps.
        total: Sum of the losses of all photos.
        count: Number of photos.
        skipped: Number of steps that were skipped because loss or gradient was not finite.
        at_a_time: Micro-batch size, after a batch ran out of memory; None before.
        min_at_a_time: Smallest micro-batch size; 2 once batch norm has refused a single sample.
        unread: The last steps, whose losses are not in the totals yet.
    """

    steps: int = 0
    total: float = 0.0
    count: int = 0
    skipped: int = 0
    at_a_time: int | None = None
    min_at_a_time: int = 1
    unread: deque[UnreadLoss] = field(default_factory=deque)

    def add(self, loss: float, count: int) -> None:
        """Add the mean loss of a batch."""
        self.total, self.count = self.total + loss * count, self.count + count

    def read(self, *, but: int = 0) -> None:
        """Add the losses of all steps but the last few, after waiting for them.

        Raises:
            LossError: One is not finite.
        """
        while len(self.unread) > but:
            step = self.unread.popleft()
            loss = float(step.copy.tensors()[0])
            if not math.isfinite(loss):
                raise step.error(loss)
            self.add(loss, step.count)

    def to_tree(self) -> dict[str, Any]:
        """Return the totals of all steps so far as plain data."""
        self.read()
        return {name: value for name, value in vars(self).items() if name != "unread"}

    @property
    def mean(self) -> float:
        """Mean loss per photo."""
        return self.total / max(self.count, 1)

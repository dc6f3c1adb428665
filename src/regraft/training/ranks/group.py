"""The ranks of a run: the processes that a launcher (`torchrun`, `accelerate launch`) started to train one network.

`ComputeContext` carries a `Ranks` to wherever work is divided. For one process it is `SINGLE`, whose shares are
everything and whose exchanges return what they are given, so that callers need no second path.

Control messages (counts, signals, lists) go through a group of gloo, which also names a peer that is gone at once;
tensors go through the group of the device. Only sums and broadcasts are used, because every backend has these on every
device: the rows of all ranks are the sum of tensors in which each rank has filled its own rows.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from regraft.errors import RankError, RegraftError
from regraft.training.ranks.watch import FAILED, Watch
from regraft.training.steps.micro_batch import Inputs, rows

Value = TypeVar("Value")
TIMEOUT = timedelta(hours=2)  # of an exchange: ranks may wait long for each other, and one that dies is noticed at once
MIN_ROWS = 2  # of a rank that has any: batch norm cannot train on one


class OwnRows(NamedTuple):
    """A batch of which only the rows of this rank were read."""

    inputs: Any
    targets: torch.Tensor


NO_ROWS = OwnRows(torch.empty(0), torch.empty(0))


def share_of(rank: int, size: int, count: int, *, multiple: int = 1, min_rows: int = 1) -> slice:
    """Return the part of `count` rows that is a rank's: equal parts, in the order of the ranks.

    Args:
        rank: Number of the rank.
        size: Number of ranks.
        count: Number of rows.
        multiple: Parts begin at multiples of it.
        min_rows: Smallest number of rows of a rank that has any.

    >>> [share_of(rank, 3, 8) for rank in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    >>> [share_of(rank, 2, 3, min_rows=2) for rank in range(2)]
    [slice(0, 3, None), slice(3, 3, None)]
    """
    blocks = -(-count // multiple)
    parts = max(1, min(size, count // min_rows))
    start, end = (min(count, multiple * (blocks * min(edge, parts) // parts)) for edge in (rank, rank + 1))
    return slice(start, end)


class Ranks:
    """The processes that train one network together, seen from one of them.

    Attributes:
        rank: Number of this process, from 0. Rank 0 alone prints and writes.
        size: Number of processes.
        local_size: Number of them on this machine.
        device: Device of this process; None for one process, which chooses later.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | None = None, watch: Watch | None = None
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if size > 1 else 1
        self._watch = watch
        self._control: Any = dist.new_group(timeout=TIMEOUT, backend="gloo") if size > 1 else None
        self._received: Callable[[], signal.Signals | None] = lambda: None
        self._stop: signal.Signals | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def agree_on(self, received: Callable[[], signal.Signals | None]) -> Callable[[], signal.Signals | None] | None:
        """Return a function that returns the signal on which all ranks stop, as of their last exchange of rows.

        Args:
            received: Returns the signal that this process received.

        Returns:
            None for a single process, which stops by itself.
        """
        if self.size == 1:
            return None
        self._received, self._stop = received, None
        return lambda: self._stop

    def share(self, count: int, *, multiple: int = 1) -> slice:
        """Return the part of `count` rows that is this rank's; see `share_of`."""
        return share_of(self.rank, self.size, count, multiple=multiple)

    def share_of_batch(self, count: int) -> slice:
        """Return the rows of a batch that are this rank's; no rank gets a single one where there are more."""
        return share_of(self.rank, self.size, count, min_rows=MIN_ROWS)

    def own_rows(self, batch: Any) -> tuple[Inputs, torch.Tensor]:
        """Return inputs and targets of this rank's rows of a batch (inputs, targets)."""
        inputs, targets = batch
        if self.size == 1 or isinstance(batch, OwnRows):
            return inputs, targets
        own = self.share_of_batch(len(targets))
        return rows(inputs, own), targets[own]

    def rows_of_all(
        self, outputs: list[torch.Tensor], targets: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the outputs and targets of a whole batch that is measured, from those of this rank's rows."""
        if self.size == 1:
            return outputs, targets
        whole, _, _ = self.exchange((torch.cat(outputs), targets) if outputs else None, phase="a validation batch")
        return ([whole[0].cpu()], whole[1]) if whole else ([], targets)

    def spread(self, function: Callable[[Sequence[Any]], list[Value]], items: Sequence[Any]) -> list[Value]:
        """Return `function(items)`, of which each rank computes its share."""
        return [value for part in self.objects(function(items[self.share(len(items))])) for value in part]

    def objects(self, value: Value) -> list[Value]:
        """Return the value of each rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.naming_failures():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def union(self, values: dict[int, str]) -> dict[int, str]:
        """Return the entries of the dictionaries of all ranks, by their keys in order."""
        return dict(sorted(entry for part in self.objects(values) for entry in part.items()))

    def from_first(self, function: Callable[[], Value]) -> Value:
        """Return what `function` returns on rank 0; the others do not call it, and fail if it does."""
        if self.size == 1:
            return function()
        values: list[Any] = [function() if self.is_first else None]
        with self.naming_failures():
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 run the block before the others do."""
        if not self.is_first:
            self.objects(None)
        yield
        if self.is_first:
            self.objects(None)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.size == 1:
            return
        with self.naming_failures(), torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().contiguous()
                dist.broadcast(value, src=0, group=self._control if value.device.type == "cpu" else None)
                if value.data_ptr() != tensor.data_ptr():
                    tensor.copy_(value)

    def concatenate(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return tensors (N, …) with the rows of all ranks, in their order; a rank without rows gives no tensors."""
        kinds = self.objects([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
        joined = []
        for position in range(max(map(len, kinds))):
            parts = []
            for rank, kind in enumerate(kinds):
                if position < len(kind):
                    shape, dtype = kind[position]
                    part = tensors[position].cpu() if rank == self.rank else torch.empty(shape, dtype=dtype)
                    if self.size > 1:
                        with self.naming_failures():
                            dist.broadcast(part.contiguous().view(torch.uint8), src=rank, group=self._control)
                    parts.append(part)
            joined.append(torch.cat(parts))
        return tuple(joined)

    def pass_end(self, phase: str) -> None:
        """Come to the end of a pass together with the other ranks; see `exchange`."""
        if self.size > 1:
            self.exchange(None, phase=phase)

    def exchange(
        self, own: Sequence[torch.Tensor] | None, *, phase: str, is_refused: bool = False
    ) -> tuple[list[torch.Tensor], slice, bool]:
        """Return the rows of the whole batch, in the order of the ranks; the ranks also agree on signals.

        Args:
            own: Tensors (n, …) of this rank, as outputs and targets; None without rows.
            phase: Kind of the pass, so that ranks whose data end at different steps are noticed.
            is_refused: Whether the network refused the rows of this rank.

        Returns:
            The tensors (N, …), none where no rank has rows; which rows are this rank's; whether any rank refused.

        Raises:
            RankError: A rank has ended, or is in another phase.
        """
        count = len(own[0]) if own else 0
        kinds = [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in own] if own and count else []
        received = self._received() or 0
        answers = self.objects((count, kinds, received, phase, is_refused))
        counts, all_kinds, signals, phases, refusals = zip(*answers, strict=True)
        if stop := max(signals):
            self._stop = signal.Signals(stop)
        if len(set(phases)) > 1:
            raise RankError(
                f"the data of the ranks have different numbers of batches: {_listed(phases)}. Expected the same "
                "batches on every rank. Give all of them the same data.",
                is_told=self.is_first,
            )
        total, begins = sum(counts), sum(counts[: self.rank])
        place = slice(begins, begins + count)
        if total == 0 or any(refusals):
            return [], place, any(refusals)
        whole = []
        for position, (shape, dtype) in enumerate(next(filter(None, all_kinds))):
            kept = dtype if dtype.is_floating_point else torch.int64  # no backend adds all types of integers
            sums = torch.zeros(total, *shape, dtype=kept, device=self.device)
            if own and count:
                sums[place] = own[position].to(self.device, kept)
            with self.naming_failures():
                dist.all_reduce(sums)
            whole.append(sums.to(dtype))
        return whole, place, False

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Name the rank that has ended where what the block exchanges with it fails.

        Raises:
            RankError: A rank has ended.
        """
        try:
            yield
        except RegraftError:
            raise
        except RuntimeError as error:
            self.raise_for_ended(error)
            raise

    def raise_for_ended(self, error: BaseException, advice: str = "") -> None:
        """Raise an error that names the ranks that have ended, if any has."""
        ended = self._watch.ended() if self._watch is not None else {}
        if not ended:
            return
        reasons = "; ".join(f"rank {rank} {reason}" for rank, reason in sorted(ended.items()))
        # A rank that failed tells so itself, and rank 0 that it stops; of a killed one, the first of the rest tells.
        was_killed = any(not reason.startswith(FAILED) for reason in ended.values())
        told_by = min(set(range(self.size)) - set(ended), default=self.rank) if was_killed else 0
        message = f"the run on {self.size} ranks has ended, because {reasons}.{advice}"
        named = RankError(message, is_told=self.rank == told_by)
        named.result = getattr(error, "result", None)
        raise named from error


SINGLE = Ranks()


def _listed(phases: Sequence[str]) -> str:
    return ", ".join(f"rank {rank} is at {phase}" for rank, phase in enumerate(phases))

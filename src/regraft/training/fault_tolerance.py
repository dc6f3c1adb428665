"""Reading batches although a worker dies, or a photo can no longer be read."""

import copy
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from regraft.anatomy.modes import preserved_randomness
from regraft.checkpoint.file.tree import Tree
from regraft.data.photos import SeededShuffle
from regraft.errors import DataError
from regraft.progress import Progress
from regraft.training.config import TrainConfig
from regraft.training.partial_batches import PartialBatch
from regraft.training.resume.rng import set_random_states
from regraft.training.train_data import TrainData


class FaultTolerantReader:
    """Reads batches, and knows what went wrong so far.

    Args:
        photos: Number of all photos; None where the data is of another kind.
        max_unreadable: Share of them that may be unreadable.
        unreadable: Number of those that could not be read when the run began.
        progress: Is told what goes wrong.
    """

    def __init__(self, photos: int | None, max_unreadable: float, unreadable: int, progress: Progress) -> None:
        self._photos, self._max_unreadable, self._unreadable = photos, max_unreadable, unreadable
        self._progress = progress
        self._lost: set[Path] = set()
        self._lost_now: set[Path] = set()
        self._has_lost_worker = False

    @classmethod
    def of(cls, train_data: TrainData, config: TrainConfig, progress: Progress) -> "FaultTolerantReader":
        """Begin with what could not be read at first."""
        unreadable = len(train_data.unreadable)
        photos = sum(map(len, train_data.photos)) + unreadable if train_data.photos is not None else None
        return cls(photos, config.max_unreadable, unreadable, progress)

    def read(self, batches: Iterable[Any], states: Tree, *, done: int = 0, least: int = 1) -> Iterator[Any]:
        """Yield batches, and None for one of which too few photos can be read.

        Args:
            batches: A loader, or any other iterable.
            states: The random states from which the order of this pass follows.
            done: Number of batches that are left out at the beginning, as they were seen before.
            least: Number of photos that must be left of a batch.

        Raises:
            DataError: More photos than `max_unreadable` allows cannot be read.
        """
        self._lost_now = set()
        source = _without_workers(batches) if self._has_lost_worker else batches
        iterator = _opened(source, done, states) if done else iter(source)
        with _DeathsFoundByAsking() as deaths:
            while True:
                deaths.listen_to_nothing()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                except (RuntimeError, ConnectionError, EOFError) as error:
                    if not _is_death(error) or self._has_lost_worker:
                        raise
                    self._progress.say(f"loading    {error}: the main process goes on alone, from the same batch")
                    self._has_lost_worker = True
                    source = _without_workers(batches)
                    iterator = _opened(source, done, states)
                    continue
                done += 1
                yield self._rest(batch, least) if isinstance(batch, PartialBatch) else batch

    def readable(self, paths: Iterable[Path]) -> tuple[Path, ...]:
        """Leave out the photos that were lost in the last pass."""
        return tuple(path for path in paths if path not in self._lost_now)

    def _rest(self, partial: PartialBatch, least: int) -> Any:
        for lost in partial.lost:
            self._lost_now.add(lost.path)
            if lost.path not in self._lost:
                self._lost.add(lost.path)
                self._progress.say(f"skipped    {str(lost.path)!r}: {lost.reason}; it is left out of its batch")
        count, total = self._unreadable + len(self._lost), self._photos
        if total is not None and count > self._max_unreadable * total:
            last = partial.lost[-1]
            raise DataError(
                f"{count} of {total} photos cannot be read any more ('{last.path}': {last.reason}). Repair them, or "
                f"allow more with --max-unreadable (now {self._max_unreadable:g})."
            )
        return partial.batch if partial.batch is not None and len(partial.batch[1]) >= least else None


class _DeathsFoundByAsking:
    """Keeps torch from raising an error in the middle of a step when a worker dies.

    Its handler of SIGCHLD does that wherever the main thread happens to be, with half a step done. Without it, the
    death is found when the next batch is asked for.
    """

    def __enter__(self) -> "_DeathsFoundByAsking":
        self._before: Any = None
        return self

    def listen_to_nothing(self) -> None:
        """Take the handler away, if there is one by now."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return
        if callable(handler := signal.getsignal(signal.SIGCHLD)):
            self._before = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._before)


def _opened(batches: Iterable[Any], done: int, states: Tree) -> Iterator[Any]:
    """Begin a pass anew behind the batches that were seen before; the global random state is as before afterwards."""
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, SeededShuffle):
        sampler.set_epoch(sampler.epoch, done * getattr(batches, "batch_size", 1))
        return iter(batches)
    if done == 0:  # the order is drawn with the first batch, after this
        set_random_states(states, batches)
        return iter(batches)
    with preserved_randomness():
        set_random_states(states, batches)
        iterator = iter(batches)
        for _ in range(done):
            next(iterator, None)
    return iterator


def _without_workers(batches: Iterable[Any]) -> Iterable[Any]:
    if not isinstance(batches, DataLoader) or batches.num_workers == 0:
        return batches
    alone = copy.copy(batches)
    alone.num_workers, alone.timeout, alone._iterator = 0, 0, None
    return alone


def _is_death(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, EOFError)):
        return True  # in the middle of handing a batch over
    text = str(error)
    return text.startswith("DataLoader worker") and ("exited unexpectedly" in text or "is killed by signal" in text)

"""Read batches in spite of dying workers and photos that become unreadable."""

import copy
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from regraft.anatomy.modes import preserved_randomness
from regraft.checkpoint.file.tree import Tree
from regraft.data.photos import SeededShuffle
from regraft.data.sources import Source
from regraft.errors import DataError
from regraft.progress import Progress
from regraft.torch_internals import drop_workers
from regraft.training.config import TrainConfig
from regraft.training.partial_batches import PartialBatch
from regraft.training.ranks.group import Ranks
from regraft.training.resume.rng import set_random_states
from regraft.training.train_data import TrainData
from regraft.wording import option


class FaultTolerantReader:
    """Reads batches, and counts failures over the whole run.

    Args:
        photos: Number of all photos; None for other data.
        max_unreadable: Share of them that may be unreadable.
        unreadable: Number of photos that were unreadable when the run began.
        progress: Reports failures.
    """

    def __init__(self, photos: int | None, max_unreadable: float, unreadable: int, progress: Progress) -> None:
        self._photos, self._max_unreadable, self._unreadable = photos, max_unreadable, unreadable
        self._progress = progress
        self._lost: set[Source] = set()
        self._lost_now: set[Source] = set()
        self._has_lost_worker = False

    @classmethod
    def of(cls, train_data: TrainData, config: TrainConfig, progress: Progress) -> "FaultTolerantReader":
        """Make a reader that counts the files that were unreadable at the start."""
        unreadable = len(train_data.unreadable)
        photos = sum(map(len, train_data.photos)) + unreadable if train_data.photos is not None else None
        return cls(photos, config.max_unreadable, unreadable, progress)

    def read(self, batches: Iterable[Any], states: Tree, *, done: int = 0, min_photos: int = 1) -> Iterator[Any]:
        """Yield batches; None for a batch with too few readable photos.

        Args:
            batches: A loader, or any other iterable.
            states: The random states from which the order of this pass follows.
            done: Number of batches to skip at the beginning, which were processed before.
            min_photos: Number of readable photos that a batch needs.

        Raises:
            DataError: More photos are unreadable than `max_unreadable` allows.
        """
        self._lost_now = set()
        source = _without_workers(batches) if self._has_lost_worker else batches
        iterator = _resume_iterator(source, done, states) if done else iter(source)
        with _DeferredWorkerDeaths() as deaths:
            while True:
                deaths.remove_handler()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                except (RuntimeError, ConnectionError, EOFError) as error:
                    if not _is_worker_death(error) or self._has_lost_worker:
                        raise
                    self._progress.say(f"loading    {error}: the main process goes on alone, from the same batch")
                    self._has_lost_worker = True
                    source = _without_workers(batches)
                    iterator = _resume_iterator(source, done, states)
                    continue
                done += 1
                yield self._readable_part(batch, min_photos) if isinstance(batch, PartialBatch) else batch

    def readable(self, paths: Iterable[Source]) -> tuple[Source, ...]:
        """Return the paths without photos that were unreadable in the last pass."""
        return tuple(path for path in paths if path not in self._lost_now)

    def merge(self, ranks: Ranks) -> None:
        """Count what the other ranks could not read in the last pass, each of its own rows."""
        ranks.pass_end("the end of the validation batches")
        for lost in ranks.objects(self._lost_now):
            for path in sorted(lost - self._lost, key=str):
                self._progress.say(f"skipped    {str(path)!r}: it can no longer be read; it is left out of its batch")
            self._lost |= lost
            self._lost_now = self._lost_now | lost

    def _readable_part(self, partial: PartialBatch, min_photos: int) -> Any:
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
                f"allow more with {option('max_unreadable')} (now {self._max_unreadable:g})."
            )
        return partial.batch if partial.batch is not None and len(partial.batch[1]) >= min_photos else None


class _DeferredWorkerDeaths:
    """Prevents torch from raising an error in the middle of a step when a worker dies.

    Torch's SIGCHLD handler raises wherever the main thread happens to be, possibly within a step. Without the handler,
    the death is noticed when the next batch is requested, between two steps.
    """

    def __enter__(self) -> "_DeferredWorkerDeaths":
        self._before: Any = None
        return self

    def remove_handler(self) -> None:
        """Remove the handler; torch may have installed it since the last call."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return
        if callable(handler := signal.getsignal(signal.SIGCHLD)):
            self._before = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._before)


def _resume_iterator(batches: Iterable[Any], done: int, states: Tree) -> Iterator[Any]:
    """Restart a pass after its first `done` batches; the global random state is preserved."""
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, SeededShuffle):
        sampler.set_epoch(sampler.epoch, done * getattr(batches, "batch_size", 1))
        return iter(batches)
    if done == 0:  # the order is drawn with the first batch, after this function returns
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
    drop_workers(alone)
    return alone


def _is_worker_death(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, EOFError)):
        return True  # the worker died while it sent a batch
    text = str(error)
    return text.startswith("DataLoader worker") and ("exited unexpectedly" in text or "is killed by signal" in text)

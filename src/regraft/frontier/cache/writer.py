"""Gather rows as they are computed: into memory, into an entry of the store, or both."""

from collections.abc import Sequence
from typing import Any

import torch

from regraft.frontier.cache.store import EntryWriter, Rows, Store
from regraft.progress import Progress


class FeatureWriter:
    """Takes rows of several tensors, batch by batch; a disk that is full costs the entry, not the run.

    Args:
        store: Where they are written; None: nowhere.
        key: Under which name.
        size: Bytes of all of them, as far as they are known.
        in_memory: Whether they are kept in memory as well.
        progress: Is told when writing stops.
    """

    def __init__(self, store: Store | None, key: str, size: int, *, in_memory: bool, progress: Progress) -> None:
        self._progress = progress
        self._kept: list[list[torch.Tensor]] | None = [] if in_memory else None
        self._writing: EntryWriter | None = None
        if store is not None and store.has_room(size):
            store.make_room(size)
            try:
                self._writing = store.write(key)
            except OSError as error:
                self._give_up(error)

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writing is not None:  # not finished
            self._writing.abandon()
            self._writing = None

    @property
    def has_place(self) -> bool:
        """Whether rows are kept anywhere."""
        return self._kept is not None or self._writing is not None

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take more rows of each tensor."""
        if self._kept is not None:
            self._kept.append(list(tensors))
        if self._writing is not None:
            try:
                self._writing.append(tensors)
            except OSError as error:
                self._give_up(error)

    def finish(self, note: dict[str, Any]) -> tuple[Rows, ...] | None:
        """Complete the entry with a note beside it, and return all rows; None where they are kept nowhere."""
        entry = None
        if self._writing is not None:
            try:
                entry, self._writing = self._writing.finish(note), None
            except OSError as error:
                self._give_up(error)
        if self._kept is not None:
            return tuple(torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return entry.tensors(in_memory=False) if entry is not None else None

    def _give_up(self, error: OSError) -> None:
        if self._writing is not None:
            self._writing.abandon()
            self._writing = None
        self._progress.say(f"cache      what is computed once is not written: {error}")

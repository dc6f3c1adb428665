"""Collect rows as they are computed: in memory, in an entry of the store, or both."""

from collections.abc import Sequence
from typing import Any

import torch

from regraft.frontier.cache.rows import Rows
from regraft.frontier.cache.store import EntryWriter, Store
from regraft.progress import Progress


class FeatureWriter:
    """Collects rows of several tensors, batch by batch. If the disk is full, the entry is dropped and the run goes on.

    Args:
        store: Store to write to; None writes nothing.
        key: Key of the entry.
        size: Estimated bytes of all rows.
        in_memory: Whether rows are kept in memory as well.
        progress: Reports when writing stops.
        writing: The shard to write into, for rows of which other processes write the rest.
    """

    def __init__(
        self,
        store: Store | None,
        key: str,
        size: int,
        *,
        in_memory: bool,
        progress: Progress,
        writing: EntryWriter | None = None,
    ) -> None:
        self._progress = progress
        self._kept: list[list[torch.Tensor]] | None = [] if in_memory else None
        self._writing: EntryWriter | None = writing
        if writing is None and store is not None and store.has_room(size):
            store.make_room(size)
            try:
                self._writing = store.write(key)
            except OSError as error:
                self._abandon(error)

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writing is not None:  # the block ended before `finish`
            self._writing.abandon()
            self._writing = None

    @property
    def has_place(self) -> bool:
        """Whether rows are kept anywhere."""
        return self._kept is not None or self._writing is not None

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add rows of each tensor."""
        if self._kept is not None:
            self._kept.append(list(tensors))
        if self._writing is not None:
            try:
                self._writing.append(tensors)
            except OSError as error:
                self._abandon(error)

    def finish(self, note: dict[str, Any]) -> tuple[Rows, ...] | None:
        """Complete the entry with its note, and return all rows; None where neither memory nor disk has them."""
        entry = None
        if self._writing is not None:
            try:
                entry, self._writing = self._writing.finish(note), None
            except OSError as error:
                self._abandon(error)
        if self._kept is not None:
            return tuple(torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return entry.tensors(in_memory=False) if entry is not None else None

    def close_shard(self) -> tuple[dict[str, Any] | None, list[torch.Tensor]]:
        """Complete the shard.

        Returns:
            What the index holds of it, None where it is not on the disk; the rows, none where they are not in memory.
        """
        shard = None
        if self._writing is not None:
            try:
                shard, self._writing = self._writing.close(), None
            except OSError as error:
                self._abandon(error)
        return shard, [torch.cat(parts) for parts in zip(*self._kept or (), strict=True)]

    def _abandon(self, error: OSError) -> None:
        if self._writing is not None:
            self._writing.abandon()
            self._writing = None
        self._progress.say(f"cache      what is computed once is not written: {error}")

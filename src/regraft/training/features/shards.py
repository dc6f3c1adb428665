"""What several ranks compute once, together: each its share of the photos, into one entry of the cache.

Every rank writes its rows into a shard of its own, and rank 0 the index over them. Where they do not share a folder, or
the disk is full, the rows of all ranks are collected in the memory of each.
"""

from collections.abc import Sequence
from typing import Any

import torch

from regraft.errors import ModelError
from regraft.frontier.cache.rows import Rows
from regraft.frontier.cache.store import EntryWriter, Store
from regraft.frontier.cache.writer import FeatureWriter
from regraft.progress import Progress
from regraft.training.ranks.group import Ranks

NO_ROOM = "what is computed once fits neither into memory nor on a disk that all ranks share"


class ShardedWriter:
    """Collects the rows of this rank as a `FeatureWriter` does, and returns those of all ranks.

    Args:
        store: Store to write to; None writes nothing.
        key: Key of the entry.
        size: Estimated bytes of the rows of all ranks.
        in_memory: Whether these fit into memory.
        progress: Reports when writing stops.
        ranks: The ranks, all of which make a writer at the same time.
    """

    def __init__(
        self, store: Store | None, key: str, size: int, *, in_memory: bool, progress: Progress, ranks: Ranks
    ) -> None:
        self._key, self._in_memory, self._ranks, self._store = key, in_memory, ranks, store
        self._folder = ranks.from_first(lambda: _begin(store, key, size))
        sees_folder = self._folder is not None and self._folder.is_dir()
        self._is_shared = all(ranks.objects(sees_folder))
        writing = None
        if self._is_shared and store is not None and self._folder is not None:
            writing = EntryWriter(store, key, self._folder, ranks.rank)
        elif ranks.is_first and self._folder is not None and store is not None:
            EntryWriter(store, key, self._folder).abandon()
        if writing is None and not in_memory:
            raise ModelError(NO_ROOM)
        self._writer = FeatureWriter(None, key, size, in_memory=in_memory, progress=progress, writing=writing)

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add rows of this rank."""
        self._writer.append(tensors)

    def finish(self, note: dict[str, Any]) -> tuple[Rows, ...] | None:
        """Complete the entry with its note, which becomes that of all ranks, and return the rows of all of them."""
        ranks, store = self._ranks, self._store
        shard, kept = self._writer.close_shard()
        notes = ranks.objects(note)
        note.update(_merged(notes))
        shards = ranks.objects(shard)
        if store is not None and self._folder is not None and None not in shards:
            filled = [part for part in shards if part is not None and part["shapes"]]
            folder = self._folder
            ranks.from_first(lambda: store.complete(self._key, folder, filled, note))
            entry = store.find(self._key)
            if all(ranks.objects(entry is not None)) and entry is not None:
                return entry.tensors(in_memory=self._in_memory)
        return ranks.concatenate(kept) if self._in_memory else None


def _begin(store: Store | None, key: str, size: int) -> Any:
    """Return the folder of a new entry; None where there is no room for it."""
    if store is None or not store.has_room(size):
        return None
    store.make_room(size)
    try:
        return store.begin(key)
    except OSError:
        return None


def _merged(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the note of all rows: counts add up, errors and seconds are the largest."""
    counts = [note["holds"].split(" ", 1) for note in notes]
    merged = {name: max(note[name] for note in notes) for name in ("error", "seconds") if name in notes[0]}
    return {**notes[0], **merged, "holds": f"{sum(int(count) for count, _ in counts)} {counts[0][1]}"}

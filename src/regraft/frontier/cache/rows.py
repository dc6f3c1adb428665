"""Rows of tensors in files, read on access."""

import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.checkpoint.file.positioned import read_at
from regraft.errors import RunError

RETRY_ADVICE = "Start the run again: what it kept is checked, and computed anew where it is damaged."


class DiskTensor:
    """Rows of a tensor in a file, read on access.

    The file is read rather than memory-mapped: the pages of a mapping count as memory of the process, and a mapped file
    that is truncated kills the process.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._path, self._file = file, file.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def __reduce__(self) -> tuple[Any, ...]:
        return DiskTensor, (self._path, self.shape, self.dtype)  # another process opens the file itself

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Read rows by index (N,) or as a slice, and return a copy.

        Raises:
            RunError: The file cannot be read, or was truncated.
        """
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            data = torch.empty(max(0, last - first), self._row_bytes, dtype=torch.uint8)
            self._read(data.numpy().reshape(-1), first)
        else:
            data = torch.empty(len(rows), self._row_bytes, dtype=torch.uint8)
            for row, number in zip(data.numpy(), rows.tolist(), strict=True):
                self._read(row, number)
        return data.view(self.dtype).view(len(data), *self.shape[1:])

    def _read(self, into: np.ndarray, row: int) -> None:
        rest, place = into.data, row * self._row_bytes
        while rest:
            try:
                count = read_at(self._file, rest, place)
            except OSError as error:
                raise RunError(f"'{self._path}' cannot be read: {error}. {RETRY_ADVICE}") from error
            if count == 0:
                raise RunError(f"'{self._path}' was cut off while it was in use. {RETRY_ADVICE}")
            rest, place = rest[count:], place + count


class ShardedTensor:
    """Rows of a tensor in several files, one after the other."""

    device = torch.device("cpu")

    def __init__(self, shards: Sequence[DiskTensor]) -> None:
        self._shards = shards
        self._ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
        self.shape, self.dtype = (int(self._ends[-1]), *shards[0].shape[1:]), shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Read rows by index (N,) or as a slice, and return a copy; see `DiskTensor`."""
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        values = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        owners = torch.searchsorted(self._ends, rows, right=True)  # (N,) number of the shard of each row
        for number, shard in enumerate(self._shards):
            places = (owners == number).nonzero().flatten()
            if len(places):
                values[places] = shard[rows[places] - (int(self._ends[number]) - len(shard))]
        return values


Rows = torch.Tensor | DiskTensor | ShardedTensor

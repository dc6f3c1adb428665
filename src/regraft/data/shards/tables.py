"""Rows of tables with photos in them: parquet files, and the Arrow files of `Dataset.save_to_disk`.

Hugging Face `datasets` writes a photo as struct{bytes, path}, and the names of the classes into the metadata of the
schema. A parquet file can be read only in row groups (of 100 MB, unless its writer chose otherwise), so the last ones
stay in memory: whoever goes through the rows in order reads each group once, with any number of threads.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.data.sources import ShardMember, version_of
from regraft.errors import DataError, RegraftError

KEPT_BYTES = 256 * 2**20  # of row groups
MIN_KEPT = 2  # whatever their size: threads that read in order may be on both sides of a border
MAX_OPEN = 8  # tables
IMAGE_NAMES = ("image", "img", "photo", "picture", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "cls", "class", "target")


@dataclass(frozen=True, slots=True)
class TableRow(ShardMember):
    """A row of a parquet or Arrow file."""

    shard: Path
    row: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.row}"

    @property
    def short_name(self) -> str:
        """The name of the file, and the number of the row."""
        return f"{self.shard.name}/{self.row}"

    def count_bytes(self) -> int:
        """Return the size of the whole file."""
        return self.shard.stat().st_size

    def read(self) -> bytes:
        """Return the photo in this row."""
        return _tables(os.getpid()).read(self.shard, self.row)

    def version(self) -> str:
        """Return that of the file, and the row."""
        return f"{version_of(self.shard)} {self.row}"


@dataclass(frozen=True)
class TableHead:
    """What a table says of itself.

    Attributes:
        image: Name of the column with the photos.
        label: Name of the column with the labels; None without one.
        classes: Names of the classes; None if the labels are names, or have none.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def list_rows(shard: Path) -> tuple[TableHead, Iterator[int | str | None]]:
    """Return what a table says of itself, and the label of each row; no photo is read.

    Raises:
        DataError: It is no whole table, its columns are not clear, or pyarrow is not installed.
    """
    with _as_data_errors(shard):
        table = _open_table(shard)
        head = head_of(shard, table.schema)
    return head, _labels(shard, table, head)


def _labels(shard: Path, table: Any, head: TableHead) -> Iterator[int | str | None]:
    if head.label is None:
        yield from (None for _ in range(table.count))
        return
    for group in range(len(table.starts)):
        with _as_data_errors(shard):
            labels = table.column(group, head.label).to_pylist()
        yield from (checked_label(shard, head, label) for label in labels)


def checked_label(shard: Path | str, head: TableHead, label: Any) -> int | str | None:
    """Return a label; None for none, which Hugging Face marks by -1, as in the test part of ImageNet.

    Raises:
        DataError: It is no class.
    """
    if label is None or (label == -1 and head.classes):
        return None
    if isinstance(label, (int, str)) and not isinstance(label, bool):
        return label
    raise DataError(f"the column '{head.label}' of '{shard}' holds {label!r}, expected a class: an integer or a name.")


def head_of(shard: Path | str, schema: Any) -> TableHead:
    """Work out which columns hold the photos and the labels.

    Raises:
        DataError: There is none, or several; the message names the columns.
    """
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    features = {name: kind for name, kind in info.get("features", {}).items() if isinstance(kind, dict)}
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    images = images or [name for name in schema.names if name.lower() in IMAGE_NAMES]
    labels = [name for name in schema.names if name.lower() in LABEL_NAMES]
    labels = labels or [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(images) != 1 or len(labels) > 1:
        raise DataError(
            f"'{shard}' has the columns {', '.join(map(repr, schema.names))}, expected one of photos (struct of bytes "
            "and path, or bytes, named 'image') and one of classes (named 'label'). Write it with these two only, or "
            "rename them."
        )
    label = labels[0] if labels else None
    names = features.get(label or "", {}).get("names")
    return TableHead(images[0], label, tuple(map(str, names)) if names else None)


class _Parquet:
    """A parquet file, in row groups."""

    def __init__(self, shard: Path) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(shard)
        meta = self._file.metadata
        self.schema, self.count = self._file.schema_arrow, int(meta.num_rows)
        self.starts = _starts(meta.row_group(group).num_rows for group in range(meta.num_row_groups))

    def column(self, group: int, name: str) -> Any:
        """Read a column of a row group."""
        return self._file.read_row_group(group, columns=[name], use_threads=False).column(0)


class _Arrow:
    """An Arrow stream, as `Dataset.save_to_disk` writes it, in record batches.

    It is mapped only while the batches are looked for: a mapped file that is cut off would kill the process.
    """

    def __init__(self, shard: Path) -> None:
        import pyarrow

        self._ipc, self._places, counts = pyarrow.ipc, [], []
        with pyarrow.memory_map(str(shard)) as mapped, pyarrow.ipc.open_stream(mapped) as reader:
            self.schema = reader.schema
            place = mapped.tell()
            for batch in reader:
                self._places.append(place)
                counts.append(len(batch))
                place = mapped.tell()
        self.starts, self.count = _starts(counts), sum(counts)
        self._file = pyarrow.OSFile(str(shard))

    def column(self, group: int, name: str) -> Any:
        """Read a column of a record batch; the others are read as well."""
        self._file.seek(self._places[group])
        return self._ipc.read_record_batch(self._ipc.read_message(self._file), self.schema).column(name)


def _starts(counts: Iterable[int]) -> list[int]:
    """Return the first row of each group."""
    return list(itertools.accumulate(counts, initial=0))[:-1]


def _open_table(shard: Path) -> _Parquet | _Arrow:
    try:
        import pyarrow as pyarrow
    except ImportError as error:
        raise DataError(
            f"'{shard}' needs the library pyarrow. Install it: pip install 'regraft[stream]'; or make tar shards of it."
        ) from error
    return _Arrow(shard) if shard.suffix.lower() == ".arrow" else _Parquet(shard)


@contextlib.contextmanager
def _as_data_errors(shard: Path) -> Iterator[None]:
    """Turn errors of pyarrow inside the block into those of a shard."""
    try:
        yield
    except RegraftError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"no shard '{shard}'. Give a folder that holds it.") from error
    except Exception as error:  # pyarrow's errors derive from ValueError, OSError, KeyError, …
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"the shard '{shard}' cannot be read ({type(error).__name__}: {reason}): it is damaged, or ends early. "
            "Copy or write it again, or remove it."
        ) from error


@contextlib.contextmanager
def _as_reasons() -> Iterator[None]:
    """Turn errors of pyarrow inside the block into those of a photo."""
    try:
        yield
    except (RegraftError, FileNotFoundError):
        raise
    except Exception as error:  # pyarrow's errors derive from ValueError, OSError, KeyError, …
        raise DataError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


class _Tables:
    """Open tables of one process, and the row groups that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # so that of several threads that need a group, one reads it
        self._open = functools.lru_cache(maxsize=MAX_OPEN)(self._open_table)
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def read(self, shard: Path, row: int) -> bytes:
        """Return the photo in a row.

        Raises:
            DataError: It cannot be read; the message is the reason only.
        """
        with _as_reasons():
            with self._lock:
                column, start = self._group_of(shard, row)
            value = column[row - start].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            return content
        elsewhere = f", only the path {value['path']!r}" if isinstance(value, dict) and value.get("path") else ""
        raise DataError(f"the row has no bytes of a photo{elsewhere}")

    def _group_of(self, shard: Path, row: int) -> tuple[Any, int]:
        """Return the photos of the row group that a row is in, and its first row."""
        version = version_of(shard)
        table, image = self._open(shard, version)
        group = bisect.bisect_right(table.starts, row) - 1
        if (column := self._groups.get((version, group))) is None:
            column = self._groups[version, group] = table.column(group, image)
            while len(self._groups) > MIN_KEPT and self._kept_bytes() > KEPT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((version, group))
        return column, table.starts[group]

    def _open_table(self, shard: Path, version: str) -> tuple[_Parquet | _Arrow, str]:
        del version  # a file that was replaced is opened again
        table = _open_table(shard)
        return table, head_of(shard, table.schema).image

    def _kept_bytes(self) -> int:
        return sum(column.nbytes for column in self._groups.values())


@functools.lru_cache(maxsize=1)
def _tables(process: int) -> _Tables:
    """Return the tables of this process: one that was forked opens its own, and takes over no lock."""
    del process
    return _Tables()

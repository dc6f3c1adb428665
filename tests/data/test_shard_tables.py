"""Tables with photos in them, as Hugging Face `datasets` writes them → listings and bytes."""

import builtins
import threading
from pathlib import Path
from typing import Any

import pytest

from data.shards import numbered, photo, write_table, write_tar
from regraft.data.folders import list_data
from regraft.data.shards import tables
from regraft.data.shards.tables import TableRow, list_rows
from regraft.data.sources import read_bytes
from regraft.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def group_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the row groups of photos that are read from now on."""
    reads: list[tuple[str, int]] = []
    read = tables._Parquet.column

    def counted(self: Any, group: int, name: str) -> Any:
        if name == "image":
            reads.append((str(self), group))
        return read(self, group, name)

    monkeypatch.setattr(tables._Parquet, "column", counted)
    return reads


def test_list_data_reads_tables_of_hugging_face(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "train-00000-of-00002.parquet", 8)
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", 6)
    write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", 4)
    listing = list_data(tmp_path)
    assert listing.classes == ("cat", "dog")
    assert listing.counts() == [("cat", 7, 2), ("dog", 7, 2)]
    assert str(listing.train[9].path) == f"{tmp_path}/data/train-00001-of-00002.parquet/1"
    assert [read_bytes(sample.path) for sample in listing.validation] == [photo(number) for number in range(4)]


def test_list_data_reads_what_datasets_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [{"bytes": photo(n), "path": None} for n in range(10)], "label": [n % 2 for n in range(10)]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    dataset.to_parquet(tmp_path / "parquet" / "test-0.parquet")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(
        tmp_path / "arrow", num_shards={"train": 3, "test": 1}
    )
    for folder in ("parquet", "arrow"):
        listing = list_data(tmp_path / folder)
        assert listing.classes == ("dog", "cat")
        assert listing.split == "as found in the shards named train and test"
        for part in (listing.train, listing.validation):
            assert [(read_bytes(sample.path), sample.target) for sample in part] == [
                (photo(number), number % 2) for number in range(10)
            ]


def test_list_data_takes_names_as_labels_beside_tar_shards(tmp_path: Path) -> None:
    write_table(tmp_path / "train-a.parquet", 6, names=None)
    write_tar(tmp_path / "train-b.tar", numbered(4, ("cat", "dog")))
    assert list_data(tmp_path).classes == ("cat", "dog")


def test_read_bytes_in_order_reads_each_row_group_once_with_any_number_of_threads(
    tmp_path: Path, group_reads: list[tuple[str, int]]
) -> None:
    shard = write_table(tmp_path / "a.parquet", 40, rows=5)
    rows = iter(range(40))
    taken: list[tuple[int, bytes]] = []
    lock = threading.Lock()

    def read() -> None:
        while True:
            with lock:
                row = next(rows, None)
            if row is None:
                return
            taken.append((row, read_bytes(TableRow(shard, row))))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [(row, photo(row)) for row in range(40)]
    assert len(group_reads) == len(set(group_reads)) == 8


def test_read_bytes_keeps_two_row_groups_at_least(
    tmp_path: Path, group_reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "KEPT_BYTES", 1)
    shard = write_table(tmp_path / "a.parquet", 15, rows=5)
    for row in (0, 5, 0, 5, 10, 5, 0):
        assert read_bytes(TableRow(shard, row)) == photo(row)
    assert [group for _, group in group_reads] == [0, 1, 2, 0]


def test_read_bytes_notices_that_a_table_was_replaced(tmp_path: Path) -> None:
    shard = write_table(tmp_path / "a.parquet", 4)
    assert read_bytes(TableRow(shard, 3)) == photo(3)
    pq.write_table(pyarrow.table({"image": [photo(8)] * 4, "label": [0, 1, 0, 1]}), tmp_path / "b.parquet")
    (tmp_path / "b.parquet").replace(shard)
    assert read_bytes(TableRow(shard, 3)) == photo(8)


def write(path: Path, **columns: list[Any]) -> None:
    pq.write_table(pyarrow.table(columns), path)


def test_read_bytes_says_when_a_row_has_no_photo(tmp_path: Path) -> None:
    photos = [{"bytes": None, "path": "x/1.jpg"}, {"bytes": b"", "path": None}, {"bytes": None, "path": None}]
    write(tmp_path / "a.parquet", image=photos, label=[0, 1, 1])
    for row, reason in enumerate(
        ("the row has no bytes of a photo, only the path 'x/1.jpg'", "the file is empty", "the row has no bytes")
    ):
        with pytest.raises(DataError, match=reason):
            read_bytes(TableRow(tmp_path / "a.parquet", row))
    shard = write_table(tmp_path / "b.parquet", 4)
    whole = shard.read_bytes()
    assert read_bytes(TableRow(shard, 0)) == photo(0)
    shard.write_bytes(whole[:100] + bytes(200) + whole[300:])
    with pytest.raises(DataError, match=r"[A-Za-z]+: "):
        read_bytes(TableRow(shard, 0))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match="no such file"):
        read_bytes(TableRow(tmp_path / "a.parquet", 0))


def test_list_data_refuses_tables_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    shard = write_table(tmp_path / "a.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20])
    with pytest.raises(
        DataError, match=r"a\.parquet' cannot be read \(ArrowInvalid: .*\): it is damaged, or ends early"
    ):
        list_data(tmp_path)
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"it is damaged, or ends early\. Copy or write it again, or remove it\."):
        list_data(tmp_path)
    shard.unlink()
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        rows = pyarrow.table({"image": [photo(0)] * 2, "label": [0, 1]})
        with pyarrow.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-600])
    with pytest.raises(DataError, match=r"a\.arrow' cannot be read \(.*\): it is damaged, or ends early\. Copy"):
        list_data(tmp_path)
    (tmp_path / "a.arrow").unlink()
    write(shard, image=[b"x"] * 2, label=[0, None])
    with pytest.raises(DataError, match=r"1 of 2 photos in '.*' have no label, as '.*a\.parquet/1'"):
        list_data(tmp_path)
    write_table(shard, names=("cat", "dog", "emu"))
    table = pq.read_table(shard)
    pq.write_table(table.set_column(1, "label", [[-1, *range(11)]]), shard)
    with pytest.raises(DataError, match=r"1 of 12 photos in '.*' have no label, as '.*a\.parquet/0'"):
        list_data(tmp_path)
    write(shard, image=[b"x"] * 2, label=[0.5, 1.5])
    with pytest.raises(
        DataError, match=r"the column 'label' of '.*' holds 0\.5, expected a class: an integer or a name"
    ):
        list_data(tmp_path)
    write(shard, image=[b"x"], photo=[b"x"], label=[0])
    with pytest.raises(DataError, match=r"has the columns 'image', 'photo', 'label', expected one of photos .* rename"):
        list_data(tmp_path)
    write(shard, text=["x"], label=[0])
    with pytest.raises(DataError, match=r"has the columns 'text', 'label', expected one of photos"):
        list_data(tmp_path)
    write(shard, image=[], label=[])
    with pytest.raises(DataError, match=r"the shard '.*a\.parquet' holds no photo"):
        list_data(tmp_path)
    write_table(shard)
    write_table(tmp_path / "b.parquet", names=("dog", "cat"))
    with pytest.raises(DataError, match=r"b\.parquet' names other classes than the shards before it"):
        list_data(tmp_path)


def test_list_rows_names_the_extra_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_table(tmp_path / "a.parquet")
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"needs the library pyarrow\. Install it: pip install 'regraft\[stream\]'"):
        list_rows(shard)

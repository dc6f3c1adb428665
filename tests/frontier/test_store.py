"""What is kept is whole, or it is not there."""

import os
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from oracles import identical
from regraft.errors import ConfigError, RunError
from regraft.frontier.cache.key import features_key, network_digest
from regraft.frontier.cache.store import ENTRY, Store

KEY = "0" * 64


def write(store: Store, key: str = KEY, rows: int = 10) -> list[torch.Tensor]:
    tensors = [torch.arange(rows * 6.0).view(rows, 2, 3), torch.arange(rows).to(torch.bfloat16).view(rows, 1)]
    writing = store.write(key)
    writing.append([tensor[:4] for tensor in tensors])
    writing.append([tensor[4:] for tensor in tensors])
    writing.finish({"unreadable": {}})
    return tensors


@pytest.mark.parametrize("in_memory", [True, False])
def test_store_finds_what_is_written(tmp_path: Path, in_memory: bool) -> None:
    store = Store(tmp_path)
    tensors = write(store)
    entry = store.find(KEY)
    assert entry is not None
    assert entry.note == {"unreadable": {}}
    assert entry.bytes == sum(tensor.nbytes for tensor in tensors)
    rows = torch.tensor([7, 0, 0, 9])
    found = entry.tensors(in_memory=in_memory)
    assert all(identical(kept[rows], tensor[rows]) for kept, tensor in zip(found, tensors, strict=True))


def test_store_reads_chunks_from_the_disk_and_refuses_a_file_that_is_cut_off(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensors = write(store)
    entry = store.find(KEY)
    assert entry is not None
    found = entry.tensors(in_memory=False)
    for stretch in (slice(2, 5), slice(0, 0), slice(8, 99)):
        assert all(identical(kept[stretch], tensor[stretch]) for kept, tensor in zip(found, tensors, strict=True))
    os.truncate(tmp_path / KEY / "0.bin", 6 * 4 * 5 + 3)
    assert identical(found[0][torch.tensor([4])], tensors[0][4:5])
    with pytest.raises(RunError, match=r"0.bin' was cut off while it was in use. Start the run again"):
        found[0][torch.tensor([5])]


def test_store_takes_an_interrupted_write_for_no_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writing = store.write(KEY)
    writing.append([torch.zeros(3, 2)])
    assert store.find(KEY) is None
    writing.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["0.bin", "1.bin", ENTRY])
def test_store_notices_a_damaged_entry_and_deletes_it(tmp_path: Path, file: str) -> None:
    store = Store(tmp_path)
    write(store)
    path = tmp_path / KEY / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if file != ENTRY else data[: len(data) // 2])
    assert store.find(KEY) is None
    assert not (tmp_path / KEY).exists()


def test_store_drops_the_least_recently_used_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(3):
        write(store, str(number))
        os.utime(tmp_path / str(number) / ENTRY, (number, number))
    store.limit_bytes = sum(entry.bytes for entry in store.entries())
    assert store.find("0") is not None  # used now
    store.make_room(1)
    assert store.find("1") is None
    assert store.find("0") is not None
    assert store.clear() > 0
    assert store.entries() == []


def test_store_clears_a_write_away_that_nobody_finished_after_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path)
    unfinished = tmp_path / f"{KEY}.1.2.tmp"
    unfinished.mkdir()
    store.make_room(0)
    assert unfinished.exists()
    os.utime(unfinished, (time.time() - 1e6,) * 2)
    store.make_room(0)
    assert not unfinished.exists()


def test_store_takes_its_limit_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Store(tmp_path).limit_bytes == 20 * 2**30
    monkeypatch.setenv("REGRAFT_CACHE_GIB", "0.5")
    assert Store(tmp_path).limit_bytes == 2**29
    for text in ("much", "-1", "inf", "nan"):
        monkeypatch.setenv("REGRAFT_CACHE_GIB", text)
        with pytest.raises(ConfigError, match=rf"REGRAFT_CACHE_GIB is '{text}', expected the GiB that the cache may"):
            Store(tmp_path)


def test_store_lets_two_processes_write_the_same(tmp_path: Path) -> None:
    context = get_context("fork")
    processes = [context.Process(target=write, args=(Store(tmp_path), KEY, 5000)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Store(tmp_path).find(KEY) is not None
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def test_store_says_that_there_is_no_room_before_anything_is_written(tmp_path: Path) -> None:
    assert not Store(tmp_path, limit_bytes=10).has_room(100)
    assert not Store(tmp_path).has_room(shutil.disk_usage(tmp_path).free)


def test_features_key_depends_on_weights_files_and_circumstances(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"one")
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    first = features_key(network_digest(model), [file], size=3)
    assert features_key(network_digest(model), [file], size=3) == first
    others = [
        features_key(network_digest(model), [file], size=4),
        features_key(network_digest(nn.Sequential(model[0], nn.ReLU())), [file], size=3),
    ]
    file.write_bytes(b"two")
    others.append(features_key(network_digest(model), [file], size=3))
    file.write_bytes(b"one")
    with torch.no_grad():
        model[1].running_mean[0] += 1e-6
    others.append(features_key(network_digest(model), [file], size=3))
    assert len({first, *others}) == 5

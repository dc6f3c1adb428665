"""Two ranks against one process; and what is refused before ranks exchange anything."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from oracles import identical
from regraft.errors import ConfigError, ModelError
from regraft.frontier.cache.store import Store
from regraft.training.ranks import launch
from regraft.training.ranks.group import SINGLE, share_of
from training import rank_jobs
from training.by_hand import write_photos

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Carry out all jobs in this process and on two ranks, of which one is killed at the end."""
    root = tmp_path_factory.mktemp("ranks")
    write_photos(root / "photos", 22, measured=9)
    write_photos(root / "other photos", 22, measured=9)
    (root / "photos/train/class000/005.png").write_bytes(b"damaged")  # so that the index of each photo after it moves
    (root / "other photos/train/class000/005.png").write_bytes(b"damaged")
    (root / "other photos/train/class001/003.png").unlink()
    before = os.environ.get("REGRAFT_CACHE")
    for name in rank_jobs.JOBS:
        cache = root / "cache of 1"
        if name == rank_jobs.STOPPED[0]:
            rank_jobs.stop(name, root, cache)
        elif name != rank_jobs.STOPPED[1]:
            rank_jobs.carry_out(name, root, cache)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    started = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, rank_jobs.__file__, str(root)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1, ended.stderr
    assert (root / "killed.txt").exists(), ended.stderr
    print(f"two ranks took {time.monotonic() - started:.0f} s")
    for name in ("half", rank_jobs.STOPPED[1]):  # one process after two ranks
        cache = root / "cache of both"
        again = {"out": str(root / name), "resume": True} if name == rank_jobs.STOPPED[1] else {}
        rank_jobs.carry_out(name, root, cache, **again)
    os.environ["REGRAFT_CACHE"] = before or ""
    return root


def answers(folder: Path, name: str) -> list[Any]:
    """Return what each rank noted."""
    return [json.loads((folder / f"answers {rank}.json").read_text(encoding="utf-8"))[name] for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name in rank_jobs.JOBS if name not in rank_jobs.STOPPED])
def test_fit_on_two_ranks_is_that_of_one_process(name: str, folder: Path) -> None:
    one, two = (torch.load(folder / f"{name} {size}.pt", weights_only=False) for size in (1, 2))
    for key, tensor in one[0].items():
        assert torch.allclose(tensor, two[0][key], rtol=0, atol=1e-5), key
    assert torch.allclose(one[1], two[1], rtol=0, atol=1e-5)
    assert torch.allclose(torch.tensor(one[2]), torch.tensor(two[2]), rtol=0, atol=1e-5)
    for figure in ("accuracy", "count", "confusion"):  # every photo is measured once
        assert one[3][figure] == two[3][figure]
    assert one[3]["count"] == (9 if name == "weighted" else 18)


def test_fit_on_two_ranks_computes_the_same_features_bit_for_bit(folder: Path) -> None:
    one, two = Store(folder / "cache of 1"), Store(folder / "cache of 2")
    keys = {entry.key for entry in one.entries()} & {entry.key for entry in two.entries()}
    assert len(keys) >= 5  # training and validation photos, of the head, of views, and while layers are unfrozen
    for key in keys:
        alone, both = one.find(key), two.find(key)
        assert alone is not None
        assert both is not None
        assert (len(alone.shards), len(both.shards)) == (0, 2)
        assert {**alone.note, "seconds": 0} == {**both.note, "seconds": 0}
        for in_memory in (True, False):
            rows = torch.tensor([len(alone.tensors(in_memory=False)[0]) - 1, 0, 17])
            for expected, tensor in zip(alone.tensors(in_memory=True), both.tensors(in_memory=in_memory), strict=True):
                assert identical(expected, tensor[slice(None)])
                assert identical(expected[rows], tensor[rows])


def test_store_deletes_an_entry_of_which_one_shard_is_damaged(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache of 2", tmp_path / "cache")
    store = Store(tmp_path / "cache")
    key = store.entries()[0].key
    assert store.find(key) is not None
    shard = next((tmp_path / "cache" / key).glob("0.1.bin"))
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    assert store.find(key) is None
    assert not (tmp_path / "cache" / key).exists()


def test_fit_in_one_process_finds_what_two_ranks_computed(folder: Path) -> None:
    assert torch.load(folder / "half 1.pt", weights_only=False)[-1] is True
    assert torch.load(folder / "half 2.pt", weights_only=False)[-1] is False


def test_fit_resumes_with_another_number_of_ranks(folder: Path) -> None:
    whole = torch.load(folder / "half 1.pt", weights_only=False)
    for name, size in zip(rank_jobs.STOPPED, (2, 1), strict=True):
        resumed = torch.load(folder / f"{name} {size}.pt", weights_only=False)
        for key, tensor in whole[0].items():
            assert torch.allclose(tensor, resumed[0][key], rtol=0, atol=1e-5), (name, key)
        assert torch.allclose(torch.tensor(whole[2]), torch.tensor(resumed[2]), rtol=0, atol=1e-5)


def test_fit_refuses_ranks_that_see_different_files(folder: Path) -> None:
    first, second = answers(folder, "files")
    assert "rank 1 does not have 'train/class001/003.png', and rank 0 has it." in first[0]
    assert "Give every machine the same copy of the data" in first[0]
    assert first[1:] == [0, True]
    assert second[1] == 1


def test_fit_refuses_ranks_with_different_numbers_of_batches_and_features_without_room(folder: Path) -> None:
    for message, _, _ in answers(folder, "batches"):
        assert "rank 0 is at a training batch, rank 1 is at the end of the training batches." in message
    first, second = answers(folder, "room")
    assert "cannot be computed once: what is computed once fits neither into memory nor on a disk" in first[0]
    assert "Pass cache=False" in first[0]
    assert (first[1:], second[1]) == ([0, True], 1)


def test_cli_on_two_ranks_prints_and_writes_once(folder: Path) -> None:
    first, second = answers(folder, "printed")
    assert json.loads(first[0])["validation"]["count"] == 18
    assert "ranks      2 processes, rank 0 on cpu, connected by gloo" in first[1]
    assert "ranks      a batch of 32 is divided among them, and a step is that of the whole batch" in first[1]
    assert second == ["", ""]
    assert {child.name for child in (folder / "run").iterdir()} == {
        "model.safetensors",
        "metrics.csv",
        "config.toml",
        "report.html",
    }


def test_fit_ends_where_a_rank_is_killed_and_names_it(folder: Path) -> None:
    message = (folder / "killed.txt").read_text()
    assert "the run on 2 ranks has ended, because rank 1 was killed, or its machine is gone." in message
    assert "To continue" in message
    assert list((folder / "killed/last").glob("state-*"))
    result = regraft.fit(
        rank_jobs.cnn(),
        rank_jobs.datasets(23),
        loss=torch.nn.functional.cross_entropy,
        **{**rank_jobs.COMMON, "epochs": 12},
        out=str(folder / "killed"),
        resume=True,
    )
    assert len(result.history) == 12


def test_launch_refuses_an_environment_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is '2' .* RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"):
        regraft.fit(rank_jobs.cnn(), rank_jobs.datasets(23), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"it is no number.*torchrun --nproc_per_node 2"):
        regraft.fit(rank_jobs.cnn(), rank_jobs.datasets(23), progress=False)


@pytest.mark.parametrize(
    ("device", "local", "message"),
    [
        ("auto", 1, r"rank 1 has no GPU of its own: 2 ranks on a machine with 1 GPU\. .*--nproc_per_node 1"),
        ("cuda:0", 0, r"the device 'cuda:0' is one GPU for the 2 ranks .* Leave the number out"),
        ("mps", 0, r"2 ranks cannot train on 'mps'.*device='cpu'"),
    ],
)
def test_launch_refuses_two_ranks_on_one_gpu(
    device: str, local: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ENVIRONMENT, "RANK": f"{local}", "LOCAL_RANK": f"{local}", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "usable_device", torch.device)  # there is none here
    with pytest.raises(ModelError, match=message), launch.joined_ranks(device, regraft.Progress()):
        pass


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("count", "multiple", "min_rows"), [(0, 1, 1), (1, 1, 2), (5, 1, 2), (50, 16, 1), (7, 1, 1)])
def test_share_of_divides_all_rows(size: int, count: int, multiple: int, min_rows: int) -> None:
    shares = [share_of(rank, size, count, multiple=multiple, min_rows=min_rows) for rank in range(size)]
    assert [row for share in shares for row in range(count)[share]] == list(range(count))
    assert all(share.start % multiple == 0 or share.start == count for share in shares)
    lengths = {share.stop - share.start for share in shares}
    assert min(lengths - {0}, default=min_rows) >= min(min_rows, max(count, 1))
    assert SINGLE.share(count) == slice(0, count)

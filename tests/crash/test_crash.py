"""A run that is killed again and again ends as one that was left in peace, and never leaves an unreadable file."""

import csv
import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crash.victim import run
from oracles import identical
from regraft.checkpoint.file.tree import read_tree
from regraft.training.config import read_config
from regraft.training.resume.run_folder import LOCK, RunFolder
from training.factories import write_photos

STUCK_S = 60.0


@pytest.fixture(scope="module")
def processes() -> Any:
    """Return a context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "regraft.training.fitting", "regraft.data.photos", "crash.victim"])
    return context


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 24)


def waiting(process: BaseProcess) -> Iterator[None]:
    """Look again and again while the process is alive."""
    began = time.monotonic()
    while process.is_alive():
        assert time.monotonic() - began < STUCK_S, "the run is stuck"
        yield
        time.sleep(0.0005)


def kill(process: BaseProcess, out: Path, drawn: random.Random) -> bool:
    """Kill a run at a random moment after it has begun to train; say whether a state was being written."""
    before = {file.name: file.stat().st_mtime_ns for file in (out / "last").glob("state-*")}
    for _ in waiting(process):
        if any(before.get(file.name) != mtime(file) for file in (out / "last").glob("state-*")):
            break
    if drawn.random() < 0.5:
        for _ in waiting(process):
            if any((out / "last").glob(".*.tmp")):
                break
    else:
        time.sleep(drawn.uniform(0, 0.12))
    process.kill()
    process.join()
    return any((out / "last").glob(".*.tmp"))


def mtime(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def require_readable(out: Path) -> None:
    """Read every file that is not on its way to be written."""
    assert list((out / "last").glob("state-*"))
    for file in out.rglob("*"):
        if file.is_dir() or file.name.startswith(".") or file.name == "run.lock":
            continue
        if file.parent.name == "last":
            assert read_tree(file)["format"] == 1
        elif file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".csv":
            rows = list(csv.DictReader(file.read_text().splitlines()))
            assert [row["epoch"] for row in rows] == [str(number + 1) for number in range(len(rows))]
            assert None not in rows[-1].values()
        else:
            assert file.name == "config.toml"
            assert read_config(file)


@pytest.mark.parametrize(
    ("kills", "epochs"), [(5, 12), pytest.param(40, 60, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_fit_that_is_killed_ends_as_one_in_peace(
    kills: int, epochs: int, processes: Any, photos: Path, tmp_path: Path
) -> None:
    drawn, while_writing = random.Random(kills), 0
    out, whole = tmp_path / "killed", tmp_path / "whole"
    for _ in range(kills):
        process = processes.Process(target=run, args=(photos, out, epochs))
        process.start()
        while_writing += kill(process, out, drawn)
        assert process.exitcode == -9, "the run ended, or failed, before it was killed"
        require_readable(out)
    last = processes.Process(target=run, args=(photos, out, epochs))
    last.start()
    undisturbed = processes.Process(target=run, args=(photos, whole, epochs))
    undisturbed.start()
    for process in (last, undisturbed):
        process.join(STUCK_S)
        assert process.exitcode == 0
    assert while_writing > 0
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(identical(ours[name], theirs[name]) for name in ours)
    texts = [(folder / "metrics.csv").read_text() for folder in (out, whole)]
    tables = [[line.rsplit(",", 1)[0] for line in text.splitlines()] for text in texts]  # without the seconds
    assert tables[0] == tables[1]
    assert len(tables[0]) == epochs + 1
    assert {child.name for child in out.iterdir()} == {"model.safetensors", "metrics.csv", "config.toml"}
    assert torch.isfinite(torch.cat([tensor.float().flatten() for tensor in ours.values()])).all()
    print(f"{kills} kills, {while_writing} of them while a state was being written")


def test_run_folder_deletes_what_a_killed_process_was_writing_and_nothing_else(tmp_path: Path) -> None:
    unfinished = (".model.safetensors.17.tmp", ".metrics.csv.17.tmp", ".tmpaB3xYz")
    others = {".tmp", "tmpaB3xYz", "notes.tmp", ".tmpaB3xYz.txt"}
    for name in (*unfinished, *others):
        (tmp_path / name).write_text("")
    with RunFolder(tmp_path, overwrite=True).locked():
        assert {child.name for child in tmp_path.iterdir()} == others | {LOCK}

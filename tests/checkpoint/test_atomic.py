"""Files have the permissions that the umask gives to any new file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft import convert, fit, merge, save
from regraft.checkpoint.file.atomic import atomic_write
from regraft.report import write_report


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_atomic_write_gives_files_the_permissions_of_the_umask(mask: int, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("Windows has no umask")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 2, 2), torch.arange(8) % 3)
    with umask(mask):
        result = fit(model, (data, data), out=str(tmp_path / "run"), epochs=1, batch_size=4, lr=0.1)
        write_report(result, tmp_path / "run" / "report.html")
        whole = save(model, tmp_path / "whole.safetensors")
        save(model, tmp_path / "shards.safetensors", shard_bytes=20)
        delta = save(model, tmp_path / "delta.safetensors", base=whole)
        merge(delta, tmp_path / "merged.safetensors")
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        convert(tmp_path / "weights.pth", tmp_path / "converted.safetensors")
        with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "failed"):
            raise ZeroDivisionError
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"model.safetensors", "report.html", "metrics.csv", "config.toml"} <= {file.name for file in files}
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {
        file.name: oct(0o666 & ~mask) for file in files
    }

"""Files whose tensors lie beside other objects are read without anything of those objects."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import os
import pathlib
import pickle
import string
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oracles import same, snapshot
from regraft import convert, load_weights
from regraft.checkpoint.foreign.objects import is_data
from regraft.errors import CheckpointError


class Stage(enum.Enum):
    LAST = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1


class Attributes(dict[str, Any]):
    pass


HARMLESS: dict[str, Any] = {
    "numpy number": np.float64(0.9),
    "numpy count": np.int64(3),
    "numpy bool": np.bool_(True),
    "numpy array": np.arange(6.0).reshape(2, 3),
    "numpy text": np.array(["a", None], dtype=object),
    "numpy generator": np.random.default_rng(0),
    "namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
    "simple namespace": types.SimpleNamespace(a=1),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(1),
    "path": pathlib.Path("a/b"),
    "default dict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2]),
    "enumeration": Stage.LAST,
    "dataclass": Config(),
    "dict of another class": Attributes(a=1),
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "generator": torch.Generator(),
    "decimal": decimal.Decimal("1.5"),
    "identity": uuid.UUID(int=1),
    "sets": ({1, 2}, frozenset([3]), slice(1, 2), range(3), 1j),
    "loss": nn.CrossEntropyLoss(),
    "class": nn.Linear,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", HARMLESS)
def test_load_weights_reads_past_objects(case: str, legacy: bool, tmp_path: Path) -> None:
    trained, model = nn.Linear(2, 2), nn.Linear(2, 2)
    value = HARMLESS[case]
    if b"getattr" in pickle.dumps(value):
        pytest.skip("Python 3.11.0 to 3.11.3 write a member of an enumeration as a call of getattr, which is refused")
    content = {"state_dict": trained.state_dict(), "best": value, "hparams": {"inner": [value]}}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    report = load_weights(model, tmp_path / "w.pth", strict=True)
    assert torch.equal(model.weight, trained.weight)
    assert torch.equal(model.bias, trained.bias)
    assert {"best", "hparams"} <= set(report.left_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.uint16])
def test_load_weights_reads_the_same_bits_beside_an_object(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(16, dtype=torch.int16).view(torch.uint8).view(dtype)
    model = nn.Module()
    model.register_buffer("held", torch.zeros_like(numbers))
    torch.save({"state_dict": {"held": numbers}, "best": np.float64(1)}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", strict=True)
    assert torch.equal(model.state_dict()["held"].view(torch.uint8), numbers.view(torch.uint8))


def test_load_weights_reads_weights_that_are_arrays(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    arrays = {"weight": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)), "bias": np.ones(2)}
    torch.save({"model": arrays}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", strict=True)
    assert torch.equal(model.weight.detach(), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(model.bias.detach(), torch.ones(2))


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function", [os.mkdir, os.path.basename, string.capwords, sorted, len], ids=lambda function: function.__name__
)
def test_load_weights_refuses_what_would_run(function: Any, tmp_path: Path) -> None:
    content = {"state_dict": nn.Linear(2, 2).state_dict(), "best": Runs(function, str(tmp_path / "it ran"))}
    torch.save(content, tmp_path / "w.pth")
    model = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(.*`regraft convert w\.pth OUT\.safetensors"):
        load_weights(model, tmp_path / "w.pth")
    assert same(before, snapshot(model))
    assert not (tmp_path / "it ran").exists()


WHOLE = {"alone": lambda: nn.Linear(2, 2), "below model": lambda: {"epoch": 1, "model": nn.Linear(2, 2)}}


@pytest.mark.parametrize("case", WHOLE)
def test_load_weights_advises_what_works_for_a_whole_module(case: str, tmp_path: Path) -> None:
    torch.save(WHOLE[case](), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(torch\.nn\.modules\.linear\.Linear\)"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "out.safetensors", tensors_only=True)
    assert load_weights(nn.Linear(2, 2), tmp_path / "out.safetensors", strict=True).share == 1


def test_is_data_is_an_allowlist_for_python_torch_and_numpy() -> None:
    refused = (
        "os.getcwd",
        "builtins.sorted",
        "builtins.print",
        "importlib.resources",
        "torch.ones",
        "numpy.ones.x",
        "print",
    )
    assert not [name for name in refused if is_data(name)]
    assert is_data("my_project.config.Config")

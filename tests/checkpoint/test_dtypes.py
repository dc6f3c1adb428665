"""Every dtype of torch is written and read again bit by bit, or refused by name before anything is written."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regraft import convert, diff, load, load_weights, save
from regraft.checkpoint.file.layout import DTYPES
from regraft.errors import CheckpointError, InputError

EVERY = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


def holding(tensor: torch.Tensor) -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_buffer("held", tensor)
    return model


def numbers(dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.tensor([True, False])
    return torch.arange(64, dtype=torch.uint8).view(dtype)


@pytest.mark.filterwarnings("ignore:no recipe rebuilds")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_save_writes_every_dtype_that_load_weights_and_convert_read_again(dtype: torch.dtype, tmp_path: Path) -> None:
    model, expected = holding(numbers(dtype)), numbers(dtype).view(torch.uint8)
    path = save(model, tmp_path / "m.safetensors")
    assert torch.equal(load_file(path)["held"].view(torch.uint8), expected)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "theirs.safetensors")
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    convert(path, tmp_path / "converted.safetensors")
    for name in ("m.safetensors", "theirs.safetensors", "theirs.pth", "converted.safetensors"):
        empty = holding(torch.zeros_like(expected).view(dtype))
        load_weights(empty, tmp_path / name, strict=True)
        assert torch.equal(empty.state_dict()["held"].view(torch.uint8), expected), name
    assert diff(model, path).identical


@pytest.mark.filterwarnings("ignore:.*support is experimental")
@pytest.mark.parametrize("dtype", [dtype for dtype in EVERY if dtype not in (*DTYPES.values(), *QUANTIZED)], ids=str)
def test_save_refuses_other_dtypes_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    model = holding(torch.empty(2, dtype=dtype))
    with pytest.raises(CheckpointError, match=rf"cannot save 'held': it is {dtype}; .* Nothing was written"):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


ODD: dict[str, Any] = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", ODD)
def test_save_refuses_tensors_without_plain_values(case: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'held' .*(no bytes|no values)"):
        save(holding(ODD[case]()), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_load_keeps_a_rare_dtype(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fnuz)
    again = load(save(model, tmp_path / "m.safetensors"))
    assert again[0].weight.dtype is torch.float8_e4m3fnuz
    assert torch.equal(again[0].weight.view(torch.uint8), model[0].weight.view(torch.uint8))


class Extra(nn.Linear):
    """A layer with a state of its own beside its tensors."""

    def __init__(self, state: Any = None) -> None:
        super().__init__(4, 4)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        if state == "refused":
            raise RuntimeError("no such state")
        self.state = state


STATES = [b"ab", {"a": 1, "pair": (1, 2)}, [1, 2], "text", 3.5, None]


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "wrapped"])
@pytest.mark.parametrize("state", STATES, ids=repr)
def test_load_weights_gives_layers_their_extra_state(state: Any, prefix: str, tmp_path: Path) -> None:
    trained, model = nn.Sequential(Extra(state)), nn.Sequential(Extra("old"))
    torch.save({prefix + name: value for name, value in trained.state_dict().items()}, tmp_path / "w.pth")
    report = load_weights(model, tmp_path / "w.pth", strict=True)
    assert model[0].state == state
    assert type(model[0].state) is type(state)
    assert "0._extra_state" in report.loaded


@pytest.mark.filterwarnings("ignore:no recipe rebuilds")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_load_weights_and_save_keep_extra_state_that_is_a_tensor(kind: str, tmp_path: Path) -> None:
    trained, model = nn.Sequential(Extra(torch.ones(3))), nn.Sequential(Extra(torch.zeros(3)))
    if kind == "pth":
        torch.save(trained.state_dict(), tmp_path / "w.pth")
    else:
        save(trained, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / f"w.{kind}", strict=True)
    assert torch.equal(model[0].state, torch.ones(3))


def test_load_weights_puts_everything_back_where_a_layer_refuses_its_state(tmp_path: Path) -> None:
    torch.save(nn.Sequential(Extra("refused")).state_dict(), tmp_path / "w.pth")
    model = nn.Sequential(Extra("old"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"'0' cannot be loaded from .*no such state\. Nothing was changed"):
        load_weights(model, tmp_path / "w.pth")
    assert model[0].state == "old"
    assert torch.equal(model[0].weight, before["0.weight"])


def test_load_weights_reports_extra_state_that_one_side_lacks(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 4)).state_dict(), tmp_path / "w.pth")
    assert load_weights(nn.Sequential(Extra("old")), tmp_path / "w.pth").missing == ("0._extra_state",)
    torch.save(nn.Sequential(Extra("new")).state_dict(), tmp_path / "w.pth")
    assert load_weights(nn.Sequential(nn.Linear(4, 4)), tmp_path / "w.pth").unexpected == ("0._extra_state",)


def test_save_refuses_extra_state_that_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save '0\._extra_state': .* value of type dict"):
        save(nn.Sequential(Extra({"a": 1})), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())

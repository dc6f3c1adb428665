"""What an error advises can be done: its arguments exist where it is raised, and its commands have the flags."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import typer
from torch import nn

import regraft
from regraft.cli.app import app
from regraft.errors import RegraftError

OPTIONS = {"rename", "match", "entry", "accept", "adapt", "min_share", "strict", "dry_run", "tensors_only", "base",
           "weights", "trust_code", "num_classes"}  # fmt: skip


def state(prefix: str = "", **changed: Any) -> dict[str, Any]:
    tensors = {prefix + name: tensor for name, tensor in torchvision.models.squeezenet1_0().state_dict().items()}
    return {**tensors, **changed}


def twice(folder: Path) -> Any:
    return {"a": state(), "b": state()}


def renamed(folder: Path) -> Any:
    return {name.replace("fire", "").replace("squeeze.", "s."): tensor for name, tensor in state().items()}


def narrow(folder: Path) -> Any:
    return {name: tensor for name, tensor in state().items() if "12" in name}


def other(folder: Path) -> Any:
    return {"x.weight": torch.ones(3)}


def module(folder: Path) -> Any:
    return nn.Linear(2, 2)


def classes(folder: Path) -> Any:
    return state(**{"classifier.1.weight": torch.ones(5, 512, 1, 1), "classifier.1.bias": torch.ones(5)})


FILES = [twice, renamed, narrow, other, module, classes]
CALLS: dict[str, tuple[Callable[..., Any], Callable[[Path], object]]] = {
    "load_weights": (
        regraft.load_weights,
        lambda file: regraft.load_weights(torchvision.models.squeezenet1_0(), file, strict=True),
    ),
    "create_model": (regraft.create_model, lambda file: regraft.create_model("squeezenet1_0", weights=file)),
    "convert": (
        regraft.convert,
        lambda file: regraft.convert(file, file.with_name("out.safetensors"), model="resnet18"),
    ),
    "convert, no model": (regraft.convert, lambda file: regraft.convert(file, file.with_name("out.safetensors"))),
    "diff": (regraft.diff, lambda file: regraft.diff(file, file)),
}


def flags_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    return {flag for parameter in group.commands[command].params for flag in parameter.opts}  # type: ignore[attr-defined]


def assert_can_be_done(message: str, function: Callable[..., Any]) -> None:
    named = set(re.findall(r"\b([a-z_]+)=", message)) & OPTIONS
    assert named <= set(inspect.signature(function).parameters), message
    for command, words in re.findall(r"`regraft (\w+) ([^`]*)`", message):
        assert set(re.findall(r"--[a-z-]+", words)) <= flags_of(command), message


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("case", CALLS)
def test_regraft_error_advises_what_exists_where_it_is_raised(
    case: str, make: Callable[[Path], Any], tmp_path: Path
) -> None:
    torch.save(make(tmp_path), tmp_path / "w.pth")
    function, call = CALLS[case]
    try:
        call(tmp_path / "w.pth")
    except RegraftError as error:
        assert_can_be_done(str(error), function)


def test_save_load_and_diff_advise_what_exists_for_a_base_that_is_not_there(tmp_path: Path) -> None:
    model = regraft.create_model("squeezenet1_0", weights="none", num_classes=2)
    base = regraft.save(model, tmp_path / "base.safetensors")
    delta = regraft.save(model, tmp_path / "delta.safetensors", base=base)
    base.rename(tmp_path / "elsewhere.safetensors")
    for function, call in (
        (regraft.load, lambda: regraft.load(delta)),
        (regraft.load_weights, lambda: regraft.load_weights(model, delta)),
        (regraft.diff, lambda: regraft.diff(model, delta)),
        (regraft.create_model, lambda: regraft.create_model("squeezenet1_0", weights=delta)),
    ):
        with pytest.raises(RegraftError, match="which is not in") as caught:
            call()
        assert_can_be_done(str(caught.value), function)
    with pytest.raises(RegraftError, match=r"regraft merge delta\.safetensors --out FULL\.safetensors --base FILE"):
        regraft.save(model, tmp_path / "more.safetensors", base=delta)

"""`regraft convert`: files of others become safetensors, with and without a network."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.testing
from safetensors.torch import load_file
from torchvision import models

import tiny
from oracles import identical
from regraft import load
from regraft.card import card_of
from regraft.checkpoint import convert
from regraft.cli.app import app
from regraft.errors import CheckpointError, RunError

NET_THAT_SAVES_ITSELF = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)

torch.save(Net(), "w.pt")
"""
Cli = Callable[..., typer.testing.Result]
NET = f"py:{Path(tiny.__file__)}:PlainCnn"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return lambda *words: typer.testing.CliRunner().invoke(app, ["convert", *map(str, words)])


def wrapped(classes: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {f"model.{name}": tensor for name, tensor in tiny.PlainCnn(classes).state_dict().items()}


def test_cli_convert_takes_wrappers_off_and_keeps_dtypes(cli: Cli) -> None:
    state = {name: tensor.half() for name, tensor in wrapped().items()}
    state["model.fc.bias"] = state["model.fc.weight"][:, 0]  # a view of another tensor's memory
    torch.save({"epoch": 1, "state_dict": state}, "w.ckpt")
    result = cli("w.ckpt", "w.safetensors")
    assert result.exit_code == 0, result.output
    assert "taken from the entry 'state_dict'; prefix 'model.' stripped" in result.stdout
    assert "left out: epoch" in result.stdout
    assert result.stdout.splitlines()[-1] == "w.safetensors: 14 tensors"
    found = load_file("w.safetensors")
    assert found.keys() == {name.removeprefix("model.") for name in state}
    assert all(identical(found[name.removeprefix("model.")], tensor) for name, tensor in state.items())


def test_cli_convert_makes_a_checkpoint_of_a_network(cli: Cli) -> None:
    torch.save({"state_dict": wrapped()}, "w.ckpt")
    result = cli("w.ckpt", "w.safetensors", "--model", NET, "--trust-code", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["out"] == "w.safetensors"
    assert found["counts"]["certain"] == 14
    model = load("w.safetensors", trust_code=True)
    assert all(identical(model.state_dict()[name.removeprefix("model.")], t) for name, t in wrapped().items())
    recipe = card_of(model).recipe
    assert recipe is not None
    assert recipe.source.weights == "w.ckpt"


def test_cli_convert_builds_the_head_for_the_classes_of_the_file(cli: Cli) -> None:
    torch.save(wrapped(9), "w.ckpt")
    assert cli("w.ckpt", "w.safetensors", "--model", NET, "--trust-code").exit_code == 0
    model = load("w.safetensors", trust_code=True)
    assert identical(model.fc.weight, wrapped(9)["model.fc.weight"])


def test_cli_convert_rewrites_names_by_rule(cli: Cli) -> None:
    torch.save({f"encoder.{name}": tensor for name, tensor in models.resnet18().state_dict().items()}, "w.pth")
    assert cli("w.pth", "w.safetensors", "--rename", r"encoder.(.*)=trunk.\1").exit_code == 0
    assert all(name.startswith("trunk.") for name in load_file("w.safetensors"))


def test_cli_convert_dry_run_shows_and_writes_nothing(cli: Cli) -> None:
    torch.save({name.replace("conv", "c"): tensor for name, tensor in wrapped().items()}, "w.pth")
    result = cli("w.pth", "w.safetensors", "--model", NET, "--trust-code", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "not taken" in result.stdout
    assert "suggestion: take it with --accept" in result.stdout
    assert [file.name for file in Path().iterdir()] == ["w.pth"]
    failed = cli("w.pth", "w.safetensors", "--model", NET, "--trust-code")
    assert failed.exit_code == 2
    assert "does not fill py:" in failed.stderr
    assert "--accept" in failed.stderr
    assert cli("w.pth", "w.safetensors", "--model", NET, "--trust-code", "--accept", "ambiguous").exit_code == 0


def test_cli_convert_takes_the_old_name_of_a_confidence_with_a_note(cli: Cli) -> None:
    torch.save(wrapped(), "w.pth")
    result = cli("w.pth", "w.safetensors", "--model", NET, "--trust-code", "--accept", "guess")
    assert result.exit_code == 0, result.output
    assert "--accept guess is deprecated. Use --accept ambiguous." in result.stderr


def test_cli_convert_takes_a_whole_module_without_its_class(cli: Cli) -> None:
    Path("net.py").write_text(NET_THAT_SAVES_ITSELF)
    subprocess.run([sys.executable, "net.py"], check=True, timeout=120)
    result = cli("w.pt", "w.safetensors")
    assert result.exit_code == 2
    assert "'w.pt' holds more than tensors (__main__.Net), and reading it would run code from it" in result.stderr
    assert "regraft convert w.pt OUT.safetensors --tensors-only" in result.stderr
    assert cli("w.pt", "w.safetensors", "--tensors-only").exit_code == 0
    assert {name: tuple(t.shape) for name, t in load_file("w.safetensors").items()} == {
        "fc.weight": (3, 2),
        "fc.bias": (3,),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("w.pth", "w.pth"), "does not end in .safetensors"),
        (("w.pth", "there.safetensors"), "'there.safetensors' exists. Choose another name, or pass --overwrite"),
        (("there.safetensors", "there.safetensors", "--overwrite"), "is the file that is read"),
        (("w.pth", "no/w.safetensors"), "no folder 'no' to write 'w.safetensors' into"),
        (("w.pth", "new.safetensors", "--rename", "a"), "'a' is not of the form OLD=NEW"),
        (("w.pth", "new.safetensors", "--match", "size"), "--match is 'size', expected names or shapes"),
        (("w.pth", "new.safetensors", "--accept", "likely"), "--accept likely needs a network to fit: --model NAME"),
        (("w.pth", "new.safetensors", "--ema", "ema"), "has no entry 'ema'"),
        (("no.pth", "new.safetensors"), "no file 'no.pth'"),
        (("w.pth", "new.safetensors", "--model", "resnet18"), "does not fill resnet18"),
        (("w.pth", "new.safetensors", "--model", NET), "names Python code"),
    ],
)
def test_cli_convert_refuses_bad_words_and_writes_nothing(words: tuple[str, ...], message: str, cli: Cli) -> None:
    torch.save(wrapped(), "w.pth")
    convert("w.pth", "there.safetensors")
    before = {file.name: file.read_bytes() for file in Path().iterdir()}
    result = cli(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert {file.name: file.read_bytes() for file in Path().iterdir()} == before


def test_convert_leaves_the_file_before_where_it_cannot_be_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(wrapped(), "w.pth")
    Path("w.safetensors").write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunError, match=r"cannot write 'w.safetensors'.*No space left on device"):
        convert("w.pth", "w.safetensors")
    assert Path("w.safetensors").read_text() == "before"
    assert len(list(Path().iterdir())) == 2


def test_cli_convert_lists_several_networks(cli: Cli) -> None:
    torch.save({"one": wrapped(), "two": wrapped()}, "w.pth")
    with pytest.raises(CheckpointError, match=r"'one' \(14 tensors\), 'two' \(14 tensors\)\. Choose one with entry="):
        convert("w.pth", "w.safetensors")
    assert cli("w.pth", "w.safetensors", "--entry", "two").exit_code == 0

"""`regraft surgery`."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regraft
from checkpoint.planned import by_hand, write_plan
from regraft.cli.app import app


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path)


def test_cli_surgery_writes_what_the_plan_says(plan: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["surgery", "--plan", str(plan), "--out", str(tmp_path / "out.safetensors")])
    assert ran.exit_code == 0, ran.output
    model = regraft.load(tmp_path / "out.safetensors")
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert not model.get_parameter("layer3.0.conv1.weight").requires_grad


def test_cli_surgery_options_say_the_same_as_a_plan(tmp_path: Path) -> None:
    options = ["--weights", "none", "--truncate-drop", "1", "--append", "Linear(512,40)", "ReLU()", "Linear(40,3)"]
    out = tmp_path / "out.safetensors"
    ran = CliRunner().invoke(app, ["surgery", "resnet18", *options, "--freeze-until", "layer3.0", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert regraft.plan_of(regraft.load(out)).edits == regraft.plan_of(by_hand()).edits


def test_cli_surgery_has_an_option_for_every_edit(tmp_path: Path) -> None:
    options = ["--replace-stem", "1", "--remove", "layer3.1", "--replace", "type:ReLU=GELU()"]
    options += ["--insert-after", "layer2=Conv2d(128, 128, 1)", "--insert-before", "layer4=Dropout(0.1)"]
    options += ["--replace-head", "7", "--freeze", "layer1", "--freeze", "conv1"]
    out = tmp_path / "out.safetensors"
    ran = CliRunner().invoke(app, ["surgery", "resnet18", "--weights", "none", *options, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    model = regraft.load(out)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    steps = [step.operation for step in regraft.plan_of(model).edits]
    assert steps == ["replace_stem", "remove", "replace", "insert", "insert", "replace_head"]
    assert "layer1" in regraft.plan_of(model).freeze.layers


def test_cli_surgery_dry_run_shows_both_trees_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["surgery", "resnet18", "--truncate-after", "layer3", "--append", "5", "--dry-run"])
    assert ran.exit_code == 0, ran.output
    before, _, after = ran.stdout.partition("\nafter\n")
    assert "512×7×7" in before
    assert "layer4" not in after
    assert "1×5" in after
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--append", "5"], "no network given"),
        (["resnet18", "Linear(3,3)", "--dry-run"], "follows no --append"),
        (["resnet18", "--append", "5"], "nowhere to write to"),
        (["resnet18", "--append", "5", "--out", "out.pt"], "does not end in .safetensors"),
        (["resnet18", "--append", "5", "--out", "no/out.safetensors"], "no folder 'no'"),
        (["resnet18", "--insert-after", "layer2", "--dry-run"], "is not of the form LAYER=NEW"),
        (["resnet18", "--truncate-after", "layer9", "--dry-run"], "no layer 'layer9' in ResNet. Nearest: 'layer"),
    ],
)
def test_cli_surgery_exits_with_2_for_wrong_options_and_writes_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["surgery", *options])
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert list(tmp_path.iterdir()) == []

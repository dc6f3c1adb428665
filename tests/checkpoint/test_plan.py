"""A plan says the same in Python, in TOML and on the command line."""

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import regraft
from oracles import identical
from regraft.card import card_of
from regraft.cli.app import app
from regraft.errors import ConfigError, EditError, SelectionError

PLAN = """
source = "resnet18"
weights = "none"

[[edits]]
truncate = { drop = 1 }

[[edits]]
append = { layers = ["Linear(512, 40)", "ReLU()", "Linear(40, 3)"] }

[freeze]
until = "layer3.0"
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def planned(**entries: object) -> regraft.Plan:
    return regraft.Plan.model_validate({"source": "Sequential(Linear(4, 8), ReLU())", **entries})


def by_hand() -> nn.Module:
    model = regraft.create_model("resnet18", weights="none")
    model = regraft.append(regraft.truncate(model, drop=1), nn.Linear(512, 40), nn.ReLU(), nn.Linear(40, 3))
    regraft.freeze(model, until="layer3.0")
    return model


def test_a_plan_builds_what_the_functions_build(plan: Path) -> None:
    torch.manual_seed(0)
    expected = by_hand()
    torch.manual_seed(0)
    built = regraft.build_plan(regraft.read_plan(plan))
    ours, theirs = built.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(identical(ours[name], theirs[name]) for name in ours)
    flags = [(name, parameter.requires_grad) for name, parameter in built.named_parameters()]
    assert flags == [(name, parameter.requires_grad) for name, parameter in expected.named_parameters()]
    assert card_of(built).recipe == card_of(expected).recipe


def test_what_is_written_back_builds_the_same(plan: Path, tmp_path: Path) -> None:
    model = regraft.build_plan(regraft.read_plan(plan))
    saved = regraft.save(model, tmp_path / "edited.safetensors")
    printed = CliRunner().invoke(app, ["inspect", str(saved), "--plan"])
    assert printed.exit_code == 0
    again = tmp_path / "again.toml"
    again.write_text(printed.stdout)
    found = regraft.read_plan(again)
    assert found.edits == regraft.read_plan(plan).edits
    rebuilt = regraft.build_plan(found)
    flags = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in rebuilt.named_parameters() if not parameter.requires_grad} == flags


def test_the_command_writes_what_the_plan_says(plan: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["surgery", "--plan", str(plan), "--out", str(tmp_path / "out.safetensors")])
    assert ran.exit_code == 0, ran.output
    model = regraft.load(tmp_path / "out.safetensors")
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert not model.get_parameter("layer3.0.conv1.weight").requires_grad


def test_options_say_the_same_as_a_plan(tmp_path: Path) -> None:
    options = ["--weights", "none", "--truncate-drop", "1", "--append", "Linear(512,40)", "ReLU()", "Linear(40,3)"]
    out = tmp_path / "out.safetensors"
    ran = CliRunner().invoke(app, ["surgery", "resnet18", *options, "--freeze-until", "layer3.0", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert regraft.plan_of(regraft.load(out)).edits == regraft.plan_of(by_hand()).edits


def test_every_edit_has_an_option(tmp_path: Path) -> None:
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


def test_a_dry_run_shows_both_trees_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["surgery", "resnet18", "--truncate-after", "layer3", "--append", "5", "--dry-run"])
    assert ran.exit_code == 0, ran.output
    before, _, after = ran.stdout.partition("\nafter\n")
    assert "512×7×7" in before
    assert "layer4" not in after
    assert "1×5" in after
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source = ", "is not TOML"),
        ("weights = 'none'", "wrong at 'source': Field required"),
        ("source = 'resnet18'\nedit = []", "wrong at 'edit': Extra inputs are not permitted"),
        ("source = 'resnet18'\n[[edits]]\ncut = {}", "no edit 'cut', expected one of append, insert"),
        ("source = 'resnet18'\n[[edits]]\ntruncate = 1", "needs its arguments by name"),
        ("source = 'resnet18'\nedits = 3", "expected a list of edits"),
    ],
)
def test_a_wrong_plan_says_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        regraft.read_plan(path)


def test_a_plan_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no plan 'nowhere\.toml'"):
        regraft.read_plan("nowhere.toml")


def test_an_edit_that_does_not_fit_is_counted() -> None:
    plan = planned(edits=[{"truncate": {"drop": 1}}, {"append": {"layers": ["Linear(7, 2)"]}}])
    with pytest.raises(EditError, match=r"edit 2 of 2: cannot append .*\(1, 8\), and expects \(…, 7\)"):
        regraft.build_plan(plan)


def test_arguments_that_an_edit_does_not_take_are_named() -> None:
    plan = planned(edits=[{"truncate": {"last": 1}}])
    with pytest.raises(EditError, match=r"truncate\(last=1\) cannot be applied: .*'last'"):
        regraft.build_plan(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--append", "5"], "no model given"),
        (["resnet18", "Linear(3,3)", "--dry-run"], "needs --append before it"),
        (["resnet18", "--append", "5"], "no output file given"),
        (["resnet18", "--append", "5", "--out", "out.pt"], "does not end in .safetensors"),
        (["resnet18", "--append", "5", "--out", "no/out.safetensors"], "no folder 'no'"),
        (["resnet18", "--insert-after", "layer2", "--dry-run"], "is not of the form LAYER=NEW"),
        (["resnet18", "--truncate-after", "layer9", "--dry-run"], "no layer 'layer9' in ResNet. Nearest: 'layer"),
    ],
)
def test_wrong_options_exit_with_two_and_write_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["surgery", *options])
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_is_frozen_by_name_is_an_error_where_there_is_none() -> None:
    plan = planned(freeze={"layers": ["fc"]})
    with pytest.raises(SelectionError, match="no layer 'fc'"):
        regraft.build_plan(plan)

"""A plan says the same in Python, in TOML and on the command line."""

from pathlib import Path

import pytest
import torch

import regraft
from checkpoint.planned import by_hand, write_plan
from oracles import identical
from regraft.card import card_of
from regraft.errors import ConfigError, EditError, SelectionError


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path)


def planned(**entries: object) -> regraft.Plan:
    return regraft.Plan.model_validate({"source": "Sequential(Linear(4, 8), ReLU())", **entries})


def test_build_plan_builds_what_the_functions_build(plan: Path) -> None:
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
def test_read_plan_says_where_a_plan_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        regraft.read_plan(path)


def test_read_plan_says_that_a_plan_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no plan 'nowhere\.toml'"):
        regraft.read_plan("nowhere.toml")


def test_build_plan_counts_an_edit_that_does_not_fit() -> None:
    plan = planned(edits=[{"truncate": {"drop": 1}}, {"append": {"layers": ["Linear(7, 2)"]}}])
    with pytest.raises(EditError, match=r"edit 2 of 2: cannot append .*\(1, 8\), and expects \(…, 7\)"):
        regraft.build_plan(plan)


def test_build_plan_names_arguments_that_an_edit_does_not_take() -> None:
    plan = planned(edits=[{"truncate": {"last": 1}}])
    with pytest.raises(EditError, match=r"truncate\(last=1\) cannot be carried out: .*'last'"):
        regraft.build_plan(plan)


def test_build_plan_refuses_to_freeze_a_layer_where_there_is_none() -> None:
    plan = planned(freeze={"layers": ["fc"]})
    with pytest.raises(SelectionError, match="no layer 'fc'"):
        regraft.build_plan(plan)

"""A network from a training loop of one's own learns the names of its classes when it is saved."""

from pathlib import Path

import pytest
from torch import nn

import regraft
from regraft.errors import ArgumentError
from scene import Cli, assert_refused, only_json


@pytest.fixture
def own() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_save_with_classes_lets_predict_and_evaluate_name_them(own: nn.Sequential, cli: Cli, photos: Path) -> None:
    preprocessing = regraft.Preprocessing(size=24, resize=24, mean=(0.5,) * 3, std=(0.5,) * 3)
    regraft.save(own, "own.safetensors", classes=["cats", "dogs"], preprocessing=preprocessing)
    with pytest.raises(regraft.RegraftError, match=r"does not know its classes\. Name them when you save it"):
        regraft.predict(own, photos)  # itself it is as before
    model = regraft.load("own.safetensors")
    assert {prediction.label for prediction in regraft.predict(model, photos)} <= {"cats", "dogs"}
    answer = only_json(cli("evaluate", "own.safetensors", photos, "--json").stdout)
    assert [entry["name"] for entry in answer["per_class"]] == ["cats", "dogs"]
    with pytest.raises(ArgumentError, match="expected a name of its own for each output"):
        regraft.save(own, "own.safetensors", classes=["cats", "cats"])


def test_cli_predict_says_where_class_names_come_from(own: nn.Sequential, cli: Cli, photos: Path) -> None:
    regraft.save(own, "own.safetensors")
    assert_refused(cli("predict", "own.safetensors", photos), "does not know its classes", "`regraft train`")


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_cli_predict_and_evaluate_notice_swapped_arguments(
    command: str, own: nn.Sequential, cli: Cli, photos: Path
) -> None:
    regraft.save(own, "own.safetensors")
    result = cli(command, photos, "own.safetensors")
    assert_refused(result, "the checkpoint comes first", f"regraft {command} own.safetensors {photos}")

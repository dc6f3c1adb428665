"""What programs read: one JSON value on standard output and nothing else, whoever prints meanwhile; broken pipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scene import Cli, only_json

TALKATIVE = """
print("imported")

def loss(outputs, targets):
    print("called")
    import torch
    return torch.nn.functional.cross_entropy(outputs, targets)
"""


def test_cli_prints_one_json_value_for_every_command(
    cli: Cli, train_words: list[object], saved: Path, photos: Path, tiny_net: str
) -> None:
    (photos / "cats" / "bad.jpg").write_text("no photo")
    results = {
        "train": cli(*train_words, "--out", "run", "--json"),
        "evaluate": cli("evaluate", saved, photos, "--trust-code", "--json"),
        "predict": cli("predict", saved, photos, "--trust-code", "--json"),
        "inspect": cli("inspect", tiny_net, "--trust-code", "--json"),
        "inspect a file": cli("inspect", saved, "--trust-code", "--json"),
        "models": cli("models", "resnet1*", "--json"),
    }
    assert {name: result.exit_code for name, result in results.items()} == dict.fromkeys(results, 0)
    values = {name: only_json(result.stdout) for name, result in results.items()}
    assert {"checkpoint", "validation", "seconds", "epochs"} <= {*values["train"]}
    assert {"accuracy", "count", "per_class", "confusion"} <= {*values["evaluate"]}
    assert {*values["train"]["validation"]} == {*values["evaluate"]}
    assert [{*entry} for entry in values["predict"]] == [{"path", "label", "probability", "top"}] * 12
    for name in ("inspect", "inspect a file"):
        assert {"path", "type", "parameters", "trainable", "state", "output_shape"} <= {*values[name]["layers"][0]}
    assert values["models"] == ["resnet101", "resnet152", "resnet18"]
    for name in ("train", "evaluate", "predict"):
        assert "bad.jpg': not an image" in results[name].stderr


@pytest.mark.parametrize(
    "words", [("train", "no"), ("evaluate", "no", "no"), ("predict", "no", "no"), ("models", "zz9")]
)
def test_cli_prints_no_json_where_it_fails(words: tuple[str, ...], cli: Cli) -> None:
    result = cli(*words, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


def test_cli_train_sends_what_others_print_to_standard_error(cli: Cli, train_words: list[object]) -> None:
    Path("talkative.py").write_text(TALKATIVE)
    result = cli(*train_words, "--loss", "py:talkative.py:loss", "--out", "run", "--json")
    assert only_json(result.stdout)["checkpoint"] == "run/model.safetensors"
    assert "imported" in result.stderr
    assert "called" in result.stderr


def test_cli_train_as_a_process_prints_nothing_but_json(train_words: list[object]) -> None:
    words = [sys.executable, "-m", "regraft", *map(str, train_words), "--out", "run", "--json"]
    found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert only_json(found.stdout)["out"] == "run"
    assert found.stderr.splitlines()[0].startswith("photos ")


@pytest.mark.parametrize("pattern", ["*", "resnet18"], ids=["more than a buffer", "less than a buffer"])
def test_cli_models_takes_a_reader_that_leaves_for_no_failure(pattern: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        found = subprocess.run(
            [sys.executable, "-m", "regraft", "models", pattern], stdout=writing, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writing)
    assert (found.returncode, found.stderr) == (0, b"")


def test_cli_oracle_refuses_constants_that_json_lacks() -> None:
    with pytest.raises(AssertionError):
        only_json(json.dumps(float("nan")))

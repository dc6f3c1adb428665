"""`regraft train --config`: options from a file."""

import json
from pathlib import Path

import pytest
import torch

import regraft
from regraft.checkpoint import read_header
from regraft.errors import TrustError
from scene import Cli, assert_refused, listing, nothing_written, only_json


def test_cli_train_reproduces_a_run_bit_for_bit_from_the_written_options(cli: Cli, train_words: list[object]) -> None:
    words = ("--epochs", 2, "--augment", "standard", "--seed", 3, "--freeze", "conv", "--lr", 0.01)
    assert cli(*train_words, *words, "--out", "first").exit_code == 0
    again = cli("train", "--config", "first/config.toml", "--trust-code", "--out", "second")
    assert again.exit_code == 0, again.stderr
    first, second = (regraft.load(f"{name}/model.safetensors", trust_code=True) for name in ("first", "second"))
    assert [name for name, parameter in first.named_parameters() if not parameter.requires_grad] == ["conv.weight"]
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert Path("first/config.toml").read_text().replace("first", "second") == Path("second/config.toml").read_text()


def test_cli_train_flags_win_over_the_configuration(cli: Cli, train_words: list[object]) -> None:
    Path("options.toml").write_text('epochs = 7\nseed = 5\nfreeze = ["conv"]\naugment = "none"\n')
    result = only_json(cli(*train_words, "--config", "options.toml", "--seed", 6, "--out", "run", "--json").stdout)
    assert len(result["epochs"]) == 1
    assert {name: result["config"][name] for name in ("seed", "freeze", "augment")} == {
        "seed": 6,
        "freeze": ["conv"],
        "augment": "none",
    }


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"epoch = 3", ("no option 'epoch'", "Nearest: 'epochs'")),
        (b"[train]\nepochs = 3", ("no option 'train'", "--help")),
        (b'epochs = "many"', ("'epochs' cannot be 'many'", "valid integer")),
        (b'freeze = "conv"', ("'freeze' cannot be 'conv'", 'expected a list, as in ["layer1"')),
        (b"data = 3", ("'data' cannot be 3", "valid string")),
        (b"epochs = [", ("is not TOML", "Invalid value")),
        (b'model = "\xff"', ("is not TOML", "0xff")),
    ],
    ids=lambda value: value.decode("latin-1") if isinstance(value, bytes) else "",
)
def test_cli_train_refuses_a_bad_configuration(
    content: bytes, parts: tuple[str, ...], cli: Cli, train_words: list[object]
) -> None:
    Path("options.toml").write_bytes(content)
    with nothing_written():
        assert_refused(cli(*train_words, "--config", "options.toml"), "'options.toml'", *parts)


def test_cli_train_refuses_a_missing_configuration_or_no_data(cli: Cli, train_words: list[object]) -> None:
    with nothing_written():
        assert_refused(
            cli(*train_words, "--config", "no.toml"), "no configuration file 'no.toml' (looked from ", "Give the path"
        )
        assert_refused(cli("train"), "no data given", "regraft train photos/")


def test_cli_train_keeps_the_leave_to_import_nowhere(train_words: list[object], cli: Cli) -> None:
    result = cli(*train_words, "--out", "run")
    assert result.exit_code == 0, result.stderr
    for name, content in listing(Path("run")).items():
        assert content is None or b"trust" not in content, name
    assert "trust" not in read_header(Path("run/model.safetensors")).model_dump_json()
    with pytest.raises(TrustError):
        regraft.load("run/model.safetensors")


@pytest.mark.parametrize("option", ["trust_code = true", "trust-code = true", "overwrite = true"])
def test_cli_train_takes_no_leave_from_a_configuration(option: str, train_words: list[object], cli: Cli) -> None:
    Path("config.toml").write_text(option)
    with nothing_written():
        assert_refused(cli(*train_words[:2], "--config", "config.toml"), "no option '")


def test_cli_train_does_not_write_into_what_is_there_by_a_configuration(
    train_words: list[object], cli: Cli, workplace: Path
) -> None:
    full = workplace / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    (workplace / "link").symlink_to(full)
    for out in ("full", "link", "photos/../full", str(full)):
        Path("config.toml").write_text(f"out = {json.dumps(out)}")
        with nothing_written(full):
            assert_refused(cli(*train_words, "--config", "config.toml"), "exists and is not empty", "--overwrite")

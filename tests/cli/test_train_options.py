"""One list of options: `fit`, `regraft train --help` and the table of the docs are generated from `TrainOptions`.

REGRAFT_WRITE_OPTIONS=1 (`make options`) writes the table into the page.
"""

import inspect
import os
import re
from pathlib import Path
from typing import get_args

import pytest

from regraft.cli.train import train
from regraft.train_options import list_options
from regraft.training.config import TrainConfig

PAGE = Path(__file__).parents[2] / "docs/training.md"
HEAD = "| option | default | what it does |\n|---|---|---|\n"
OF_THE_COMMAND = {"overwrite", "resume", "trust_code", "config", "dry_run", "verbose", "as_json", "heat_maps"}
IN_WORDS = {  # defaults that depend on something else
    "lr": "depends on the trained layers",
    "backbone_lr": "as --lr; a twentieth with --unfreeze",
    "loss": "by task",
    "views": "a new one each epoch",
    "workers": "automatic",
    "image_size": "the model's",
    "out": "runs/DATA-1, -2, …",
    "cache": "on",
    "fast": "fast",
}


def help_texts() -> dict[str, str]:
    """Return the help of each option of `regraft train`, by its name in Python."""
    signature = inspect.signature(train)
    return {name: get_args(entry.annotation)[1].help for name, entry in signature.parameters.items()}


def options_table() -> str:
    """Return the table of options for the page of training."""
    rows = [
        f"| `{option.flags.replace('/', '`, `')}` | {option.default_text or 'none'} | {option.description} |\n"
        for option in list_options()
        if option.name != "data"
    ]
    return HEAD + "".join(rows)


def test_cli_train_takes_every_field_of_train_config() -> None:
    assert set(help_texts()) - OF_THE_COMMAND == set(TrainConfig.model_fields)


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_cli_train_help_states_the_default_of_train_config(name: str) -> None:
    default = TrainConfig.model_fields[name].default
    stated = re.search(r"\[default: (.*)\]", help_texts()[name])
    if stated is None:
        assert not default  # None, False, or nothing
    elif name in IN_WORDS:
        assert stated[1] == IN_WORDS[name]
    else:
        assert stated[1] == (f"{default:g}" if isinstance(default, (int, float)) else default)


def test_cli_train_page_has_the_generated_table() -> None:
    text = PAGE.read_text()
    start = text.index(HEAD)
    end = text.index("\n\n", start) + 1
    if "REGRAFT_WRITE_OPTIONS" in os.environ:
        PAGE.write_text(text[:start] + options_table() + text[end:])
    else:
        assert text[start:end] == options_table(), "`make options` writes the table"


@pytest.mark.parametrize("name", sorted(set(TrainConfig.model_fields) - {"data"}))
def test_cli_train_options_are_all_named_on_the_page_of_training(name: str) -> None:
    assert f"--{name.replace('_', '-')}" in PAGE.read_text()


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_train_config_documents_every_field(name: str) -> None:
    assert re.search(rf"^        {name}: ", TrainConfig.__doc__ or "", re.MULTILINE)

"""`regraft train` refuses what cannot work, as `fit` does, and writes nothing."""

from pathlib import Path

import pytest

from regraft.errors import ConfigError, LossError
from scene import Cli, Fit, assert_refused, nothing_written


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("vector", r"the loss returned a tensor of shape \(4,\), expected one number\. Reduce it"),
        ("number", r"the loss returned a float, expected a tensor with one number"),
        (
            "nan",
            r"epoch 1: the loss is nan at step 1 of this epoch \(learning rate .*\)\. Every layer.*Nothing was writ",
        ),
    ],
)
def test_fit_and_cli_train_stop_at_a_loss_that_is_no_finite_number(
    loss: str, message: str, net_file: Path, cli: Cli, fit: Fit, train_words: list[object]
) -> None:
    with nothing_written(), pytest.raises(LossError, match=message):
        fit(loss=f"py:{net_file}:{loss}", out="run")
    with nothing_written():
        assert cli(*train_words, "--loss", f"py:{net_file}:{loss}", "--out", "run").exit_code == 2


def test_cli_train_says_when_a_learning_rate_explodes_and_what_to_try(cli: Cli, train_words: list[object]) -> None:
    with nothing_written():
        result = cli(*train_words, "--lr", 1e30, "--out", "run")
        assert_refused(
            result,
            "epoch 1: the loss is nan at step 2 of this epoch (learning rate 1e+30)",
            "Try a tenth of the learning rate",
            "Nothing was written",
        )


def test_fit_and_cli_train_leave_a_used_output_folder_alone(fit: Fit, cli: Cli, train_words: list[object]) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    with nothing_written():
        assert_refused(cli(*train_words, "--out", "run"), "'run' exists and is not empty", "--out", "--overwrite")
    with nothing_written(), pytest.raises(ConfigError, match="exists and is not empty"):
        fit(out="run")


def test_fit_and_cli_refuse_a_name_too_long_for_a_folder_before_training(fit: Fit, cli: Cli) -> None:
    Path("taken").write_text("mine")
    with nothing_written(), pytest.raises(ConfigError, match=r"cannot be a folder for the results: .*Choose another"):
        fit(out="x" * 5000)
    with nothing_written():
        assert_refused(cli("train", "x" * 5000), "the data is 'xxx", "a name of more than 255 bytes")
        assert_refused(cli("train", "photos", "--config", "x" * 5000), "cannot be used as a path: File name too long")
        assert_refused(cli("demo", "--out", "taken/demo"), "cannot be used as a path: Not a directory")
        assert_refused(cli("inspect", "x" * 5000), "no model 'xxx")


@pytest.mark.parametrize("words", [("train", "--epochs", "x"), ("predict",), ("no-such-command",), ("train", "--nope")])
def test_cli_exits_with_2_on_bad_usage(words: tuple[str, ...], cli: Cli) -> None:
    with nothing_written():
        result = cli(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr

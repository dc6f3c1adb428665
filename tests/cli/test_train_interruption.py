"""`regraft train` that is stopped: by Ctrl-C, by SIGTERM, by another run; and `--resume`."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.testing

import regraft
from regraft.errors import Interrupted
from report.results import Page
from scene import TINY_NET, Cli, Fit, assert_refused, interrupting, listing, nothing_written, only_json, results


@pytest.mark.parametrize(
    "phase", ["regraft.data.photos.decode_all", "regraft.training.heads.model_for_data.create_model"]
)
def test_cli_train_interrupted_before_training_begins_writes_nothing(
    phase: str, cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(phase, stop)
    with nothing_written():
        result = cli(*train_words, "--out", "run")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "stopped by Ctrl-C. Nothing was written."


def test_cli_train_interrupted_in_the_report_says_where_the_model_is(
    cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regraft.report.write_report", stop)
    result = cli(*train_words, "--out", "run")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "stopped by Ctrl-C. The model is kept in 'run/model.safetensors'."
    assert Path("run/model.safetensors").exists()


SLOW_LOSS = """
import time
import torch

def slow(outputs, targets):
    time.sleep(0.02)
    return torch.nn.functional.cross_entropy(outputs, targets)
"""


def test_cli_train_keeps_everything_at_a_real_signal_and_the_printed_command_goes_on(
    cli: Cli, train_words: list[object]
) -> None:
    Path("slow.py").write_text(SLOW_LOSS)
    words = [*train_words, "--epochs", 40, "--loss", "py:slow.py:slow", "--out", "my run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "regraft", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    try:
        while not process.stderr.readline().startswith("epoch "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (130, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("stopped by Ctrl-C. The best so far (epoch ")
    assert "is kept in 'my run/model.safetensors'. To continue: " in last
    assert "Traceback" not in stderr
    Path("tiny_net.py").write_text(TINY_NET)  # a checkpoint names the file, and it is looked for here
    assert (
        regraft.evaluate(regraft.load("my run/model.safetensors", trust_code=True), "photos").count == 2
    )  # those held out
    command = shlex.split(last.partition("To continue: ")[2])
    assert command == ["regraft", "train", "--resume", "my run", "--trust-code"]
    found = cli(*command[1:], "--json")
    assert found.exit_code == 0, found.stderr
    assert len(only_json(found.stdout)["epochs"]) == 40
    assert {*listing(Path("my run"))} == {"model.safetensors", "metrics.csv", "config.toml", "report.html"}


TERMINATED = """
import signal
import torch

calls = []

def loss(outputs, targets):
    calls.append(1)
    if len(calls) == 6:
        signal.raise_signal(signal.SIGTERM)
    return torch.nn.functional.cross_entropy(outputs, targets)
"""


def test_cli_train_exits_with_143_at_sigterm_and_keeps_everything(cli: Cli, train_words: list[object]) -> None:
    Path("term.py").write_text(TERMINATED)
    result = cli(*train_words, "--epochs", 3, "--loss", "py:term.py:loss", "--out", "run")
    assert (result.exit_code, result.stdout) == (143, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM. The best so far (epoch 1, ")
    assert last.endswith("To continue: regraft train --resume run --trust-code")
    assert "report     run/report.html" in result.stderr.splitlines()
    assert results() == {"model.safetensors", "metrics.csv", "config.toml", "report.html"}
    page = Page(Path("run/report.html").read_text())
    assert "stopped after 1 of 3 epochs, by SIGTERM. The figures are those of the best epoch so far." in page.text
    assert page.text.count("regraft train --resume run ") == 2
    assert "trust" not in page.source  # no file keeps the leave to import code
    result = cli("train", "--resume", "run", "--trust-code", "--json")
    assert "stopped" not in Path("run/report.html").read_text()
    assert len(only_json(result.stdout)["epochs"]) == 3
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml", "report.html"}


RAISING = """
import torch

calls = []

def loss(outputs, targets):
    calls.append(1)
    if len(calls) == 6:
        raise ValueError("a bug in the loss")
    return torch.nn.functional.cross_entropy(outputs, targets)
"""


def test_cli_train_reports_what_a_crash_has_left(cli: Cli, train_words: list[object]) -> None:
    Path("raising.py").write_text(RAISING)
    words = (*train_words, "--epochs", 3, "--checkpoint-minutes", 0, "--loss", "py:raising.py:loss", "--out", "run")
    result = cli(*words)
    assert isinstance(result.exception, ValueError)
    best, hint = result.exception.__notes__
    assert best.startswith("The best so far (epoch 1, accuracy ")
    assert hint == "To continue: regraft train --resume run --trust-code"
    page = Page(Path("run/report.html").read_text())
    assert "stopped after 1 of 3 epochs, by ValueError: a bug in the loss." in page.text


def test_cli_train_interrupted_again_leaves_out_the_report(
    cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Path("term.py").write_text(TERMINATED)
    monkeypatch.setattr("regraft.report.write_report", stop)
    result = cli(*train_words, "--epochs", 3, "--loss", "py:term.py:loss", "--out", "run")
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1].startswith("stopped by SIGTERM. The best so far (epoch 1, ")
    assert results() == {"model.safetensors", "metrics.csv", "config.toml"}


def test_cli_train_leaves_nothing_at_sigterm_before_training(
    cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("regraft.training.heads.model_for_data.create_model", stop)
    with nothing_written():
        result = cli(*train_words, "--out", "run")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (143, "stopped by SIGTERM. Nothing was written.")


def test_fit_and_cli_train_say_what_cannot_be_continued(cli: Cli, fit: Fit, train_words: list[object]) -> None:
    with nothing_written():
        assert_refused(cli("train", "--resume", "nowhere"), "nothing to continue: there is no folder 'nowhere'")
        assert_refused(cli("train", "--resume", "photos"), "nothing to continue: no run has begun in 'photos'")
        for words in (("photos",), ("--epochs", 3), ("--overwrite",), ("--config", "x.toml"), ("--freeze", "conv")):
            assert_refused(
                cli("train", "--resume", "photos", *words),
                "--resume continues a run with its own options: leave out ",
                "DATA" if words == ("photos",) else str(words[0]),
            )
    assert cli(*train_words, "--out", "run").exit_code == 0
    with nothing_written():
        assert_refused(
            cli("train", "--resume", "run"), "the run in 'run' has ended: its model is 'run/model.safetensors'"
        )
    with pytest.raises(Interrupted):
        fit(loss=interrupting(2), out="python")
    with nothing_written():
        assert_refused(
            cli("train", "--resume", "python"), "begun in Python", "regraft.fit(…, out='python', resume=True)"
        )


def test_cli_train_refuses_two_runs_in_one_folder(cli: Cli, fit: Fit, train_words: list[object]) -> None:
    refused: list[typer.testing.Result] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not refused:
            refused.append(cli(*train_words, "--out", "run", "--overwrite"))
        return torch.nn.functional.cross_entropy(outputs, targets)

    fit(loss=loss, out="run")
    assert_refused(refused[0], f"another run is writing into 'run': process {os.getpid()}", "--out FOLDER")
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}

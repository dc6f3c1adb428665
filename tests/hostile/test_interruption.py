"""Ctrl-C at every moment: the best weights so far are kept, or nothing was written; never anything between."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.testing
from scene import listing, nothing_written

import regraft
from regraft.errors import Interrupted

Cli = Callable[..., typer.testing.Result]
Fit = Callable[..., regraft.FitResult]

STEPS = 3  # of an epoch


def interrupting(step: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a loss that stops the run at a step, counted from 1 over all epochs."""
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1 + step:  # the first call tries a batch
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(outputs, targets)

    return loss


@pytest.mark.parametrize("step", [0, 1, 2, STEPS])
def test_nothing_is_written_before_the_first_epoch_is_complete(step: int, fit: Fit) -> None:
    with nothing_written(), pytest.raises(KeyboardInterrupt) as caught:
        fit(loss=interrupting(step), epochs=3, out="run")
    if step:
        assert str(caught.value) == "stopped by Ctrl-C. Nothing was written: no epoch was complete."


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_the_best_epoch_so_far_is_kept(step: int, fit: Fit) -> None:
    options = {"seed": 4, "schedule": "constant"}  # whose first epoch does not depend on how many there are
    message = r"^stopped by Ctrl-C\. The best so far \(epoch 1, accuracy .*\) is kept in 'run/model\.safetensors'\.$"
    with pytest.raises(Interrupted, match=message):
        fit(loss=interrupting(step), epochs=3, out="run", **options)
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 2
    one_epoch = fit(epochs=1, **options).model.state_dict()
    for name, tensor in regraft.load("run/model.safetensors", trust_code=True).state_dict().items():
        assert torch.equal(tensor, one_epoch[name]), name


def test_the_best_epoch_is_kept_in_the_module_where_nothing_is_written(fit: Fit, tiny_net: str) -> None:
    model = regraft.create_model(tiny_net, weights="none", num_classes=2, trust_code=True)
    with (
        nothing_written(),
        pytest.raises(Interrupted, match=r"The best so far \(epoch 1, .*\) is kept in the model\.$"),
    ):
        fit(model=model, loss=interrupting(STEPS + 2), epochs=3)


@pytest.mark.parametrize("moment", ["regraft.training.run_folder.save", "regraft.training.run_folder.write_config"])
def test_an_interruption_while_saving_still_keeps_the_epoch(
    moment: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.training import run_folder

    original = getattr(run_folder, moment.rpartition(".")[2])
    calls = []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(moment, interrupted)
    with pytest.raises(Interrupted, match=r"epoch 1, .* is kept in 'run/model\.safetensors'"):
        fit(epochs=3, out="run")
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}
    assert regraft.evaluate(regraft.load("run/model.safetensors", trust_code=True), "photos").count == 12


def test_old_results_survive_an_interruption_of_the_first_epoch(cli: Cli, fit: Fit, train_words: list[object]) -> None:
    assert cli(*train_words, "--out", "run").exit_code == 0
    with nothing_written(), pytest.raises(Interrupted):
        fit(loss=interrupting(2), out="run", overwrite=True)


@pytest.mark.parametrize("phase", ["regraft.data.photos.decode_all", "regraft.training.prepare.create_model"])
def test_an_interruption_before_training_writes_nothing(
    phase: str, cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(phase, stop)
    with nothing_written():
        result = cli(*train_words, "--out", "run")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "stopped by Ctrl-C. Nothing was written."


def test_an_interruption_of_the_report_says_where_the_model_is(
    cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
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


def test_a_real_signal_keeps_the_best_and_exits_with_130(train_words: list[object], workplace: Path) -> None:
    Path("slow.py").write_text(SLOW_LOSS)
    words = [*train_words, "--epochs", 10_000, "--loss", "py:slow.py:slow", "--out", "run"]
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
    assert last.endswith("is kept in 'run/model.safetensors'.")
    assert "Traceback" not in stderr
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}
    assert regraft.evaluate(regraft.load("run/model.safetensors", trust_code=True), "photos").count == 12

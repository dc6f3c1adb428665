"""Ctrl-C at every moment: the best weights so far and the state to go on from are kept; never anything between."""

from pathlib import Path

import pytest
import torch

import regraft
from regraft.errors import Interrupted, LossError
from scene import Cli, Fit, interrupting, listing, nothing_written, results

STEPS = 3  # of an epoch


def test_fit_interrupted_before_training_writes_nothing(fit: Fit) -> None:
    with nothing_written(), pytest.raises(KeyboardInterrupt):
        fit(loss=interrupting(0), epochs=3, out="run")


@pytest.mark.parametrize("step", [1, 2, STEPS])
def test_fit_interrupted_before_the_first_epoch_is_complete_keeps_its_beginning(step: int, fit: Fit) -> None:
    with pytest.raises(Interrupted) as caught:
        fit(loss=interrupting(step), epochs=3, out="run")
    assert str(caught.value) == (
        "stopped by Ctrl-C. No epoch was complete. To continue: the same call of fit with resume=True"
    )
    assert {*listing(Path("run"))} == {"last", "last/state-000001-000000000.safetensors"}
    assert len(fit(loss=interrupting(1000), epochs=3, out="run", resume=True).history) == 3


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_fit_interrupted_keeps_the_best_epoch_so_far(step: int, fit: Fit) -> None:
    options = {"seed": 4, "schedule": "constant"}  # whose first epoch does not depend on how many there are
    message = (
        r"^stopped by Ctrl-C\. The best so far \(epoch 1, accuracy .*\) is kept in 'run/model\.safetensors'\. To c"
    )
    with pytest.raises(Interrupted, match=message):
        fit(loss=interrupting(step), epochs=3, out="run", **options)
    assert results() == {"model.safetensors", "metrics.csv", "config.toml"}
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 2
    one_epoch = fit(epochs=1, **options).model.state_dict()
    for name, tensor in regraft.load("run/model.safetensors", trust_code=True).state_dict().items():
        assert torch.equal(tensor, one_epoch[name]), name


def test_fit_interrupted_keeps_the_best_epoch_in_the_module_where_nothing_is_written(fit: Fit, tiny_net: str) -> None:
    model = regraft.create_model(tiny_net, weights="none", num_classes=2, trust_code=True)
    with (
        nothing_written(),
        pytest.raises(Interrupted, match=r"The best so far \(epoch 1, .*\) is kept in the model\.$"),
    ):
        fit(model=model, loss=interrupting(STEPS + 2), epochs=3)


@pytest.mark.parametrize(
    "moment", ["regraft.training.resume.run_folder.write_model", "regraft.training.resume.run_folder.write_config"]
)
def test_fit_interrupted_while_saving_still_keeps_the_epoch(
    moment: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.training.resume import run_folder

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
    assert results() == {"model.safetensors", "metrics.csv", "config.toml"}
    assert regraft.evaluate(regraft.load("run/model.safetensors", trust_code=True), "photos").count == 2


def test_fit_interrupted_in_the_first_epoch_leaves_old_results(cli: Cli, fit: Fit, train_words: list[object]) -> None:
    assert cli(*train_words, "--out", "run").exit_code == 0
    before = listing(Path("run"))
    with pytest.raises(Interrupted):
        fit(loss=interrupting(2), out="run", overwrite=True)
    assert {name: content for name, content in listing(Path("run")).items() if not name.startswith("last")} == before


def test_fit_takes_the_lock_of_a_process_that_was_killed_for_no_obstacle(fit: Fit) -> None:
    Path("run").mkdir()
    Path("run/run.lock").write_text("999999")
    fit(out="run")
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}


def test_fit_removes_folders_that_were_made_for_nothing(fit: Fit) -> None:
    with nothing_written(), pytest.raises(LossError):
        fit(loss=lambda outputs, targets: outputs.sum() * float("nan"), out="some/where/else")

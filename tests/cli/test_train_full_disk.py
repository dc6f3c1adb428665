"""A disk that fills up while results are written: an error that says so, and no half of a file."""

import errno
from pathlib import Path

import pytest

import regraft
from regraft.errors import RunError
from scene import Cli, Fit, assert_refused, listing, nothing_written


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_file(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half")
    full()


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("safetensors.torch.save_file", set()),
        ("os.fsync", set()),
        ("regraft.training.resume.run_folder.write_config", {"model.safetensors", "report.html"}),
        ("csv.DictWriter.writerows", {"model.safetensors", "config.toml", "report.html"}),
    ],
)
def test_cli_train_leaves_what_was_written_before_the_disk_was_full_whole(
    place: str, kept: set[str], cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, half_a_file if place.endswith("save_file") else full)
    assert_refused(cli(*train_words, "--out", "run"), "cannot write", "'run", "No space left on device", code=1)
    assert {*listing(Path("run"))} == kept
    if kept:
        regraft.load("run/model.safetensors", trust_code=True)


@pytest.mark.parametrize("place", ["safetensors.torch.save_file", "os.fsync"])
def test_fit_leaves_old_results_where_the_disk_is_full(
    place: str, cli: Cli, fit: Fit, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*train_words, "--out", "run").exit_code == 0
    monkeypatch.setattr(place, half_a_file if place.endswith("save_file") else full)
    with nothing_written(), pytest.raises(RunError, match=r"cannot write 'run/model\.safetensors': .*No space left"):
        fit(out="run", overwrite=True, seed=1)


def test_cli_train_says_without_a_traceback_that_a_report_cannot_be_written(
    cli: Cli, train_words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.report.write_report", full)
    assert_refused(cli(*train_words, "--out", "run"), "No space left on device", code=1)
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}

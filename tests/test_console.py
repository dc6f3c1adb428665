"""What `fit`, `evaluate` and `predict` show by default: lines in a log, bars in a terminal and in a notebook."""

import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import regraft
from regraft import Progress
from regraft.console import ConsoleProgress, NotebookProgress, progress_of
from regraft.progress import SILENT

EPOCHS = 3


def run(**options: Any) -> regraft.FitResult:
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    return regraft.fit(nn.Linear(4, 2), (data, data), epochs=EPOCHS, batch_size=4, lr=1e-3, **options)


@pytest.mark.parametrize("options", [{}, {"progress": True}])
def test_fit_writes_a_line_an_epoch_and_no_bar_into_a_log(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as the logs of some CI services do
    run(**options)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert "\x1b[2K" not in err
    assert [line[:9] for line in err.splitlines() if "epoch " in line] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert len(err.splitlines()) <= EPOCHS + 5


def test_fit_and_evaluate_are_silent_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model = run(progress=False).model
    regraft.evaluate(model, [(torch.randn(4, 4), torch.arange(4) % 2)], progress=False)
    assert capsys.readouterr() == ("", "")


class Steps(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int | None, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        passed = []
        for item in items:
            yield item
            passed.append(item)
        self.steps.append((description, total, len(passed)))


def test_progress_of_ones_own_gets_the_lines_and_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    own = Steps()
    model = run(progress=own).model
    assert [line[:9] for line in own.lines if line.startswith("epoch")] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    trained = [(name[:9], *counts) for name, *counts in own.steps if name.startswith("epoch")]
    assert trained == [(f"epoch {epoch}/3", 2, 2) for epoch in (1, 2, 3)]
    regraft.evaluate(model, [(torch.randn(4, 4), torch.arange(4) % 2)], progress=own)
    assert own.steps[-1] == ("evaluating", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_progress_of_true_and_false_is_the_screen_and_silence() -> None:
    assert isinstance(progress_of(True), ConsoleProgress)
    assert progress_of(False) is SILENT
    assert progress_of(own := Steps()) is own


def test_console_progress_draws_a_bar_in_a_terminal_and_removes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("regraft.console.screen_width", lambda stream: 80)
    monkeypatch.setenv("TERM", "xterm")
    assert list(ConsoleProgress().track(range(3), "counting")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err
    assert "3/3" in err


class Output:
    """Stands for IPython's output with a display id."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, forms: dict[str, str], *, raw: bool, display_id: bool) -> "Output":
        assert raw
        assert display_id
        assert not self.shown  # one output for all bars
        self.update(forms, raw=raw)
        return self

    def update(self, forms: dict[str, str], *, raw: bool) -> None:
        self.shown.append(forms)


def test_notebook_progress_draws_all_bars_in_one_output_and_escapes_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, module = Output(), types.ModuleType("IPython.display")
    module.display = output.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    progress = NotebookProgress()
    assert list(progress.track(range(100), "fast")) == list(range(100))
    assert output.shown == []  # a step that is over at once has no bar
    monkeypatch.setattr("regraft.console.NOTEBOOK_BAR_S", 0.0)
    for name in ("<b>", "two"):
        list(progress.track([1, 2], name))
    with progress.status("outer"):
        list(progress.track([1], "inner"))
    progress.say("epoch 1/2 [bold]")
    first = '&lt;b&gt; <progress value="0" max="2"></progress> 0/2'
    assert output.shown[0] == {"text/html": first, "text/plain": "<b> 0/2"}
    assert [forms["text/plain"] for forms in output.shown] == [
        *("<b> 0/2", "<b> 1/2", "", "two 0/2", "two 1/2", ""),
        *("outer …", "inner 0/1", "outer …", ""),
    ]
    assert capsys.readouterr() == ("epoch 1/2 [bold]\n", "")

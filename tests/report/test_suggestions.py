"""What to do next: each suggestion stands in the page exactly where its condition holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft.report.suggestions import Suggestion, suggest_after_evaluation, suggest_after_run
from regraft.training.metrics import Scores, measure
from regraft.training.result import EpochRecord, FitResult
from report.results import classified, plan, regressed

PRETRAINED = {"weights": "IMAGENET1K_V1", "counts": (("ant", 20, 30), ("bee", 500, 30))}


def result_of(losses: list[tuple[float, float]], folder: Path, **config: object) -> FitResult:
    """Return a run with these training and validation losses, whose last epoch is the best and without mistakes."""
    targets = torch.arange(60) % 2
    outputs = 4.0 * nn.functional.one_hot(targets, 2)
    metrics = measure(outputs, targets, ("ant", "bee"))
    history = tuple(
        EpochRecord(epoch, train, replace(metrics, loss=loss), 0.1, 1.0)
        for epoch, (train, loss) in enumerate(losses, 1)
    )
    result = classified(("ant", "bee"), history=history, best_epoch=len(losses), out=folder / "a run", is_named=True)
    result = replace(result, outputs=outputs, targets=targets, validation=history[-1].validation)
    config = {"data": "photos", "epochs": len(losses), **config}
    named = plan(result.model, ("ant", "bee"), 60, **PRETRAINED)
    return replace(result, config=result.config.updated(**config), plan=named)


def suggestions(result: FitResult) -> list[Suggestion]:
    return suggest_after_run(result, Scores(result.outputs, result.targets, result.paths))


def commands(result: FitResult) -> list[str]:
    return [entry.command or "" for entry in suggestions(result)]


def test_suggest_after_run_is_silent_where_nothing_stands_out(tmp_path: Path) -> None:
    assert suggestions(result_of([(0.2, 0.3), (0.2, 0.3), (0.2, 0.3)], tmp_path)) == []


@pytest.mark.parametrize(("count", "is_few"), [(19, True), (20, False)])
def test_suggest_after_run_names_classes_of_few_photos(count: int, is_few: bool, tmp_path: Path) -> None:
    result = result_of([(0.2, 0.3)], tmp_path)
    result = replace(result, plan=replace(result.plan, counts=(("ant", count, 3), ("bee", 500, 3))))
    found = suggestions(result)
    assert bool(found) == is_few
    if is_few:
        assert found[0].finding == "Few photos to learn from, under 20: ant (19)."
        out = f"{tmp_path}/a run"
        assert found[0].command == f"regraft train --config '{out}/config.toml' --out '{out}-more'"


def test_suggest_after_run_trains_longer_while_the_loss_still_falls(tmp_path: Path) -> None:
    falling = [(0.4, 0.5), (0.4, 0.5), (0.4, 0.48)]
    assert " --epochs 6 " in commands(result_of(falling, tmp_path))[0]
    assert commands(result_of([*falling[:2], (0.4, 0.497)], tmp_path)) == []
    scheduled = result_of(falling, tmp_path, unfreeze="head:1,all:2")
    assert " --unfreeze head:1,all:4 " in commands(scheduled)[0]
    assert commands(replace(scheduled, best_epoch=2)) == []


def test_suggest_after_run_varies_photos_that_are_learned_by_heart(tmp_path: Path) -> None:
    apart = [(0.1, 0.31)]
    assert " --augment standard " in commands(result_of(apart, tmp_path))[0]
    assert " --mixup 0.2 " in commands(result_of(apart, tmp_path, augment="trivial"))[0]
    assert commands(result_of(apart, tmp_path, label_smoothing=0.1)) == []
    assert commands(result_of([(0.1, 0.29)], tmp_path)) == []
    assert commands(result_of([(0.3, 0.55)], tmp_path)) == []


def test_suggest_after_run_fine_tunes_a_frozen_network_that_makes_mistakes(tmp_path: Path) -> None:
    result = classified(("ant", "bee"), out=tmp_path, is_named=True)
    result = replace(result, plan=plan(result.model, ("ant", "bee"), 60, **PRETRAINED))
    assert any(f"--unfreeze head:3,all:5 --out {tmp_path}-fine-tuned" in command for command in commands(result))
    in_python = [entry.command for entry in suggestions(replace(result, is_named=False))]
    assert "regraft.fit(model, data, unfreeze='head:3,all:5')" in in_python
    chosen = replace(result, config=result.config.updated(freeze_until="0"))
    assert not any("--unfreeze" in command for command in commands(chosen))


def test_suggest_after_run_resumes_a_stopped_one_and_nothing_else(tmp_path: Path) -> None:
    result = replace(
        result_of([(0.1, 0.4)], tmp_path, epochs=9), stopped_by="Ctrl-C", to_continue="regraft train --resume x"
    )
    (found,) = suggestions(result)
    assert found.finding == "The run was stopped by Ctrl-C after 1 of 9 epochs."
    assert found.command == "regraft train --resume x"


def test_suggest_after_evaluation_names_pairs_of_classes_that_are_mixed_up() -> None:
    targets = torch.tensor([0] * 30 + [1] * 30)
    predicted = targets.clone()
    predicted[:3] = 1  # three of thirty: a tenth
    predicted[30:32] = 0  # two: may be chance
    outputs = nn.functional.one_hot(predicted, 3).float()
    paths = tuple(Path(f"my photos/{index}.jpg") for index in range(60))
    metrics = measure(outputs, targets, ("ant", "bee", "wasp"))
    pair, missing = suggest_after_evaluation(metrics, Scores(outputs, targets, paths, checkpoint="m.safetensors"))
    assert pair.finding == "“ant” was taken for “bee” 3 times of 30."
    files = "'my photos/0.jpg' 'my photos/1.jpg' 'my photos/2.jpg'"
    assert pair.command == f"regraft predict m.safetensors {files} --top 2"
    assert missing.finding == "wasp has no photos here."
    assert suggest_after_evaluation(metrics, Scores(outputs, targets))[0].command is None


def test_suggest_after_run_of_a_regression_speaks_of_no_classes() -> None:
    assert suggestions(regressed(50)) == []

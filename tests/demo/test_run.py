"""The demonstration: each way is measured with each seed, and its page shows the figures."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regraft
from regraft.card import card_of
from regraft.demo import DemoResult, run_demo, write_demo_report

METHODS = ["from scratch", "head only", "first half frozen", "all layers"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, shots=(1, 10), seeds=2)


def test_run_demo_measures_each_way_with_each_seed(measured: tuple[Path, DemoResult]) -> None:
    folder, result = measured
    assert [(outcome.method, outcome.shots) for outcome in result.outcomes] == [
        (method, shots) for method in METHODS for shots in (1, 10)
    ]
    held_out = len([*(folder / "target/val").rglob("*.png")])
    assert result.held_out == held_out > 0
    for outcome in result.outcomes:
        assert len(outcome.accuracies) == len(outcome.seconds) == 2
        assert all(
            (accuracy * held_out) == pytest.approx(round(accuracy * held_out)) for accuracy in outcome.accuracies
        )
        assert outcome.accuracy == pytest.approx((np.mean(outcome.accuracies), np.std(outcome.accuracies, ddof=1)))


def test_run_demo_is_better_with_more_images(measured: tuple[Path, DemoResult]) -> None:
    mean = {(outcome.method, outcome.shots): outcome.accuracy[0] for outcome in measured[1].outcomes}
    assert all(mean[method, 10] > max(mean[method, 1], 0.5) for method in METHODS)


def test_run_demo_saves_the_network_that_it_measured(measured: tuple[Path, DemoResult]) -> None:
    folder, result = measured
    model = regraft.load(result.checkpoint)
    model.eval()
    right = count = 0
    for label, name in enumerate(sorted(path.name for path in (folder / "source/val").iterdir())):
        for file in (folder / "source/val" / name).iterdir():
            pixels = torch.from_numpy(np.array(Image.open(file), dtype=np.float32)) / 255
            mean, std = (torch.tensor(values) for values in normalization(model))
            with torch.no_grad():
                scores = model((pixels[None, None] - mean) / std)
            right, count = right + int(scores.argmax() == label), count + 1
    assert result.source.accuracy == pytest.approx(right / count)


def normalization(model: torch.nn.Module) -> tuple[float, float]:
    preprocessing = card_of(model).preprocessing
    assert preprocessing is not None
    return preprocessing.mean[0], preprocessing.std[0]


def test_write_demo_report_shows_every_figure(measured: tuple[Path, DemoResult], tmp_path: Path) -> None:
    page = write_demo_report(measured[1], tmp_path).read_text()
    for outcome in measured[1].outcomes:
        assert outcome.method in page
        assert f"{outcome.accuracy[0]:.3f}" in page or f"{100 * outcome.accuracy[0]:.1f}" in page
    assert not re.search(r'(?:src|href)="https?://', page)

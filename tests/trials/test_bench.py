"""What the runs of a grid share: photos and features."""

import itertools
from pathlib import Path

import pytest
import torch

from regraft.data import photos as photos_module
from regraft.data.folders import list_data
from regraft.data.photos import Photos
from regraft.progress import SILENT
from regraft.training.config import TrainConfig
from regraft.training.fitting import fit
from regraft.training.result import FitResult
from regraft.trials.bench import open_bench, share_features
from regraft.trials.cells import draw
from regraft.trials.ways import stage_config


def test_share_features_lets_runs_on_a_subset_find_what_they_would_compute(
    learned: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, weights, photos = learned
    config = TrainConfig(weights=str(weights), batch_size=4)
    bench = open_bench(name, list_data(photos), config, SILENT, trust_code=True)
    monkeypatch.setattr(photos_module, "decode", None)  # no photo is decoded again
    monkeypatch.setattr(photos_module, "decode_all", None)
    settings = stage_config(config, {"epochs": 2}, seed=1)
    few = bench.train.subset(draw(bench.targets, "2", 1))

    def run(train: Photos = few) -> FitResult:
        return fit(bench.network(settings).model, (train, bench.validation), config=settings, progress=False)

    before = run()
    assert before.computed_once is not None
    assert not before.computed_once.was_found
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "other"))
    share_features(bench, [("2", 1), ("all", 1)], SILENT)
    after = run()
    assert after.computed_once is not None
    assert after.computed_once.was_found
    assert torch.allclose(after.outputs, before.outputs, atol=1e-5)
    found = [shared.train_cost_s for shared in (after.computed_once, run(bench.train).computed_once) if shared]
    assert found[0] == pytest.approx(found[1] / 2)  # half of the photos


def test_draw_is_the_same_for_all_ways_and_grows_by_images() -> None:
    targets = [index % 3 for index in range(60)]
    drawn = [draw(targets, str(count), 7) for count in (1, 5, 20)]
    for few, more in itertools.pairwise(drawn):
        assert set(few) < set(more)
    for count, indices in zip((1, 5, 20), drawn, strict=True):
        assert sorted(targets[index] for index in indices) == sorted([0, 1, 2] * count)
    assert draw(targets, "5", 7) == drawn[1] != draw(targets, "5", 8)

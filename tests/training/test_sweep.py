"""Many heads trained together are what each would be alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.card import Preprocessing
from regraft.data.folders import Sample
from regraft.data.photos import Photos
from regraft.data.transforms import augmentation
from regraft.training import sweep
from regraft.training.features import FeatureBatches, Features
from regraft.training.loop import Engine
from regraft.training.sweep import sweep_heads
from training.test_features import Lines, half_frozen, run, write_photos

ENGINE = Engine(torch.device("cpu"))
COUNT, WIDTH = 60, 6


def batches(noise: float = 0.5) -> FeatureBatches:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(COUNT) % 3
    rows = torch.randn(COUNT, WIDTH, generator=generator) * noise
    rows[torch.arange(COUNT), targets] += 1
    preprocessing = Preprocessing(size=8, resize=8)
    samples = tuple(Sample(Path(f"{index}.png"), int(target)) for index, target in enumerate(targets))
    photos = Photos(samples, preprocessing, augmentation("none", preprocessing))
    features = Features((rows,), (torch.float32,), "full", 0.0, 1, 0.0, 0.0, False, "memory")
    return FeatureBatches(features, photos, 16)


def options(**changed: Any) -> dict[str, Any]:
    return {"epochs": 4, "decays": (0.05, 1.0), "seed": 3, **changed}


def test_each_head_is_what_torchs_own_optimizer_makes_of_it() -> None:
    head, data = nn.Linear(WIDTH, 3), batches()
    found = sweep_heads(head, data, F.cross_entropy, ENGINE, **options())
    assert found is not None
    generator = torch.Generator().manual_seed(3)
    folds = torch.randperm(COUNT, generator=generator).view(5, 12)
    others = [sorted(set(range(COUNT)) - set(fold.tolist())) for fold in folds]
    orders = [[torch.randperm(48, generator=generator) for _ in folds] for _ in range(4)]
    torch.manual_seed(3)
    starts = [head, *(nn.Linear(WIDTH, 3) for _ in folds[1:])]
    expected = torch.zeros(len(found.tried))
    for position, fold in enumerate(folds):
        steps = [rows for epoch in orders for rows in torch.tensor(others[position])[epoch[position]].split(16)]
        for pair, (rate, decay) in enumerate(found.tried):
            alone = copy.deepcopy(starts[position])
            groups = [{"params": [alone.weight], "weight_decay": decay}, {"params": [alone.bias], "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
            for rows in steps:
                (inputs,), targets = data.pick(rows, torch.zeros_like(rows))
                optimizer.zero_grad()
                F.cross_entropy(alone(inputs), targets).backward()
                optimizer.step()
                schedule.step()
            (inputs,), targets = data.pick(fold, torch.zeros_like(fold))
            expected[pair] += F.cross_entropy(alone(inputs), targets).detach() / 5
    assert torch.allclose(torch.tensor(found.losses), expected, atol=1e-5)
    assert found.losses[found.tried.index(found.best)] == min(found.losses)


def test_the_network_and_the_random_state_stay_as_they_are(random_state: Any) -> None:
    live = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, 3))
    before, state = copy.deepcopy(live.state_dict()), random_state()
    assert sweep_heads(live, batches(), F.cross_entropy, ENGINE, **options()) is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    assert random_state() == state
    assert all(parameter.grad is None for parameter in live.parameters())


def test_what_cannot_be_trained_side_by_side_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert sweep_heads(norm, batches(), F.cross_entropy, ENGINE, **options()) is None
    monkeypatch.setattr(sweep, "MOST_PARAMETERS", 10)
    assert sweep_heads(nn.Linear(WIDTH, 3), batches(), F.cross_entropy, ENGINE, **options()) is None
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "FEWEST_PHOTOS", COUNT + 1)
    assert sweep_heads(nn.Linear(WIDTH, 3), batches(), F.cross_entropy, ENGINE, **options()) is None


def test_fit_chooses_both_unless_they_are_given(tmp_path: Path) -> None:
    photos = write_photos(tmp_path, 48)

    def chosen(**given: Any) -> tuple[regraft.FitResult, Lines]:
        torch.manual_seed(0)
        model = half_frozen()
        regraft.freeze(model)
        regraft.unfreeze(model, "fc")
        return run(photos, model, **{"optimizer": "adamw", "lr": None, **given})

    result, lines = chosen()
    assert "chosen     learning rate" in lines
    assert result.config.lr in sweep.RATES
    assert result.config.weight_decay in sweep.DECAYS
    again, lines = chosen(lr=result.config.lr, weight_decay=result.config.weight_decay)
    assert "chosen" not in lines
    assert [record.train_loss for record in again.history] == [record.train_loss for record in result.history]
    result, _ = chosen(weight_decay=0.3)
    assert result.config.weight_decay == 0.3
